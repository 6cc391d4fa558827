"""Check a CLIP that open_clip saved before open_clip opens it: nothing it names is fetched, and its sizes fit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from oner_fast import bounded_json
from oner_fast.models.clip import CONFIG, MAX_CONTEXT
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.fitting import Found
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.safetensors_header import read_header
from oner_fast.models.state_files import read_pytorch, read_safetensors, read_state, unwrapped

MAX_CONFIG = 2**20
_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_SLACK = 4  # weights of another layout or grid are converted, so that numbers of elements need not be equal


def check_folder(folder: Path) -> None:
    """Check the configuration and the weights in a folder of open_clip.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: the configuration names something to fetch or code to run, or asks for a model far larger than its
            weights; or a file is damaged or of another kind. The message names the file.
        OSError: a file cannot be read.
    """
    path = folder / CONFIG
    config = bounded_json.load_object(path.read_bytes(), str(path), max_bytes=MAX_CONFIG)
    model = config.get("model_cfg")
    if not isinstance(model, dict):
        raise ValueError(f"{path} lacks 'model_cfg', the sizes of the model")
    for tower in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(tower), dict):
            raise ValueError(f"{path} lacks {tower!r}, the sizes of a tower")
    if not isinstance(config.get("preprocess_cfg", {}), dict):
        raise ValueError(f"{path}: 'preprocess_cfg' must be an object")
    _check_local(model, path)
    weights = _weights(folder)
    found = _found(weights)
    elements, largest = _measure(found)
    problem = f"{weights} does not fit {CONFIG} beside it"
    for name, size in _integers(model):
        if size > 64 * max(largest, 1) or size < 0 or (name == "layers" and size > len(found.shapes)):
            raise ValueError(f"{problem}: it asks for {name} {size:,}")
        if name == "context_length" and size > MAX_CONTEXT:
            raise ValueError(f"{problem}: context_length is {size:,}, and at most {MAX_CONTEXT:,} is read")
    asked = _elements_of(folder, problem)
    if asked > _SLACK * elements + 2**16:
        raise ValueError(f"{problem}: the model has {asked:,} numbers, and the weights {elements:,}")


def has_part_of_hub(model: str) -> bool:
    """Whether open_clip's `model` takes its text tower or its tokenizer from a hub."""
    config = None if ":" in model else optional_package("open_clip").get_model_config(model)
    text = (config or {}).get("text_cfg", {})
    return bool(text.get("hf_model_name") or text.get("hf_tokenizer_name"))


def refuse_without_model(found: Found, path: Path) -> None:
    """Raise ValueError where a file's weights are those of a CLIP, which needs the name of its model beside it."""
    shapes = {name.removeprefix("text."): shape for name, shape in found.shapes.items()}
    if "logit_scale" not in shapes or not any(name.startswith("visual.") for name in shapes):
        return
    fitting = _models_of(shapes)
    known = f"; of its sizes are {', '.join(fitting[:6])}" if fitting else ""
    choice = ", and a name with quickgelu is another activation, which the weights do not tell" if fitting else ""
    raise ValueError(
        f"{path} holds the weights of a CLIP without its configuration; name the model of open_clip: "
        f"{path}:MODEL{known}{choice}"
    )


def _models_of(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """List the models of open_clip with plain towers of these sizes."""
    try:
        open_clip = optional_package("open_clip")
    except ModuleNotFoundError:
        return []
    words, places = shapes.get("token_embedding.weight", ()), shapes.get("positional_embedding", ())
    patches, cells = shapes.get("visual.conv1.weight", ()), shapes.get("visual.positional_embedding", ())
    if (len(words), len(places), len(patches), len(cells)) != (2, 2, 4, 2):
        return []
    depths = [
        len({name.split(".")[place] for name in shapes if name.startswith(f"{trunk}.resblocks.")})
        for trunk, place in (("visual.transformer", 3), ("transformer", 2))
    ]
    there = (patches[0], patches[-1], cells[0], depths[0], words[0], places[0], words[1], depths[1])

    def sizes(config: dict[str, Any]) -> tuple[Any, ...]:
        vision, text = config["vision_cfg"], config["text_cfg"]
        side, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
        grid = 1 + (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else 0
        return (
            vision.get("width", 768), patch, grid, vision.get("layers", 12), text.get("vocab_size", 49408),
            text.get("context_length", 77), text.get("width", 512), text.get("layers", 12),
        )  # fmt: skip

    return [name for name in open_clip.list_models() if sizes(open_clip.get_model_config(name)) == there]


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[Path]:
    """Give a file with the weights of `path` under plain names, which open_clip and timm load: mostly `path` itself.

    A checkpoint that wraps its weights, or whose names carry prefixes, is written to a temporary safetensors file.

    Raises as `oner_fast.models.state_files.read_state`.
    """
    if file_kind(path) == "safetensors" and path.suffix == ".safetensors":
        given: dict[str, Any] = dict.fromkeys(read_header(path).tensors)
        plain = given.keys() == unwrapped(_names_only(given), str(path)).keys() if given else True
    else:
        given = read_safetensors(path) if file_kind(path) == "safetensors" else read_pytorch(path)
        plain = path.suffix in (".pt", ".pth", ".bin") and given.keys() == unwrapped(given, str(path)).keys()
    if plain:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in read_state(path).items()}, copy)
        yield copy


