"""Evaluate a trained run on data.

A held-out split is evaluated as a whole and in two parts: captions of known words only, and captions with a word that
no training caption has. Image files with captions are evaluated by retrieval. Classes of a split or of an ImageFolder
are predicted zero-shot, or learnt from frozen features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from oner_fast.data.dataset import PairDataset
from oner_fast.data.splits import open_split, splits_of
from oner_fast.evaluation.coco import CaptionedImage
from oner_fast.evaluation.composed import composed_queries
from oner_fast.evaluation.embed import (
    Encoder,
    JointEncoder,
    SplitEmbeddings,
    embed_captioned,
    embed_files,
    embed_split,
    embed_texts,
)
from oner_fast.evaluation.equal_captions import equal_caption_figures
from oner_fast.evaluation.fusion import composed_figures, probe_captions, word_shifts
from oner_fast.evaluation.labels import CONCEPT, Taught, ask
from oner_fast.evaluation.modality_gap import modality_gap, spread
from oner_fast.evaluation.retrieval import Ties, retrieval
from oner_fast.evaluation.sharing import gathered, mine
from oner_fast.evaluation.spaces import SpacesEncoder, class_figures, space_figures
from oner_fast.evaluation.splits import split_by_words, vocabulary
from oner_fast.evaluation.zero_shot import (
    TEMPLATES,
    Template,
    accuracy,
    class_embeddings,
    concept_accuracy,
    concept_classes,
    only_classes,
    read_image_folder,
)


def held_out_splits(data: str, unnamed: str) -> list[str]:
    """List the splits of a data set other than `train`.

    Args:
        data: a folder, a tar, a glob or a brace pattern of tars.
        unnamed: the name of the only split of data that name none: "train" for those of a training, "val" for others.

    Raises:
        ValueError: the data have no split to evaluate on.
    """
    splits = [name for name in splits_of(data, unnamed) if name != "train"]
    if not splits:
        raise ValueError(
            f"{data} has only a train split, so nothing is held out; give other data with --data, or evaluate on the "
            "training images themselves with --split train"
        )
    return splits


def training_words(data: str) -> set[str] | None:
    """Every word of the training captions of a data set, or None where it has no train split."""
    if "train" not in splits_of(data):
        return None
    return vocabulary(open_split(data, "train").captions())


def training_probes(data: str) -> list[str]:
    """Draw training captions of a data set for `fusion.word_shifts`; none where it has no train split."""
    return probe_captions(open_split(data, "train").captions()) if "train" in splits_of(data) else []


def evaluate_split(
    loaded: Encoder,
    dataset: PairDataset,
    name: str,
    seen: set[str] | None,
    *,
    templates: Sequence[str] = (),
    taught: Mapping[str, Taught] | None = None,
    probes: Sequence[str] = (),
    batch_size: int = 64,
    limit: int | None = None,
    ties: Ties = "miss",
    probes_of_words: Sequence[str] = (),
    spaces: SpacesEncoder | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate one split: as a whole, and separately for captions without and with a word that is new.

    The two parts have fewer queries, but their gallery is the whole split, so that the figures can be compared.

    Args:
        loaded: the model.
        dataset: the split.
        name: the split's name in the results.
        seen: the words of training captions; None leaves out the two parts.
        templates: prompts for classifying by the split's concepts zero-shot; left out where empty.
        taught: for each label, features of training images; a label that no image of this split has is left out.
        probes: the classifiers to fit to these features: `knn`, `linear_probe`.
        batch_size: images embedded at once.
        limit: evaluate only this many samples, evenly spaced.
        ties: how equal scores count, as for `retrieval.retrieval` and `zero_shot.accuracy`.
        probes_of_words: training captions, by which the shift of a word is known (`fusion.word_shifts`).
        spaces: the spaces to report besides, under `spaces` of each entry.
    """
    reads = has_text(loaded)
    wide = embedded = embed_split(
        spaces or loaded, dataset, label=name, batch_size=batch_size, limit=limit, texts=reads
    )
    if spaces is not None:
        embedded = spaces.in_projection(wide)
    if reads:
        entry = _entry(embedded, wide, spaces, ties=ties)
    else:
        entry = {"pairs": len(embedded.image), "damaged": len(embedded.damaged)}
    if reads and has_joint_pass(loaded):
        entry |= _composed(cast(JointEncoder, loaded), dataset, embedded, probes_of_words)
    if reads and templates:
        entry["zero_shot"], others = evaluate_concepts(
            loaded, wide, templates, batch_size=batch_size, spaces=spaces, ties=ties
        )
        for space, figures in others.items():
            entry["spaces"][space]["zero_shot"] = figures
    asked = {label: ask(learnt, label, embedded) for label, learnt in (taught or {}).items()}
    for probe in probes:
        entry[probe] = {
            label: getattr(learnt, probe)(*asked[label], ties)
            for label, learnt in (taught or {}).items()
            if len(asked[label][0])
        }
    entries = {name: entry}
    if reads and seen is not None:
        texts = embedded.gallery.texts
        for part, rows in zip(("seen_words", "new_words"), split_by_words(texts, seen), strict=True):
            if rows:
                entries[f"{name}_{part}"] = _entry(embedded, wide, spaces, rows, ties=ties)
    return entries


