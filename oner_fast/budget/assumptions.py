"""The numbers that no count gives. Each is a judgement, is printed with the estimate, and can be replaced."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that do not depend on the GPU. Times are in seconds.

    Args:
        launch: the host's time for one operation.
        hop: one hop of the ring, with its exchange and the host's work of some forty operations.
        hops: passes around the ring that a contrast makes: in forward and in backward.
        collective: a gather or an exchange of a few MB over all ranks, with the host's work around it.
        repeat: one dependent addition where many rows share one source, added one after another.
        pair_instructions: warp instructions of listing rows, for each pair of rows, by comparing all with all.
        entry: one entry of a list that a single thread reads.
        row_instructions: warp instructions of a counting sort for each row.
        waits: places where the host waits for the GPU in a step.
        wait: time that the GPU idles after each, until the host is ahead again.
        copies: blocking copies of the images.
        masks: the host's drawing of masks before the first kernel.
        hidden_communication: share of the gradients' all-reduce that the backward pass hides.
        parameter_bytes: bytes for each parameter of AdamW (28), clipping (12) and the casts of student weights (6).
        teacher_bytes: bytes for each parameter of the moving average (12) and the casts of the teacher's weights (6).
        embedding_bytes: bytes for each number of the embedded rows: tables, positions, selection, forward and backward.
        vocabulary_bytes: bytes for each logit of a masked word, forward and backward.
        pixel_bytes: bytes for each pixel of a masked patch that is predicted.
    """

    launch: float = 6e-6
    hop: float = 310e-6
    hops: int = 2
    collective: float = 250e-6
    repeat: float = 0.48e-6
    pair_instructions: float = 0.76
    entry: float = 50e-9
    row_instructions: float = 20.0
    waits: int = 13
    wait: float = 0.5e-3
    copies: int = 3
    masks: float = 10e-3
    hidden_communication: float = 0.6
    parameter_bytes: float = 46.0
    teacher_bytes: float = 18.0
    embedding_bytes: float = 40.0
    vocabulary_bytes: float = 30.0
    pixel_bytes: float = 40.0
