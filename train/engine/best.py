"""The best model of a run so far: where it was reached, and its folder, `RUN/best`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast.atomic import remove_leftovers, write_atomic

SCORE = "eval/mean_recall"
"""The metric that the best model has the most of."""
FOLDER = "best"
FILE = "best.json"


@dataclass
class Best:
    """The greatest score of an evaluation so far, and its step; a tie leaves the earlier step.

    It is saved in every checkpoint. A resumed run repeats the evaluations after its checkpoint, and their results and
    the model in the folder are the same bits again.
    """

    score: float = float("-inf")
    step: int = 0

    def improved(self, score: float, step: int) -> bool:
        """Take a score; return whether it is the best one so far. NaN never is."""
        if not score > self.score:
            return False
        self.score, self.step = score, step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.score, self.step = float(state["score"]), int(state["step"])


def write_best(run: Path, step: int, metrics: dict[str, float], export: Callable[[Path], None]) -> None:
    """Write the model into `RUN/best`, and `best.json` with its step and metrics after it.

    Args:
        export: writes the model into a folder.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    (folder / FILE).unlink(missing_ok=True)  # it never stands beside another model
    export(folder)
    text = json.dumps({"step": step, **metrics}, indent=2) + "\n"
    write_atomic(folder / FILE, lambda file: file.write(text.encode()))
