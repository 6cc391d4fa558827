"""`oner-fast eval RUN`: retrieval and zero-shot classes on the held-out splits, beside chance; also COCO-like captions
and ImageFolders, k-NN and a linear probe.
"""

import json
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
    """The run folder, or a folder of open_clip's with a CLIP in it."""
    text_tower: str | None = None
    """For a UTA student: the CLIP whose text tower serves it, by name or path; the one it was aligned to by default."""
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
    image_folder_train: Path | None = None
    """Pictures of the same classes from which --knn and --linear-probe learn those of --image-folder."""
    classes: str | None = None
    """Class names: `imagenet`, or a file with one a line, in the order of the sorted sub-folders; their own names by
    default."""
    templates: str | None = None
    """Prompt templates: `openai` (the 80 of CLIP), or a file with one a line, with {} where the class goes."""
    zero_shot: bool = True
    """Tell the concepts of each held-out split's captions from one another, zero-shot."""
    knn: bool = False
    """Weighted k-NN from the features of training pictures."""
    linear_probe: bool = False
    """Logistic regression on the features of training pictures."""
    label: tuple[str, ...] = ()
    """What k-NN and the probe learn of a captioned data set: `concept`, or a field of its samples' json; `concept` and
    `set` by default."""
    label_classes: int = 1000
    """Take the pictures of this many of a label's classes, the most frequent ones."""
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
    except ModuleNotFoundError as error:
        if error.name not in ("open_clip", "timm"):
            raise
        print(f"oner-fast eval: {error}", file=sys.stderr)
        return 2
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
        `zero_shot`, `knn` and `linear_probe` of an ImageFolder where asked, and `about`: what it was made with.
    """
    check_run(options.run)
    _check_probes(options)
    if (options.coco_json is None) != (options.coco_images is None):
        raise ValueError("--coco-json and --coco-images go together")
    elsewhere = options.coco_json is not None or options.image_folder is not None
    own = not elsewhere or options.data is not None
    data = find_data(options.run, options.data) if own else None

    from oner_fast.evaluation import run as steps
    from oner_fast.evaluation.coco import read_captions
    from oner_fast.evaluation.zero_shot import TEMPLATES, read_templates

    templates = read_templates(options.templates) if options.templates else list(TEMPLATES)

    asked = list(options.split)
    if data is not None:
        known = steps.held_out_splits(data)
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ValueError(f"{data} has no held-out split {unknown[0]!r}; it has {', '.join(known)}")
        asked = asked or known
    loaded = oner_fast.load(options.run, options.device, text_tower=options.text_tower)
    if not steps.has_text(loaded) and (not _probes(options) or options.coco_json is not None):
        raise ValueError(
            f"{options.run} names no text tower, so that it answers --knn and --linear-probe alone; give --text-tower"
        )
    if steps.has_text(loaded):
        steps.embed_texts(loaded, ["a picture"])  # a text tower that cannot be loaded shows before any picture is read
    evaluation: dict[str, Any] = {}
    if data is not None:
        taught = _taught(loaded, data, options)
        trained_on = data if options.data is None else _training_data(options.run, data)
        seen = steps.training_words(trained_on)
        for name in asked:
            dataset = steps.PairDataset(data, split=name)
            evaluation |= steps.evaluate_split(
                loaded,
                dataset,
                name,
                seen,
                templates=templates if options.zero_shot else (),
                taught=taught,
                probes=_probes(options),
                batch_size=options.batch_size,
                limit=options.limit,
            )
        if missing := [name for name in options.label if not any(_has(evaluation[split], name) for split in asked)]:
            raise ValueError(f"no picture of {', '.join(asked)} has a {missing[0]!r} that the train split teaches")
    if options.coco_json is not None and options.coco_images is not None:
        images = read_captions(options.coco_json, options.coco_images, split=options.coco_split)
        evaluation["coco"] = steps.evaluate_retrieval(loaded, images, batch_size=options.batch_size)
    if options.image_folder is not None:
        if steps.has_text(loaded):
            evaluation["zero_shot"] = _zero_shot(loaded, options, templates)
        if options.image_folder_train is not None:
            evaluation |= steps.evaluate_folders(
                loaded,
                options.image_folder_train,
                options.image_folder,
                _probes(options),
                batch_size=options.batch_size,
            )
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


def _probes(options: Options) -> list[str]:
    return [name for name in ("knn", "linear_probe") if getattr(options, name)]


def _check_probes(options: Options) -> None:
    probes = _probes(options)
    if options.image_folder_train is not None and (options.image_folder is None or not probes):
        raise ValueError("--image-folder-train needs --image-folder, and --knn or --linear-probe")
    if probes and options.image_folder is not None and options.image_folder_train is None and options.data is None:
        raise ValueError(
            "--knn and --linear-probe need pictures to learn those of --image-folder from: give --image-folder-train"
        )
    if options.label and not probes:
        raise ValueError("--label says what --knn and --linear-probe learn; give one of them")


def _taught(loaded: Any, data: Path, options: Options) -> dict[str, Any]:
    """The features of the train split that k-NN and the probe learn from."""
    if not _probes(options):
        return {}
    from oner_fast.data.dataset import PairDataset
    from oner_fast.evaluation.labels import LABELS, teach

    listing = data / "dataset.json"
    if not listing.is_file() or "train" not in json.loads(listing.read_text(encoding="utf-8"))["splits"]:
        raise ValueError(f"--knn and --linear-probe need a train split, and {data} has none")
    return teach(
        loaded,
        PairDataset(data, split="train"),
        options.label or LABELS,
        most=options.label_classes,
        limit=options.limit,
        batch_size=options.batch_size,
    )


def _has(entry: dict[str, Any], label: str) -> bool:
    return any(label in entry.get(probe, {}) for probe in ("knn", "linear_probe"))


def _zero_shot(loaded: Any, options: Options, templates: Sequence[str]) -> dict[str, Any]:
    from oner_fast.evaluation.run import evaluate_zero_shot
    from oner_fast.evaluation.zero_shot import read_classes

    assert options.image_folder is not None
    return evaluate_zero_shot(
        loaded,
        options.image_folder,
        classes=read_classes(options.classes) if options.classes else None,
        templates=templates,
        batch_size=options.batch_size,
    )
