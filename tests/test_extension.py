"""An extension that cannot serve is reported once, by the first op call, with a remedy that leaves torch as it is."""

from __future__ import annotations

import ctypes
import shlex
import shutil
import subprocess
import threading
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from oner_fast import _extension, doctor, remedies
from oner_fast.ops import library, masked_gather

ROOT = Path(__file__).resolve().parents[1]
TOKENS, KEPT = torch.arange(12.0).view(1, 4, 3), torch.zeros(1, 2, dtype=torch.int64)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the next call look for the extension again, as the first call of a process does."""
    monkeypatch.delenv("ONER_FAST_LIBRARY", raising=False)
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
    fresh.setattr(_extension, "_FOLDER", tmp_path)
    (told,) = _told()
    assert "the C++ extension could not be loaded" in told and f"Remedy: {remedies.build_command()}. " in told


def test_a_library_that_is_not_there_is_reported_with_what_to_do_first(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_build.json").write_text('{"extension": {"reason": "no compiler", "remedy": "install g++"}}')
    fresh.setattr(_extension, "_FOLDER", tmp_path)
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
    assert remedies.build_command().endswith(released)  # some other package's
    (tmp_path / "my clone" / "build_backend.py").touch()
    assert remedies.build_command().endswith(f"--force-reinstall '{tmp_path / 'my clone'}'")
    archive = tmp_path / "oner_fast-1.2.tar.gz"
    written["direct_url.json"] = f'{{"url": "{archive.as_uri()}", "archive_info": {{}}}}'
    assert remedies.build_command().endswith(released)
    archive.touch()
    assert remedies.build_command().endswith(f"--force-reinstall {archive}")
    written["direct_url.json"] = '{"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "0123"}}'
    assert remedies.build_command().endswith("--force-reinstall git+https://host/a.git@0123")
    for damaged in ("[]", "{", '{"url": 3}'):
        written["direct_url.json"] = damaged
        assert remedies.build_command().endswith(released)
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
        (
            'const char* oner_fast_signatures(void) { return "cpu_capability()->str\\n"; }',
            "it has no gather_patches, gather_patches_backward, masked_gather,",
        ),
        (
            "#include <stdlib.h>\n__attribute__((constructor)) void registers(void) { abort(); }",
            "it does not say which arguments its ops take",
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
    fresh.setattr(_extension, "_FOLDER", tmp_path)
    (told,) = _told()
    assert f"the C++ extension was built from other sources: {said}" in told and ". Remedy: " in told


@pytest.mark.parametrize("share", [0.0, 0.00003, 0.5, 0.99])
def test_a_library_of_which_a_part_was_written_is_not_loaded(
    fresh: pytest.MonkeyPatch, tmp_path: Path, share: float
) -> None:
    """The linker reads past the end of such a file, which ends the process."""
    whole = _extension.library_path().read_bytes() if _extension.library_path().exists() else pytest.skip("not built")
    (tmp_path / "_C.so").write_bytes(whole[: int(share * len(whole))])
    fresh.setattr(_extension, "_FOLDER", tmp_path)
    (told,) = _told()
    said = f"is cut off: {tmp_path / '_C.so'} has {int(share * len(whole)):,} bytes, and its tables say {len(whole):,}"
    assert (said if share else "could not be loaded") in told


@pytest.mark.parametrize("named", ["/nonexistent/_C.so", "a" * 5000, "."])
def test_a_library_that_is_asked_for_and_not_there_is_named(fresh: pytest.MonkeyPatch, named: str) -> None:
    fresh.setenv("ONER_FAST_LIBRARY", named)
    (told,) = _told()
    assert "ONER_FAST_LIBRARY names no file. Remedy: unset ONER_FAST_LIBRARY (it is /" in told


def test_a_library_may_be_named_from_the_current_folder(fresh: pytest.MonkeyPatch) -> None:
    """The linker takes a bare name for one of the system's libraries."""
    if not _extension.library_path().exists():
        pytest.skip("not built")
    fresh.chdir(_extension.library_path().parent)
    fresh.setenv("ONER_FAST_LIBRARY", "_C.so")
    assert _extension.library_path() == Path.cwd() / "_C.so"
    assert _extension.status() == _extension.Status(True) and _told() == []


@pytest.mark.parametrize(
    "written",
    [
        '{"oldest_torch": 5, "extension": "no", "native": [1], "cuda": null}',
        '{"oldest_torch": "the newest"}',
        '{"oldest_torch": "2.10", "extension": {"reason": 7, "remedy": {}}}',
        "[]",
        "{",
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_record_of_the_build_ends_nothing(fresh: pytest.MonkeyPatch, tmp_path: Path, written: str) -> None:
    fresh.setattr(_extension, "_FOLDER", tmp_path)
    (tmp_path / "_build.json").write_bytes(written.encode(errors="surrogateescape"))
    (told,) = _told()
    assert "the package was never built" in told
    assert _extension.build_report() in ({}, {"oldest_torch": "2.10", "extension": {}})
    assert "masked_gather (cpu)" in doctor.report()


def test_many_threads_are_told_once_together(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(_extension, "_status", _extension.Status(False, "it is missing", "build it"))
    told: list[str] = []
    barrier = threading.Barrier(16)

    def call() -> None:
        barrier.wait()
        masked_gather(TOKENS, KEPT)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        fresh.setattr(warnings, "showwarning", lambda message, *rest, **more: told.append(str(message)))
        threads = [threading.Thread(target=call) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(told) == 1


def test_the_warning_names_the_line_that_called(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(_extension, "_status", _extension.Status(False, "it is missing", "build it"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masked_gather(TOKENS, KEPT)
    assert [one.filename for one in caught] == [__file__]


def test_a_library_says_which_arguments_each_of_its_ops_takes() -> None:
    if not _extension.status().loaded:
        pytest.skip(_extension.status().reason)
    signatures = ctypes.CDLL(str(_extension.library_path())).oner_fast_signatures
    signatures.restype = ctypes.c_char_p
    names = [line.partition("(")[0] for line in signatures().decode().splitlines()]
    missing = set(library._names) - set(names)
    assert missing == {"mixup_partner_sums"}  # the extension sums them with PyTorch's own op
    assert _extension.other_signatures(_extension.library_path()) == ""