def has_text(loaded: Any) -> bool:
    """Whether the model reads text; a student without its teacher's text tower does not."""
    return bool(getattr(loaded, "has_text", True))


def has_joint_pass(loaded: Any) -> bool:
    """Whether the model reads an image and words in one pass; two trunks and two towers do not."""
    return hasattr(loaded, "encode_image_text") and bool(getattr(getattr(loaded, "config", None), "shared_trunk", True))


def evaluate_retrieval(
    loaded: Encoder,
    images: Sequence[CaptionedImage],
    *,
    batch_size: int,
    ties: Ties = "miss",
    spaces: SpacesEncoder | None = None,
) -> dict[str, Any]:
    """Evaluate retrieval among image files with several captions each (COCO's protocol).

    Each caption matches its own image alone. `equal_captions` says what that costs, and `captions_left_out` counts the
    captions that the images have beyond those evaluated.
    """
    wide = embedded = embed_captioned(spaces or loaded, images, batch_size=batch_size)
    if spaces is not None:
        embedded = spaces.in_projection(wide)
    return _entry(embedded, wide, spaces, ties=ties) | {
        "equal_captions": equal_caption_figures(embedded.image, embedded.text, embedded.captions, ties=ties),
        "captions_left_out": sum(one.left_out for one in images),
    }


