"""`oner-fast eval RUN`: retrieval and zero-shot classification on the held-out splits, with chance.

It also evaluates captions in COCO's format, pictures with boxes, and ImageFolders, by k-NN and a linear probe.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import oner_fast
from oner_fast.atomic import remove_leftovers
from oner_fast.boundary import guarded
from oner_fast.data.dataset import PairDataset
from oner_fast.data.splits import open_split, splits_of
from oner_fast.evaluation.boxes import read_boxes, read_scenes
from oner_fast.evaluation.coco import CAPTIONS, read_captions
from oner_fast.evaluation.embed import embed_texts
from oner_fast.evaluation.folder import (
    check_run,
    find_data,
    find_training_data,
    processor,
    read_config,
    recipe_of,
    refuse_training_pairs,
    unnamed_split,
)
from oner_fast.evaluation.imagenet import SUBSETS
from oner_fast.evaluation.labels import LABELS, teach
from oner_fast.evaluation.pointing import evaluate_localisation
from oner_fast.evaluation.record import FILE, add, model_digest
from oner_fast.evaluation.retrieval import Ties
from oner_fast.evaluation.run import (
    evaluate_folders,
    evaluate_retrieval,
    evaluate_split,
    evaluate_zero_shot,
    has_joint_pass,
    has_text,
    held_out_splits,
    training_probes,
    training_words,
)
from oner_fast.evaluation.scene_scores import evaluate_scenes
from oner_fast.evaluation.score_lines import score_lines
from oner_fast.evaluation.sharing import shared
from oner_fast.evaluation.spaces import SpacesEncoder, open_spaces
from oner_fast.evaluation.table import show
from oner_fast.evaluation.zero_shot import TEMPLATES, read_classes, read_templates
from oner_fast.process_group import World, on_main, setup, shutdown

logger = logging.getLogger("oner_fast.evaluation")


@dataclass(frozen=True)
class Options:
    """Evaluate a trained run, write RUN/evaluation.json and print its figures with those of chance."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, or a folder of open_clip with a CLIP."""
    text_tower: str | None = None
    """For a UTA student: the CLIP that embeds texts, by name or path; the one it was aligned to by default."""
    data: str | None = None
    """Data to evaluate on, in any form that --train-data takes: a folder, a tar, a glob or a brace pattern of tars, or
    several with :: between them; the run's own by default."""
    split: tuple[str, ...] = ()
    """Splits to evaluate, `train` among them where you ask for it; all but `train` by default."""
    coco_json: Path | None = None
    """Captions of images: Karpathy's json or COCO's captions json; needs --coco-images."""
    coco_images: Path | None = None
    """Folder of the images that --coco-json names."""
    coco_split: str = "test"
    """Split of Karpathy's json."""
    coco_captions: int = CAPTIONS
    """Captions of each image in --coco-json that are evaluated, the first ones; 0: all."""
    ties: Ties = "miss"
    """Rule for equal scores in retrieval, zero-shot and probes: `miss`, a wrong item comes first; `topk`, as torch.topk
    orders them in clip_benchmark and open_clip."""
    boxes: str | None = None
    """Pictures whose phrases have boxes, for localisation: a data set of `oner-fast data scenes`, which is evaluated by
    guided answers and composed queries too, or json in RefCOCO's or Flickr30k Entities' form; needs --boxes-images."""
    boxes_images: Path | None = None
    """Folder of the images that the json of --boxes names."""
    boxes_split: str = "val"
    """Split of --boxes."""
    image_folder: Path | None = None
    """Images for zero-shot classification: FOLDER/class/image.jpg."""
    image_folder_train: Path | None = None
    """Training images of the same classes as --image-folder, for --knn and --linear-probe."""
    classes: str | None = None
    """Class names: `imagenet`, `imagenet-a`, `imagenet-r` (200 classes, also of ImageNet's own images),
    or a file with a name a line, in the order of the sorted sub-folders; the sub-folders' names by default."""
    templates: str | None = None
    """Prompt templates: `openai` (the 80 of CLIP), `slip` (the 7 of SLIP), or a file with one a line; {} stands for the
    class."""
    zero_shot: bool = True
    """Classify the images of each held-out split by the concepts of its captions, zero-shot."""
    knn: bool = False
    """Evaluate weighted k-NN on the features of training images."""
    linear_probe: bool = False
    """Evaluate logistic regression on the features of training images."""
    label: tuple[str, ...] = ()
    """Label that k-NN and the probe predict on a captioned data set: `concept`, or a field of its samples' json;
    `concept` and `set` by default.
    """
    label_classes: int = 1000
    """Keep this many classes of each label, the most frequent ones."""
    space: tuple[str, ...] = ()
    """Spaces to report besides the main figures, which are those of the projection: backbone, projection, predictor,
    teacher, max; all that the run has by default."""
    batch_size: int = 64
    """Number of images embedded at once."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1, ...; under torchrun, cuda means the GPU of the local rank."""
    limit: int | None = None
    """Evaluate only this many samples of each split, evenly spaced."""