def _names_only(names: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) for name in names}


def _check_local(model: dict[str, Any], path: Path) -> None:
    """Raise ValueError where the configuration names a model of a hub, or code."""
    text, vision = model["text_cfg"], model["vision_cfg"]
    fetched = text.get("hf_model_name")
    trunk = vision.get("timm_model_name")
    if not fetched and isinstance(trunk, str) and (":" in trunk or "/" in trunk):
        fetched = trunk
    if fetched:
        raise ValueError(
            f"{path} names {str(fetched)[:80]!r}, which would be fetched from a hub, and a file makes this library "
            "fetch nothing; ask for the whole model by its own name: hf-hub:OWNER/NAME, or MODEL:TAG of open_clip"
        )
    check_no_code(model, str(path))


def check_no_code(model: Any, name: str) -> None:
    """Raise ValueError, which starts with `name`, where an open_clip configuration asks to run code of a tokenizer."""
    text = model.get("text_cfg") if isinstance(model, dict) else None
    options = text.get("tokenizer_kwargs") if isinstance(text, dict) else None
    if isinstance(options, dict) and "trust_remote_code" in options:
        raise ValueError(f"{name} asks to run code of its tokenizer (trust_remote_code), and no code of a file is run")


def _weights(folder: Path) -> Path:
    """Find the weights that open_clip would choose."""
    there = sorted(path for pattern in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(pattern))
    if not there:
        raise FileNotFoundError(f"{folder} holds {CONFIG} but no weights (open_clip_model.safetensors)")
    names = {path.name: path for path in there}
    if (known := next((name for name in _WEIGHTS if name in names), None)) is not None:
        return names[known]
    return next((path for path in there if path.suffix == ".safetensors"), there[0])


def _found(weights: Path) -> Found:
    kind = file_kind(weights)
    if (kind == "safetensors") != (weights.suffix == ".safetensors"):
        raise ValueError(f"{weights} is a {kind} file by its content; rename it so that its suffix says so")
    return Found.in_header(read_header(weights)) if kind == "safetensors" else Found.in_state(read_state(weights))


def _measure(found: Found) -> tuple[int, int]:
    """Count the numbers in all weights, and find the largest size."""
    elements = 0
    for shape in found.shapes.values():
        product = 1
        for size in shape:
            product *= size
        elements += product
    return elements, max((size for shape in found.shapes.values() for size in shape), default=0)


def _integers(values: Any) -> Iterator[tuple[str, int]]:
    """Yield every whole number of a configuration with its key."""
    items = list(values.items()) if isinstance(values, dict) else []
    while items:
        key, value = items.pop()
        if isinstance(value, dict):
            items += value.items()
        elif isinstance(value, list):
            items += [(key, each) for each in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _elements_of(folder: Path, problem: str) -> int:
    """Count the numbers of the model that the configuration asks for, on the meta device."""
    open_clip = optional_package("open_clip")
    try:
        with torch.device("meta"):
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="meta")
    except Exception as error:  # open_clip passes the values on unchecked, so that they may fail anywhere
        if isinstance(error, MemoryError | ImportError):
            raise
        raise ValueError(f"{problem}: no model has these sizes ({str(error).splitlines()[0][:200]})") from error
    return sum(tensor.numel() for tensor in model.state_dict().values())
