"""Run whole training steps on tensors without memory on a GPU that is not there, and count what they do.

A program, since `fake_gpu.cpp` must be loaded before PyTorch. It writes one JSON object: for each training, what its
steps did.

The step is `Training.step_once` of the training's own class: forward, backward, clipping, AdamW, the teacher's average
and the guard. Two kinds of thing do not exist without a GPU, and are replaced: CUDA's streams and events
(`torch.cuda.Stream` and its relatives, which here only note what was waited for), and the copy of the guard's numbers
to the host (`LateNumbers(to_host)`), whose numbers would have no values. With two ranks, `DistributedDataParallel` is
left out: its reducer is compiled for tensors with memory. All else that the ranks tell each other is there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oner_fast import ops
from oner_fast.data.batch import PairBatch, TokenizedText, no_text
from oner_fast.models.clip import CLIPConfig
from oner_fast.models.oner import OneRConfig
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.train.clip.settings import CLIPConfiguration, Contrast
from oner_fast.train.clip.step import ContrastStep
from oner_fast.train.clip.towers import NewTowers
from oner_fast.train.clip.training import CLIPTraining
from oner_fast.train.config.common import Optimisation, Run
from oner_fast.train.engine import replica
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.late_numbers import LateNumbers
from oner_fast.train.engine.loop import Training
from oner_fast.train.engine.nonfinite import NonFiniteGuard
from oner_fast.train.engine.optimizer import build_adamw
from oner_fast.train.oner.ema import build_teacher
from oner_fast.train.oner.settings import Objectives, OneRConfiguration
from oner_fast.train.oner.step import TrainingStep
from oner_fast.train.oner.student import Student
from oner_fast.train.oner.training import OneRTraining
from oner_fast.train.uta.settings import Alignment, UTAConfiguration
from oner_fast.train.uta.step import AlignmentStep
from oner_fast.train.uta.teacher_features import TeacherFeatures
from oner_fast.train.uta.training import UTATraining

NO_MEMORY = FakeTensorMode(allow_non_fake_inputs=True)
GPU = World(0, 1, 0, torch.device("cuda", 0))
RANKS = World(0, 2, 0, torch.device("cuda", 0))
"""The first of two ranks; the other one is PyTorch's fake process group, whose collectives change nothing."""
PAIRS = 8
STEPS = 2
"""The steps of each training; the last one is reported, by which all caches are filled."""


