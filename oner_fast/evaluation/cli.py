"""`oner-fast eval RUN`: retrieval on the held-out splits, beside chance; also COCO-like captions and ImageFolders."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import oner_fast
from oner_fast.evaluation.folder import check_run, find_data, processor, read_config
from oner_fast.evaluation.table import show


@dataclass(frozen=True)
class Options:
    """Evaluate a trained run, write RUN/evaluation.json and print its figures with chance beside them."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    data: Path | None = None
    """Data to evaluate on (a folder with dataset.json, or a tar); the run's own by default."""
    split: tuple[str, ...] = ()
    """Splits to evaluate; all but `train` by default."""
    coco_json: Path | None = None
    """Captions of images: Karpathy's json or COCO's captions json; needs --coco-images."""
    coco_images: Path | None = None
    """The folder of the images that --coco-json names."""
    coco_split: str = "test"
    """The split of Karpathy's json."""
    image_folder: Path | None = None
    """Pictures for zero-shot classification: FOLDER/class/picture.jpg."""
    classes: Path | None = None
    """Class names, one a line, in the order of the sorted sub-folders; the sub-folders' names by default."""
    templates: Path | None = None
    """Prompt templates, one a line, with {} where the class goes."""
    batch_size: int = 64
    """Pictures embedded at once."""
    device: str = "cpu"
    """Where the model computes: cpu, cuda, cuda:1, ..."""
    limit: int | None = None
    """Evaluate this many samples of each split only, evenly spaced."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = tyro.cli(Options, args=list(argv), prog="oner-fast eval")
    try:
        evaluation = evaluate(options)
    except KeyboardInterrupt:
        print("oner-fast eval: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"oner-fast eval: {error}", file=sys.stderr)
        return 2
    show(evaluation)
    print(f"wrote {options.run / 'evaluation.json'}")
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """Evaluate as the options say and write RUN/evaluation.json.

    Returns:
        An entry for each split (`pairs`, `image_to_text`, `text_to_image`, `modality_gap`, ...), for `coco` and
        `zero_shot` where asked, and `about`: what it was made with.
    """
    check_run(options.run)
    if (options.coco_json is None) != (options.coco_images is None):
        raise ValueError("--coco-json and --coco-images go together")
    elsewhere = options.coco_json is not None or options.image_folder is not None
    own = not elsewhere or options.data is not None
    data = find_data(options.run, options.data) if own else None

    from oner_fast.evaluation import run as steps
    from oner_fast.evaluation.coco import read_captions

    asked = list(options.split)
    if data is not None:
        known = steps.held_out_splits(data)
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ValueError(f"{data} has no held-out split {unknown[0]!r}; it has {', '.join(known)}")
        asked = asked or known
    loaded = oner_fast.load(options.run, options.device)
    evaluation: dict[str, Any] = {}
    if data is not None:
        trained_on = data if options.data is None else _training_data(options.run, data)
        seen = steps.training_words(trained_on)
        for name in asked:
            dataset = steps.PairDataset(data, split=name)
            evaluation |= steps.evaluate_split(
                loaded, dataset, name, seen, batch_size=options.batch_size, limit=options.limit
            )
    if options.coco_json is not None and options.coco_images is not None:
        images = read_captions(options.coco_json, options.coco_images, split=options.coco_split)
        evaluation["coco"] = steps.evaluate_retrieval(loaded, images, batch_size=options.batch_size)
    if options.image_folder is not None:
        evaluation["zero_shot"] = _zero_shot(loaded, options)
    evaluation["about"] = {
        "recipe": read_config(options.run).get("recipe"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    steps.write_json(options.run / "evaluation.json", evaluation)
    return evaluation


def _training_data(run: Path, other: Path) -> Path:
    """The data whose training captions say which words were seen: the run's, or else the data given."""
    try:
        return find_data(run, None)
    except FileNotFoundError:
        return other


def _zero_shot(loaded: Any, options: Options) -> dict[str, Any]:
    from oner_fast.evaluation.run import evaluate_zero_shot
    from oner_fast.evaluation.zero_shot import TEMPLATES, read_lines

    assert options.image_folder is not None
    return evaluate_zero_shot(
        loaded,
        options.image_folder,
        classes=read_lines(options.classes) if options.classes else None,
        templates=read_lines(options.templates) if options.templates else TEMPLATES,
        batch_size=options.batch_size,
    )
