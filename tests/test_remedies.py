"""The commands that install packages name what is missing, and hold torch."""

from importlib import metadata

import pytest

from oner_fast import remedies
from oner_fast.remedies import install_command, install_extra_command, requirements, triton_requirement

REQUIRES = {
    "oner_fast": [
        "torch>=2.11",
        'ftfy>=6.0; extra == "text"',
        'regex>=2.20 ; extra == "text"',
        'oner_fast[text,train]; extra == "all"',
        "Pillow; extra == 'train'",
        'webdataset!=0.3; python_version >= "3.11" and extra == "train"',
        'oner-fast[all]; extra == "all"',
    ]
}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    installed = {"torch": "2.13.0+cpu", "oner_fast": "0.1", "ftfy": "6.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", REQUIRES.get)
    return installed


def test_torch_is_held_at_its_version(packages: dict[str, str]) -> None:
    assert install_command("timm", "a>1") == "pip install timm 'a>1' torch==2.13.0"
    del packages["torch"]
    assert install_command("timm") == "pip install timm"


def test_what_is_missing_of_an_extra_is_named(packages: dict[str, str]) -> None:
    assert install_extra_command("text") == "pip install 'regex>=2.20' torch==2.13.0"
    assert install_extra_command("train") == "pip install Pillow 'webdataset!=0.3' torch==2.13.0"
    assert install_extra_command("all") == "pip install 'regex>=2.20' Pillow 'webdataset!=0.3' torch==2.13.0"


def test_an_extra_of_which_nothing_is_missing_is_named_whole(packages: dict[str, str]) -> None:
    packages["regex"] = "2"
    assert install_extra_command("text") == "pip install 'ftfy>=6.0' 'regex>=2.20' torch==2.13.0"


def test_the_extra_itself_is_named_where_nothing_is_known_of_it(packages: dict[str, str]) -> None:
    assert install_extra_command("none") == "pip install 'oner_fast[none]' torch==2.13.0"
    del packages["oner_fast"]
    assert install_extra_command("train") == "pip install 'oner_fast[train]' torch==2.13.0"


def test_companions_of_torch_are_named_with_what_else_is_missing(packages: dict[str, str]) -> None:
    clip = ["open-clip-torch>=3.0", "timm>=1.0", "torch==2.13.0"]
    assert requirements("clip") == ["Pillow", "webdataset!=0.3", *clip]
    assert install_extra_command("clip") == "pip install Pillow 'webdataset!=0.3' 'open-clip-torch>=3.0' " + (
        "'timm>=1.0' torch==2.13.0"
    )
    packages |= {"timm": "1.0", "Pillow": "10", "webdataset": "1.0"}
    assert install_extra_command("clip") == "pip install 'open-clip-torch>=3.0' torch==2.13.0"
    del packages["oner_fast"]
    assert requirements("clip") == ["oner_fast[train]", *clip]


def test_triton_is_that_of_torch(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_extra_command("triton") == "pip install 'triton~=3.7.1' torch==2.13.0"
    for torch, wanted in (("2.11.0+cpu", "triton~=3.6.0"), ("2.15.0", "triton~=3.9.0"), ("2.99.0", "triton>=3.9.0")):
        packages["torch"] = torch
        assert triton_requirement() == wanted
    monkeypatch.setitem(REQUIRES, "torch", ['triton==3.6.0; platform_system == "Linux"', "triton>=1; extra == 'x'"])
    assert triton_requirement() == "triton==3.6.0"


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert remedies.main(["clap"]) == 2
    said = capsys.readouterr().err
    assert "no requirements named 'clap'; known: " in said and " clip, " in said and " train, " in said


def test_the_command_prints_each_requirement_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert remedies.main(["clip", "lit"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(set(said)) and {"open-clip-torch>=3.0", "timm>=1.0", "torch==2.13.0"} <= set(said)
    assert remedies.main([]) == 2 and remedies.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: pip install $(oner-fast requirements NAME...)")
