"""Settings of every test: two threads and a process-wide seed, so that failures can be reproduced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

# Programs that tests start with -c or -m must not have the current folder on their path.
os.environ["PYTHONSAFEPATH"] = "1"

hypothesis.settings.register_profile("oner_fast", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("oner_fast")


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    """Set threads, seed and determinism for each test, independently of the test before it."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


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