def evaluate_concepts(
    loaded: Encoder,
    embedded: SplitEmbeddings,
    templates: Sequence[Template] = TEMPLATES,
    *,
    batch_size: int = 64,
    spaces: SpacesEncoder | None = None,
    ties: Ties = "miss",
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compute zero-shot accuracy among the concepts of a split's captions; captions of equal images count as right.

    Returns:
        The figures, and those of each of `spaces`, whose encoder then made the embeddings.
    """
    shown = concept_classes(
        [[*own, *meta.get("also", [])] for own, meta in zip(embedded.captions, embedded.meta, strict=True)],
        [meta.get(CONCEPT) for meta in embedded.meta],
    )
    described = _describe(spaces or loaded, shown.described, templates, batch_size)
    return _classified(
        embedded.image,
        described,
        spaces,
        lambda image, classes: concept_accuracy(image, classes, shown, ties=ties) | {"templates": len(templates)},
    )


def _classified(
    image: torch.Tensor,
    classes: torch.Tensor,
    spaces: SpacesEncoder | None,
    figures: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compute the figures of (N, E) images among (C, E) classes, in the projection and in each of the spaces."""
    if spaces is None:
        return figures(image, classes), {}
    main = figures(spaces.columns(image)["projection"], spaces.columns(classes)["projection"])
    return main, class_figures(spaces, image, classes, figures)


def evaluate_folders(
    loaded: Encoder, train: Path, test: Path, probes: Sequence[str], *, batch_size: int = 64, ties: Ties = "miss"
) -> dict[str, dict[str, Any]]:
    """Let `probes` (`knn`, `linear_probe`) learn from one ImageFolder and predict another; returns an entry for each.

    Raises:
        ValueError: `test` has a class that `train` lacks.
    """
    files, labels, names = read_image_folder(train)
    asked_files, asked_labels, asked_names = read_image_folder(test)
    if unknown := [name for name in asked_names if name not in names]:
        raise ValueError(f"{test} has the class {unknown[0]!r}, which {train} lacks")
    image, kept, lost = embed_files(loaded, files, batch_size=batch_size)
    taught = Taught(names, image, labels[kept])
    image, kept, damaged = embed_files(loaded, asked_files, batch_size=batch_size)
    numbers = torch.tensor([names.index(name) for name in asked_names])[asked_labels[kept]]
    left_out = {"damaged": len(damaged), "damaged_training": len(lost)}
    return {probe: getattr(taught, probe)(image, numbers, ties) | left_out for probe in probes}


def _describe(loaded: Encoder, names: Sequence[str], templates: Sequence[Template], batch_size: int) -> torch.Tensor:
    """Embed classes: (C, E). The prompts are embedded in batches of their own, with progress shown."""
    return class_embeddings(
        lambda prompts: embed_texts(loaded, prompts, batch_size=batch_size), names, templates, batch_size=1 << 20
    )


def evaluate_zero_shot(
    loaded: Encoder,
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    places: Sequence[int] | None = None,
    templates: Sequence[Template] = TEMPLATES,
    batch_size: int = 64,
    spaces: SpacesEncoder | None = None,
    ties: Ties = "miss",
) -> dict[str, Any]:
    """Compute zero-shot accuracy on an ImageFolder.

    Args:
        loaded: the model.
        folder: the ImageFolder.
        classes: a name for each sub-folder, in their sorted order; the sub-folders' own names by default.
        places: places of the classes among all of a larger set, from whose folder the other classes are then left out,
            such as those of ImageNet-A from ImageNet's validation images.
        templates: prompts, in any form of `zero_shot.Template`.
        batch_size: images embedded at once.
        spaces: the spaces to report besides, under `spaces`.
        ties: how equal scores count, as for `zero_shot.accuracy`.
    """
    files, labels, folders = read_image_folder(folder)
    if places is not None and len(folders) > max(len(places), *places):
        files, labels, folders = only_classes(files, labels, folders, places)
    names = list(classes) if classes is not None else [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise ValueError(f"{folder} has {len(folders)} sub-folders but {len(names)} class names were given")
    described = _describe(spaces or loaded, names, templates, batch_size)
    image, kept, damaged = embed_files(spaces or loaded, files, batch_size=batch_size)
    beside = {"templates": len(templates), "damaged": len(damaged)}
    main, others = _classified(
        image, described, spaces, lambda rows, classes: accuracy(rows, labels[kept], classes, ties=ties) | beside
    )
    return main | ({"spaces": others} if others else {})


def _entry(
    embedded: SplitEmbeddings,
    wide: SplitEmbeddings,
    spaces: SpacesEncoder | None,
    text_rows: list[int] | None = None,
    *,
    ties: Ties = "miss",
) -> dict[str, Any]:
    """Compute the figures of a split, or of the part that the given captions and their images form.

    `wide` holds the same embeddings as `embedded` in all of `spaces`.
    """
    matches = embedded.gallery.matches
    image_rows = asked = None
    image, text = embedded.image, embedded.text
    if text_rows is not None:
        asked = torch.tensor(text_rows, dtype=torch.int64)
        image_rows = torch.unique(matches.image[torch.isin(matches.text, asked)])
        scores = retrieval(image, text, matches, image_queries=image_rows, text_queries=asked, ties=ties)
        image, text = image[image_rows], text[asked]
    else:
        scores = retrieval(image, text, matches, ties=ties)
    others = {}
    if spaces is not None:
        others = space_figures(spaces, wide, image_rows=image_rows, text_rows=asked, ties=ties)
    return {
        "pairs": len(image),
        "captions": len(text),
        **scores,
        "ties": ties,
        "modality_gap": modality_gap(image, text),
        "spread": {"image": spread(image), "text": spread(text)},
        "damaged": len(embedded.damaged),
        **({"spaces": others} if others else {}),
    }


def _composed(
    loaded: JointEncoder, dataset: PairDataset, embedded: SplitEmbeddings, probes: Sequence[str]
) -> dict[str, Any]:
    """Compute the figures of queries with an image and a word, of either alone, and of ways to fuse them."""
    queries = composed_queries([several[0] for several in embedded.captions])
    if not queries:
        return {}
    both = embed_composed(loaded, dataset, embedded, [(one.image, one.word) for one in queries])
    word = embed_texts(loaded, [one.word for one in queries])
    picture = embedded.image[[one.image for one in queries]]
    asked_for = [" ".join(map(str, one.targets)) for one in queries]
    shift = word_shifts(loaded, [one.word for one in queries], probes)
    figures = composed_figures(picture, word, both, embedded.image, queries, asked_for, shift)
    return {"image_text_to_image": figures}


def embed_composed(
    loaded: JointEncoder, dataset: PairDataset, embedded: SplitEmbeddings, queries: Sequence[tuple[int, str]]
) -> torch.Tensor:
    """Embed (row of the split, words) queries by F(I,T): (Q, E) float32."""
    from oner_fast.data.images import decode

    parts = []
    batches = math.ceil(len(queries) / 64)
    with torch.inference_mode():
        for number in mine(batches):
            chunk = queries[number * 64 : (number + 1) * 64]
            asked = [embedded.rows[row] for row, _ in chunk]
            pictures = [loaded.preprocess(decode(dataset.picture(row), dataset.name(row))) for row in asked]
            parts.append(loaded.encode_image_text(torch.stack(pictures), [word for _, word in chunk]).float().cpu())
    return torch.cat(gathered(parts, batches))