_NEEDED = {
    "boxes_split": "boxes",
    "coco_split": "coco_json",
    "coco_captions": "coco_json",
    "classes": "image_folder",
}
"""Options that mean nothing without another one."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them."""
    return guarded("oner-fast eval", lambda: _run(argv), extra="train", interrupted="interrupted; nothing was written")


def _run(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=list(argv), prog="oner-fast eval")
    world = setup(options.device)
    try:
        evaluation, aside = evaluate(options, world)
    finally:
        shutdown()
    if not world.is_main:
        return 0
    show(evaluation)
    for line in score_lines(evaluation):
        print(line)
    if aside is not None:
        print(f"the figures of an earlier model are kept in {aside}")
    print(f"wrote {options.run / FILE}")
    return 0


def evaluate(options: Options, world: World | None = None) -> tuple[dict[str, Any], Path | None]:
    """Evaluate as the options say and add the figures to RUN/evaluation.json.

    Args:
        options: the options of the command.
        world: the ranks that share the work, each of which calls this; by default this process does all of it.

    Returns:
        First an entry for each split (`data`, `pairs`, `image_to_text`, `text_to_image`, `modality_gap`, ...), for
        `coco`, for `SPLIT_boxes`, and for `zero_shot`, `knn` and `linear_probe` of an ImageFolder where asked; `about`
        lists the model, versions and machine behind them. Second the path to which figures of an earlier model were
        moved, if any.

    Raises:
        FileNotFoundError: a run, its data or a file is missing.
        ValueError: options do not fit each other, the data or the model.
    """
    world = world or World(0, 1, 0, torch.device(options.device))
    check_run(options.run)
    _check_options(options)
    on_main(world, lambda: remove_leftovers(options.run))
    with shared(world):
        evaluation, about = _figures(options, world)
    return on_main(world, lambda: add(options.run, evaluation, about))


