"""An extension that cannot serve is reported once, by the first op call, with a remedy that leaves torch as it is."""

from __future__ import annotations

import ctypes
import shlex
import shutil
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from oner_fast import _extension, remedies
from oner_fast.ops import library, masked_gather

ROOT = Path(__file__).resolve().parents[1]
TOKENS, KEPT = torch.arange(12.0).view(1, 4, 3), torch.zeros(1, 2, dtype=torch.int64)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the next call look for the extension again, as the first call of a process does."""
    monkeypatch.setattr(_extension, "_status", None)
    monkeypatch.setattr(_extension, "_warned", False)
    return monkeypatch


def _told(calls: int = 2, compiled: bool = False) -> list[str]:
    function = torch.compile(masked_gather, backend="eager", fullgraph=True) if compiled else masked_gather
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            function(TOKENS, KEPT)
    return [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]


def test_a_library_that_cannot_be_loaded_is_reported_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"no library")
    (tmp_path / "_build.json").write_text(f'{{"torch": "{torch.__version__}"}}')
    fresh.setenv("ONER_FAST_LIBRARY", str(tmp_path / "_C.so"))
    (told,) = _told()
    assert "the C++ extension could not be loaded" in told and f"Remedy: {remedies.build_command()}. " in told


def test_a_library_that_is_not_there_is_reported_with_what_to_do_first(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_build.json").write_text('{"extension": {"reason": "no compiler", "remedy": "install g++"}}')
    fresh.setenv("ONER_FAST_LIBRARY", str(tmp_path / "_C.so"))
    (told,) = _told()
    assert f"no compiler. Remedy: install g++, then {remedies.build_command()}. " in told


def test_a_call_inside_torch_compile_reports_it_too(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(_extension, "_status", _extension.Status(False, "it is missing", "build it"))
    torch._dynamo.reset()
    try:
        (told,) = _told(compiled=True)
    finally:
        torch._dynamo.reset()
    assert "it is missing. Remedy: build it. " in told


def test_the_remedy_names_the_folder_and_leaves_torch() -> None:
    tools, package = remedies.build_command().split(" && ")
    assert shlex.split(tools)[-1] == f"torch=={torch.__version__.partition('+')[0]}"
    assert {"--no-build-isolation", "--no-deps", "-e", str(ROOT)} <= set(shlex.split(package))


def test_an_installed_package_is_built_from_where_it_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remedies, "_ROOT", tmp_path / "site-packages")
    monkeypatch.setattr(metadata, "version", lambda name: "1.2")
    written = {"direct_url.json": f'{{"url": "{(tmp_path / "my clone").as_uri()}"}}'}

    class Distribution:
        read_text = staticmethod(written.get)

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution)
    released = "--force-reinstall --no-binary oner_fast oner_fast==1.2"
    assert remedies.build_command().endswith(released)  # the clone is gone
    (tmp_path / "my clone").mkdir()
    (tmp_path / "my clone" / "setup.py").touch()
    assert remedies.build_command().endswith(f"--force-reinstall '{tmp_path / 'my clone'}'")
    written.clear()
    assert remedies.build_command().endswith(released)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int nothing;", "it does not say which arguments its ops take"),
        (
            'const char* oner_fast_signatures(void) { return "token_alignment(Tensor,Tensor)->Tensor,Tensor\\n"; }',
            "its token_alignment is token_alignment(Tensor,Tensor)->Tensor,Tensor, needed "
            "token_alignment(Tensor,Tensor,Tensor?)->Tensor,Tensor",
        ),
    ],
)
def test_a_library_of_other_sources_serves_no_call(
    fresh: pytest.MonkeyPatch, tmp_path: Path, source: str, said: str
) -> None:
    """The stable ABI checks no types, so a call with other arguments would end the process."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler was found")
    (tmp_path / "old.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "_C.so", tmp_path / "old.c"], check=True)
    fresh.setenv("ONER_FAST_LIBRARY", str(tmp_path / "_C.so"))
    (told,) = _told()
    assert f"the C++ extension was built from other sources: {said}. Remedy: " in told


def test_a_library_says_which_arguments_each_of_its_ops_takes() -> None:
    if not _extension.status().loaded:
        pytest.skip(_extension.status().reason)
    signatures = ctypes.CDLL(str(_extension.library_path())).oner_fast_signatures
    signatures.restype = ctypes.c_char_p
    names = [line.partition("(")[0] for line in signatures().decode().splitlines()]
    missing = set(library._names) - set(names)
    assert missing == {"mixup_partner_sums"}  # the extension sums them with PyTorch's own op
    assert _extension.other_signatures(_extension.library_path()) == ""
