from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import oner_fast
from oner_fast import _extension, doctor
from oner_fast.ops import implementations


def test_the_doctor_reports_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for word in (
        oner_fast.__version__,
        str(torch.__version__),
        "instruction sets",
        "GPU",
        "xformers",
        "flash-attn",
        "apex",
        "triton",
    ):
        assert word in said
    for op in implementations.ops():
        assert f"{op} (cpu)" in said


def test_the_doctor_names_missing_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _extension.Status(False, "the C++ extension is not built: ninja was not found", "pip install ninja")
    monkeypatch.setattr(_extension, "_status", missing)
    said = " ".join(doctor.report().split())
    assert "not in use: the C++ extension is not built: ninja was not found" in said
    assert "remedy pip install ninja" in said
    assert "masked_gather (cpu) portable" in said
    assert "not cpp: the C++ extension is not built" in said


def test_the_doctor_imports_no_optional_package_and_needs_no_extra() -> None:
    program = """
import sys
import oner_fast.doctor as doctor
doctor.report()
print([m for m in ("flash_attn", "xformers", "apex", "tyro", "rich", "PIL", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def make_apex(folder: Path, *inside: str) -> None:
    for name in ("", *inside):
        (folder / "apex" / name).mkdir(parents=True, exist_ok=True)
        (folder / "apex" / name / "__init__.py").write_text("raise ImportError('the doctor must not import this')")


def test_nvidias_apex_is_distinguished_from_pypis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    make_apex(tmp_path)
    version, why = doctor.find_apex()
    assert version is None and "not NVIDIA's" in why
    make_apex(tmp_path, "normalization", "multi_tensor_apply")
    version, why = doctor.find_apex()
    assert version == "?" and why == ""


def test_an_optional_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.find_peer("no_such_peer_of_ours", "no-such-peer") is None
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_peer_of_ours.py").write_text("raise SystemExit('imported')")
    assert doctor.find_peer("some_peer_of_ours", "some-peer-of-ours") == "?"
    assert doctor.find_peer("torch", "torch") == str(torch.__version__)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's list of CPU flags")
def test_cpu_features_come_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    spelled = {"sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    compiled = {spelled.get(name, name) for name in doctor.cpu_features()}
    monkeypatch.setitem(sys.modules, "oner_fast._native", None)
    assert compiled == set(doctor.cpu_features())


def test_the_doctor_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--fast"]) == 2
    assert "'--fast'" in capsys.readouterr().err
    assert doctor.main(["--help"]) == 0


def test_an_instruction_set_that_does_not_exist_does_not_stop_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _extension.status().loaded:
        pytest.skip(_extension.status().reason)

    def refuse() -> str:
        raise ValueError("ONER_FAST_CPU_CAPABILITY is 'avx1024'; known ones: portable")

    monkeypatch.setattr(torch.ops.oner_fast, "cpu_capability", refuse)
    said = " ".join(doctor.report().split())
    assert "loaded; every call fails: ONER_FAST_CPU_CAPABILITY is 'avx1024'; known ones: portable" in said


def test_a_packer_that_is_installed_and_cannot_serve_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = {"native": {"built": True, "reason": ""}, "python": "2.7.18"}
    monkeypatch.setitem(sys.modules, "oner_fast._native", ModuleType("of other sources"))
    assert doctor.cpu_features() and doctor._why_no_packer(report) == "it was built from other sources"
    monkeypatch.delitem(sys.modules, "oner_fast._native")
    monkeypatch.setattr(oner_fast, "__path__", [str(tmp_path)])
    assert doctor._why_no_packer(report).startswith("it was compiled for Python 2.7.18, and this is ")
    assert doctor._why_no_packer({}) == "the package was never built"
    (tmp_path / "_native.so").write_bytes(b"no library")
    assert doctor._why_no_packer(report).startswith("the compiled module cannot be imported: ")