class Watch(TorchDispatchMode):
    """Counts the operations of a step, and notes copies between host and device.

    An operation that would read a value, such as `item`, `nonzero` or `tolist`, has no answer under FakeTensorMode and
    raises there.

    Attributes:
        operations: how often each operation ran that computes something; views are left out.
        copies: one text for each copy between host and device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            ends = source.device.type, (result if isinstance(result, Tensor) else args[0]).device.type
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if ends[0] != ends[1]:
                size = f"{source.numel()} {source.dtype}".replace("torch.", "")
                self.copies.append(f"{ends[0]} -> {ends[1]}, {'waits' if blocking else 'does not wait'}, {size}")
        on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in tree_leaves((args, kwargs, result)))
        if on_gpu and func.namespace != "prim" and not func.is_view:
            self.operations[func._schema.name] += 1
        return result


class Quiet:
    """A stream or an event that does nothing but note who waits for it."""

    waited: list[str] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def record(self, *_: Any) -> None:
        """Do nothing."""

    def wait_event(self, _: Any) -> None:
        """Let the device wait, which the host does not notice."""

    wait_stream = wait_event

    def synchronize(self) -> None:
        """Let the host wait."""
        self.waited.append("event")


@contextmanager
def no_streams(_: Any) -> Iterator[None]:
    """Stand for `torch.cuda.stream`."""
    yield


def without_a_gpu() -> None:
    """Replace what PyTorch's CPU build lacks: streams, events, autocast's check, a tensor's mark of its stream.

    Operations on lists of tensors are chosen for a GPU's tensors by their exact type, of which fake ones are another.
    """
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    torch.cuda.Stream = torch.cuda.Event = Quiet  # type: ignore[misc, assignment]
    torch.cuda.stream = no_streams  # type: ignore[assignment]
    torch.cuda.current_stream = Quiet  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


LONGEST: list[int | None] = []
"""The upper bounds that calls of attention were given, of queries and of keys."""


def note_lengths() -> None:
    """Note the bounds of each call of attention."""
    attend = ops.varlen_attention

    def noting(*arguments: Any, **options: Any) -> Tensor:
        LONGEST.extend((options.get("max_seqlen_q"), options.get("max_seqlen_k")))
        result: Tensor = attend(*arguments, **options)
        return result

    ops.varlen_attention = noting  # type: ignore[assignment]


class NoNumbers:
    """The guard's copies to the host: they are started, and give zeros when they arrive.

    Attributes:
        started: copies so far.
        read: copies whose end the host waited for.
    """

    def __init__(self) -> None:
        self.started = 0
        self.read: list[int] = []

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Any]:
        """Start a copy that does not wait."""
        numbers.to("cpu", non_blocking=True)
        self.started += 1
        return _Zeros(numbers.shape[0]), _Arrival(self, self.started)  # type: ignore[return-value]


class _Zeros:
    def __init__(self, count: int) -> None:
        self.count = count

    def tolist(self) -> list[float]:
        return [0.0] * self.count


class _Arrival:
    def __init__(self, numbers: NoNumbers, index: int) -> None:
        self.numbers, self.index = numbers, index

    def synchronize(self) -> None:
        self.numbers.read.append(self.index)


def captions_of(step: int) -> tuple[TokenizedText, list[str]]:
    """Make captions whose lengths differ from step to step."""
    lengths = [1 + (step + i) % 9 for i in range(PAIRS)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.arange(sum(lengths)) % 26 + 3
    return TokenizedText(ids, ends, torch.arange(sum(lengths)).int()), [f"a picture of {'very ' * n}" for n in lengths]


def batch_of(side: int, step: int, words: bool, second: bool = False) -> PairBatch:
    """Make a batch as the loader does."""
    text, captions = captions_of(step)
    images = torch.zeros((2, PAIRS, 3, side, side), dtype=torch.uint8)
    given = (images[0], text if words else no_text(PAIRS), torch.arange(PAIRS), captions, step, 0)
    return PairBatch(*given, second=images[1] if second else None)


def oner(accum_freq: int, world: World = GPU, **objectives: Any) -> tuple[Training[Any], Callable[[int], PairBatch]]:
    """Make a OneR of four patches, and its batches."""
    model = OneRConfig(12, 4, 8, 2, 2, vocab_size=29, max_text_tokens=9, embed_dim=5, projector_hidden=7)
    config = OneRConfiguration(
        model=model,
        objectives=Objectives(**{"predictor_hidden": 6, "mask_word_ratio": 0.4, **objectives}),
        optim=Optimisation(batch_size=PAIRS, accum_freq=accum_freq),
    )
    training, student = trained(OneRTraining, config, lambda: Student(model, config.objectives), world)
    training.teacher = build_teacher(student.tower) if config.objectives.momentum_teacher else None
    training.step = TrainingStep(config, student, training.teacher, _Words(), world, torch.bfloat16)
    second = config.objectives.teacher_view == "second"
    return training, lambda step: batch_of(12, step, True, second)


class _Words:
    mask_id, first_word_id, vocab_size = 2, 3, 29


def uta(objective: str, accum_freq: int) -> tuple[Training[Any], Callable[[int], PairBatch]]:
    """Make a UTA of 36 patches with a teacher of its size, and its batches."""
    model = UTAConfig(
        24, 4, width=16, depth=2, heads=2, mlp_hidden=24, embed_dim=8, mask_token=objective == "mask_token"
    )
    config = UTAConfiguration(
        model=model,
        alignment=Alignment(objective=objective, drop_path=0.3, head_init="teacher_mean"),  # type: ignore[arg-type]
        optim=Optimisation(batch_size=PAIRS, accum_freq=accum_freq),
    )
    training, student = trained(UTATraining, config, lambda: UTA(model))
    teacher: Any = onto_gpu(_Teacher())
    features = TeacherFeatures(teacher)
    training.step = AlignmentStep(config, student, features, GPU, torch.bfloat16)
    return training, lambda step: batch_of(24, step, False)


class _Teacher(torch.nn.Module):
    """A linear teacher: the tower of a real one belongs to another package."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3, 8), requires_grad=False)

    def tokens(self, images: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(images.float(), 4).flatten(2).transpose(1, 2) @ self.weight
        return torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1).to(self.dtype)


def clip(accum_freq: int, same_caption: Any, world: World = GPU) -> tuple[Training[Any], Callable[[int], PairBatch]]:
    """Make a CLIP of four patches, and its batches."""
    model = CLIPConfig(
        image_size=16, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2, text_width=16, text_layers=2,
        text_heads=2, context_length=8, embed_dim=8,
    )  # fmt: skip
    config = CLIPConfiguration(
        model=model, contrast=Contrast(same_caption=same_caption), optim=Optimisation(batch_size=PAIRS)
    )
    training, towers = trained(CLIPTraining, config, lambda: NewTowers(model, 0.07), world)
    training.step = ContrastStep(towers, accum_freq, world, torch.bfloat16, same_caption)
    return training, lambda step: batch_of(16, step, False)


