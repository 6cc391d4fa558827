"""Settings of every test: two threads and a process-wide seed, so that failures can be reproduced."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from oner_fast.benchmarks.gpuless import tools

# Programs that tests start with -c or -m must not have the current folder on their path.
os.environ["PYTHONSAFEPATH"] = "1"

hypothesis.settings.register_profile("oner_fast", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("oner_fast")

# The tools without which tests of GPU kernels are skipped.
LADDER = tuple(dict.fromkeys([*tools.FOR_INTERPRETER, *tools.FOR_AOT, *tools.FOR_EMULATE, *tools.FOR_CUDA]))
# The files that take longest, which start first: several processes share the files, and none should wait for one at the
# end.
LONGEST = (
    "tests/test_install.py",
    "tests/kernels/test_mixup_info_nce.py",
    "tests/train/oner/test_resume.py",
    "tests/train/oner/test_step.py",
    "tests/ops/test_varlen_attention.py",
    "tests/ops/test_instruction_sets.py",
    "tests/train/uta/test_training.py",
    "tests/kernels/test_varlen_attention.py",
    "tests/kernels/test_resources.py",
    "tests/ops/test_capability.py",
    "tests/test_import.py",
)
# Packages that belong to one torch, as far as they are not installed, and what an error says of one.
ABSENT = [name for name in ("open_clip", "timm") if importlib.util.find_spec(name) is None]
if os.environ.get("ONER_FAST_CI") == "1":
    ABSENT = []
LACK = re.compile(rf"No module named '({'|'.join(ABSENT)})|({'|'.join(ABSENT)}) is needed here and not installed")
MOST_REASONS = 7  # that the end of a run lists one by one


def pytest_configure() -> None:
    """Refuse to run in continuous integration where tests of GPU kernels would be skipped."""
    if os.environ.get("ONER_FAST_CI") == "1" and (absent := tools.missing(*LADDER)):
        raise pytest.UsageError(
            f"ONER_FAST_CI=1 lets no test of a GPU kernel be skipped, and needs {', '.join(absent)}"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, Any]:
    """Turn a failure for want of a package that no extra may name into a skip; continuous integration has them all."""
    report = yield
    if report.failed and ABSENT and (found := LACK.search(report.longreprtext)):
        reason = f"needs {found[1] or found[2]} (pip install $(oner-fast requirements clip))"
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first where processes share the files; the order within a file stays."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        order = {config.rootpath / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path, len(LONGEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was skipped and why, in a few lines: the most frequent reasons first."""
    given = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    reasons = Counter(str(one[2] if isinstance(one, tuple) else one).removeprefix("Skipped: ") for one in given)
    if not reasons:
        return
    terminalreporter.section(f"{reasons.total()} skipped")
    for reason, count in reasons.most_common(MOST_REASONS):
        terminalreporter.write_line(f"{count:5}  {reason.splitlines()[0][:110]}")
    if others := reasons.most_common()[MOST_REASONS:]:
        total = sum(count for _, count in others)
        terminalreporter.write_line(f"{total:5}  for {len(others)} other reasons (-rs lists every skip)")


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """`needs("nvcc", "g++")` skips a test where a tool is missing, and names it."""

    def check(*names: str) -> None:
        if absent := tools.missing(*names):
            pytest.skip(f"needs {', '.join(absent)}")

    return check


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    """Set threads, seed and determinism for each test, independently of the test before it."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a training clears it


@pytest.fixture
def tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Return `make(seed)`, which replaces the pretrained encoders, too large for tests, by tiny ones of that seed."""
    from oner_fast.models import pretrained_encoders
    from oner_fast.models.sentence_encoder import SentenceEncoder

    def tokenize(texts: list[str]) -> torch.Tensor:
        rows = [[1, *(ord(letter) - 95 for letter in text.lower() if "a" <= letter <= "z")] for text in texts]
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def build(seed: int) -> pretrained_encoders.Encoders:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            image = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 4, stride=4), torch.nn.BatchNorm2d(10))
            text = SentenceEncoder(vocab_size=28, width=12, depth=1, heads=2, hidden=16, positions=64)
        return pretrained_encoders.Encoders(
            image=image.eval().requires_grad_(False),
            image_width=10,
            stride=4,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            text=text.eval().requires_grad_(False),
            text_width=12,
            tokenize=tokenize,
            image_origin=pretrained_encoders.Origin("tiny-image", "1.0", f"image {seed}"),
            text_origin=pretrained_encoders.Origin("tiny-text", "1.0", f"text {seed}"),
        )

    def make(seed: int) -> pretrained_encoders.Encoders:
        monkeypatch.setattr(pretrained_encoders, "packaged_encoders", lambda: build(seed))
        return build(seed)

    return make
