"""The command for a missing package names what is missing and holds torch."""

from importlib import metadata

import pytest

from oner_fast.remedies import install_command, install_extra_command

REQUIRES = [
    "torch>=2.11",
    'timm>=1.0; extra == "clip"',
    'open_clip_torch>=2.20 ; extra == "clip"',
    'oner_fast[clip,train]; extra == "all"',
    "Pillow; extra == 'train'",
    'webdataset!=0.3; python_version >= "3.11" and extra == "train"',
    'oner-fast[all]; extra == "all"',
]


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    installed = {"torch": "2.13.0+cpu", "oner_fast": "0.1", "timm": "1.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRES)
    return installed


def test_torch_is_held_at_its_version(packages: dict[str, str]) -> None:
    assert install_command("timm", "a>1") == "pip install timm 'a>1' torch==2.13.0"
    del packages["torch"]
    assert install_command("timm") == "pip install timm"


def test_what_is_missing_of_an_extra_is_named(packages: dict[str, str]) -> None:
    assert install_extra_command("clip") == "pip install 'open_clip_torch>=2.20' torch==2.13.0"
    assert install_extra_command("train") == "pip install Pillow 'webdataset!=0.3' torch==2.13.0"
    assert install_extra_command("all") == "pip install 'open_clip_torch>=2.20' Pillow 'webdataset!=0.3' torch==2.13.0"


def test_the_extra_itself_is_named_where_nothing_is_known_of_it(packages: dict[str, str]) -> None:
    assert install_extra_command("none") == "pip install 'oner_fast[none]' torch==2.13.0"
    del packages["oner_fast"]
    assert install_extra_command("clip") == "pip install 'oner_fast[clip]' torch==2.13.0"