def trained(kind: type[Any], config: Any, build: Callable[[], Any], world: World = GPU) -> tuple[Any, Any]:
    """Make a training around a module on the GPU, as its constructor would, without data and a folder."""
    training: Any = object.__new__(kind)
    training.config = replace(config, run=replace(config.run or Run(), precision="amp_bf16"))
    training.world, training.dtype, training.steps_done = world, torch.bfloat16, 1
    training.student = onto_gpu(build()).train()
    o = config.optim
    training.optimizer = build_adamw(training.student, o.lr, (o.beta1, o.beta2), o.eps, o.wd)
    training.numbers = NoNumbers()
    training.guard = NonFiniteGuard(late=LateNumbers(training.numbers))
    return training, training.student


class NoReducer:
    """Stand for `DistributedDataParallel`: the module itself."""

    def __new__(cls, module: Any, **_: Any) -> Any:
        """Return the module."""
        return module


def join_ranks() -> None:
    """Become the first rank of `RANKS`."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANKS.rank, world_size=RANKS.size)
    replica.DistributedDataParallel = NoReducer  # type: ignore[misc, assignment]


def onto_gpu(module: Any) -> Any:
    """Give a module tensors on the GPU, without memory, in the place of its own."""
    with NO_MEMORY:
        _onto_gpu(module)
    return module


def _onto_gpu(module: Any) -> None:
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=GPU.device)
                each._parameters[name] = torch.nn.Parameter(there, parameter.requires_grad)
        for name, tensor in each._buffers.items():
            if tensor is not None:
                each._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU.device)


CASES: dict[str, Callable[[], tuple[Training[Any], Callable[[int], PairBatch]]]] = {
    "OneR": lambda: oner(1),
    "OneR, every objective": lambda: oner(
        1, xmc=1.0, cic=0.5, learnable_temperature=True, force_patch_dropout=0.25, symmetric=True,
        same_caption="positive", teacher_view="second",
    ),
    "OneR without a teacher, micro-batches": lambda: oner(2, momentum_teacher=False, symmetric=True),
    "UTA": lambda: uta("uta", 1),
    "UTA's distillation": lambda: uta("distillation", 1),
    "UTA with mask tokens, micro-batches": lambda: uta("mask_token", 2),
    "CLIP": lambda: clip(1, "negative"),
    "CLIP, equal captions, micro-batches": lambda: clip(2, "ignore"),
    "OneR, two ranks": lambda: oner(1, RANKS, same_caption="positive"),
    "CLIP, two ranks": lambda: clip(1, "positive", RANKS),
}  # fmt: skip


def counted_on_the_gpu(batch: PairBatch) -> PairBatch:
    """Take the number of masked patches out of a OneR's inputs, so that the step has to read it."""
    given = batch.inputs
    passes = tuple(
        replace(each, image=each.image and replace(each.image, masked_count=None)) for each in given.student[0].passes
    )
    return replace(batch, inputs=replace(given, student=(replace(given.student[0], passes=passes),)))


def masked_in_the_step(batch: PairBatch) -> PairBatch:
    """Take all inputs out of a batch, so that the step has to draw them."""
    return replace(batch, inputs=None)


SPOILT = {
    "a number that the step reads": ("OneR", counted_on_the_gpu),
    "masks that the step draws": ("UTA", masked_in_the_step),
}
"""Steps that wait: those of a case whose batches lack something."""


def report(case: str) -> dict[str, Any]:
    """Take the steps of a training, and return what the last one did, or the error that ended them."""
    torch.manual_seed(0)
    case, spoil = SPOILT.get(case, (case, lambda batch: batch))
    if "ranks" in case and not dist.is_initialized():
        join_ranks()
    training, batches = CASES[case]()
    found: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        # In a worker: tensors with values, on the CPU. Pinning would change no more than where the buffer lies.
        batch = batches(step)
        batch = spoil(replace(batch, inputs=training.step.prepare(batch)))._packed(pin=False)
        watch, Quiet.waited = Watch(), []
        LONGEST.clear()
        try:
            with NO_MEMORY, watch:
                training.step_once(batch)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        training.steps_done += 1
        found = {
            "copies": watch.copies,
            "operations": sum(watch.operations.values()),
            "by name": dict(watch.operations.most_common()),
            "read": [training.numbers.started, *training.numbers.read],
            "waited": Quiet.waited,
            "longest": [*LONGEST],
        }
    return found


def main() -> None:
    """Report the cases that the arguments name, or all, into the file that the first argument names."""
    without_a_gpu()
    note_lengths()
    # A process group stays for the rest of the process, so the cases of two ranks come last.
    cases = sorted(sys.argv[2:] or [*CASES, *SPOILT], key=lambda case: "ranks" in case)
    Path(sys.argv[1]).write_text(json.dumps({case: report(case) for case in cases}, indent=1))


if __name__ == "__main__":
    main()