def _figures(options: Options, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the figures, and what holds for all of them."""
    data = _data(options)
    templates = read_templates(options.templates) if options.templates else list(TEMPLATES)
    splits = {} if data is None else _open_splits(options, data)
    loaded = _load(options, str(world.device))
    spaces, missing = open_spaces(options.run, loaded, options.space)
    if missing is not None and world.is_main:
        logger.warning("%s", missing)
    evaluation: dict[str, Any] = {}
    if data is not None:
        evaluation |= _splits(loaded, data, splits, templates, options, spaces)
    if options.coco_json is not None and options.coco_images is not None:
        images = read_captions(
            options.coco_json, options.coco_images, split=options.coco_split, first=options.coco_captions
        )
        figures = evaluate_retrieval(loaded, images, batch_size=options.batch_size, ties=options.ties, spaces=spaces)
        evaluation["coco"] = {"data": str(options.coco_json), "split": options.coco_split, **figures}
    if options.boxes is not None:
        figures = _boxes(loaded, options.boxes, templates, options)
        evaluation[f"{options.boxes_split}_boxes"] = {"data": options.boxes, "split": options.boxes_split, **figures}
    if options.image_folder is not None:
        found = _image_folder(loaded, options.image_folder, templates, options, spaces)
        evaluation |= {name: {"data": str(options.image_folder), **entry} for name, entry in found.items()}
    about = {
        "model": model_digest(options.run),
        "recipe": recipe_of(read_config(options.run)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    return evaluation, about


def _data(options: Options) -> str | None:
    """Find the data set to evaluate on; None where only captions, boxes or an ImageFolder were given."""
    elsewhere = any(one is not None for one in (options.coco_json, options.image_folder, options.boxes))
    if elsewhere and options.data is None:
        return None
    return find_data(options.run, options.data)


def _open_splits(options: Options, data: str) -> dict[str, PairDataset]:
    """Open the splits that were asked for, or every held-out split; only "train" may hold pairs of the training.

    Data that --data names and that are the training's own are evaluated as "train", with a warning.
    """
    unnamed = unnamed_split(options.run, data)
    known = splits_of(data, unnamed)
    names = list(options.split)
    if not names and options.data is not None and unnamed == "train" and list(known) == ["train"]:
        logger.warning("%s was trained on %s: the figures of training pairs, none held out", options.run, data)
        names = ["train"]
    names = names or held_out_splits(data, unnamed)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{data} has no split {unknown[0]!r}; it has {', '.join(known)}")
    opened = {name: open_split(data, name, unnamed) for name in names}
    for name, dataset in opened.items():
        if name != "train":
            refuse_training_pairs(options.run, dataset)
    return opened


def _load(options: Options, device: str) -> Any:
    """Load the model, and its text tower where it names one."""
    loaded = oner_fast.load(options.run, device, text_tower=options.text_tower)
    if has_text(loaded):
        embed_texts(loaded, ["a picture"])  # a text tower that cannot be loaded fails here, before any image is read
    elif not _probes(options) or options.coco_json is not None or options.boxes is not None:
        raise ValueError(
            f"{options.run} names no text tower, so only --knn and --linear-probe can evaluate it; give --text-tower"
        )
    return loaded


def _splits(
    loaded: Any,
    data: str,
    splits: dict[str, PairDataset],
    templates: Sequence[str],
    options: Options,
    spaces: SpacesEncoder | None,
) -> dict[str, Any]:
    """Evaluate each split and its parts."""
    taught = _taught(loaded, data, options)
    seen = training_words(training := _training_data(options.run, data))
    words = training_probes(training)
    entries: dict[str, Any] = {}
    for name, dataset in splits.items():
        figures = evaluate_split(
            loaded,
            dataset,
            name,
            seen,
            templates=templates if options.zero_shot else (),
            taught=taught,
            probes=_probes(options),
            batch_size=options.batch_size,
            limit=options.limit,
            spaces=spaces,
            ties=options.ties,
            probes_of_words=words,
        )
        entries |= {part: {"data": data, "split": name, **entry} for part, entry in figures.items()}
    if missing := [name for name in options.label if not any(_has(entries[split], name) for split in splits)]:
        raise ValueError(f"no image of {', '.join(splits)} has a {missing[0]!r} that occurs in the train split")
    return entries


def _image_folder(
    loaded: Any, folder: Path, templates: Sequence[str], options: Options, spaces: SpacesEncoder | None
) -> dict[str, Any]:
    """Evaluate an ImageFolder: zero-shot where the model reads text, and by the probes that were asked for."""
    entries: dict[str, Any] = {}
    if has_text(loaded):
        entries["zero_shot"] = evaluate_zero_shot(
            loaded,
            folder,
            classes=read_classes(options.classes) if options.classes else None,
            places=SUBSETS.get(options.classes or ""),
            templates=templates,
            batch_size=options.batch_size,
            spaces=spaces,
            ties=options.ties,
        )
    if options.image_folder_train is not None:
        entries |= evaluate_folders(
            loaded,
            options.image_folder_train,
            folder,
            _probes(options),
            batch_size=options.batch_size,
            ties=options.ties,
        )
    return entries


def _boxes(loaded: Any, boxes: str, templates: Sequence[str], options: Options) -> dict[str, Any]:
    """Evaluate on pictures whose phrases have boxes: json with its images, or a data set of scenes."""
    if options.boxes_images is not None:
        pictures = read_boxes(Path(boxes), options.boxes_images, split=options.boxes_split)
        return {"localisation": evaluate_localisation(loaded, pictures, batch_size=options.batch_size)}
    name = options.boxes_split
    if name not in (known := splits_of(boxes, name)):
        raise ValueError(f"{boxes} has no split {name!r}; it has {', '.join(known)}")
    dataset = open_split(boxes, name, name)
    if name != "train":
        refuse_training_pairs(options.run, dataset)
    return evaluate_scenes(
        loaded,
        read_scenes(dataset),
        joint=has_joint_pass(loaded),
        templates=templates,
        probes=training_probes(_training_data(options.run, boxes)),
        batch_size=options.batch_size,
    )


def _training_data(run: Path, other: str) -> str:
    """Find the data set whose training captions decide which words are known: the run's, or else the given one."""
    try:
        return find_training_data(run)
    except FileNotFoundError:
        return other


def _probes(options: Options) -> list[str]:
    return [name for name in ("knn", "linear_probe") if getattr(options, name)]


def _check_options(options: Options) -> None:
    """Raise ValueError where one option needs another."""
    probes = _probes(options)
    if options.image_folder_train is not None and (options.image_folder is None or not probes):
        raise ValueError("--image-folder-train needs --image-folder, and --knn or --linear-probe")
    if probes and options.image_folder is not None and options.image_folder_train is None and options.data is None:
        raise ValueError(
            "--knn and --linear-probe need images to learn the classes of --image-folder: give --image-folder-train"
        )
    if options.label and not probes:
        raise ValueError("--label names what --knn and --linear-probe learn; give one of them too")
    if options.boxes_images is not None and options.boxes is None:
        raise ValueError("--boxes-images needs --boxes, the json that names its images")
    if options.boxes is not None and options.boxes_images is None and options.boxes.endswith(".json"):
        raise ValueError("--boxes takes a json with --boxes-images, the folder of the images that it names")
    if options.boxes == "":
        raise ValueError("--boxes is empty; give a data set of `oner-fast data scenes` or a json, or leave it out")
    if options.boxes is not None and options.boxes_images is not None and Path(options.boxes).is_dir():
        raise ValueError(
            f"--boxes-images goes with a json in --boxes, and {options.boxes} is a folder; leave it out for scenes"
        )
    if (options.coco_json is None) != (options.coco_images is None):
        raise ValueError("--coco-json and --coco-images go together")
    for name, needed in _NEEDED.items():
        if getattr(options, name) != getattr(Options, name) and getattr(options, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}, which it is about")


def _taught(loaded: Any, data: str, options: Options) -> dict[str, Any]:
    """Embed the training images to which k-NN and the linear probe are fitted."""
    if not _probes(options):
        return {}
    if "train" not in splits_of(data, unnamed="val"):
        raise ValueError(f"--knn and --linear-probe need a train split, and {data} has none")
    return teach(
        loaded,
        open_split(data, "train", "val"),
        options.label or LABELS,
        most=options.label_classes,
        limit=options.limit,
        batch_size=options.batch_size,
    )


def _has(entry: dict[str, Any], label: str) -> bool:
    return any(label in entry.get(probe, {}) for probe in ("knn", "linear_probe"))
