"""Techniques that distinguish a step before, now and after: one switch each.

`NOW` names those that the code has. A technique that is merged moves there, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

State = Literal["before", "now", "after"]

TECHNIQUES: Mapping[str, str] = {
    "short attention": "one CUDA C++ kernel a direction for sequences up to 256 tokens: five products in backward",
    "fused passes": "residual sum, LayerNorm and cast in one pass; bias and GELU in another",
    "mask token": "torch.where with a float32 column sum in backward",
    "counting sort": "rows are listed by one counting sort a step, and positions need no list",
    "gathered keys": "below 64 MB the keys of all ranks are gathered at once, and no ring is passed",
    "no waits": "one pinned copy, counts and masks from the workers, and a guard that acts on the device",
}
NOW = frozenset({"mask token", "counting sort", "gathered keys", "no waits"})


def techniques(state: State) -> frozenset[str]:
    """Return the techniques of a state: none before, those of the code now, all after."""
    return {"before": frozenset(), "now": NOW, "after": frozenset(TECHNIQUES)}[state]
