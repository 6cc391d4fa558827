"""The explorer as one self-contained HTML file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from oner_fast.explorer.library import Library
from oner_fast.explorer.model_weights import StoredWeights
from oner_fast.explorer.runtime import LICENCE, VERSION, Runtime
from oner_fast.export.onnx_graph import WEIGHTS

HERE = Path(__file__).parent
SCRIPTS = ("tokenizer.js", "numbers.js", "pixels.js", "engine.js", "app.js")
EXAMPLES = 6


def render(
    library: Library,
    runtime: Runtime,
    graphs: dict[str, bytes],
    model: StoredWeights,
    config: dict[str, Any],
    tokenizer: str,
    about: dict[str, Any],
) -> str:
    """Write the page.

    Args:
        library: the pictures.
        runtime: onnxruntime-web.
        graphs: the model's ONNX graphs by name.
        model: its weights.
        config: sizes of the tower.
        tokenizer: the JSON of the tokenizer.
        about: `name`, `data`, `millions` (of parameters), `figures` and `credits`, for the text of the page.
    """
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Pictures and names come from elsewhere. Only this script may run, it may fetch nothing, and it starts no other one
    # but onnxruntime's, which it makes from its own payload.
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}' blob: 'wasm-unsafe-eval'; img-src data:; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    settings = json.loads(tokenizer)
    known = {
        "pictures": library.pictures,
        "graphs": {name: base64.b64encode(graph).decode() for name, graph in graphs.items()},
        "weights_path": WEIGHTS,
        "weights_bytes": model.number_bytes,
        "config": config,
        "tokenizer": {name: settings.get(name) for name in ("model", "normalizer")},
    }
    payloads = {
        "about": json.dumps(known, ensure_ascii=False).replace("<", "\\u003c"),
        "runtime": _packed(runtime.script),
        "wasm": _packed(runtime.wasm),
        "weights": _packed(model.content, model.number_bytes),
        "embeddings": _packed(library.embeddings.astype("<f4").tobytes(), 4),
        "pixels": _packed(library.pixels.tobytes()),
    }
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template("template.html.j2").render(
        about,
        policy=policy,
        script=script,
        payloads=payloads,
        pictures=len(library.pictures),
        examples=_examples([picture["caption"] for picture in library.pictures]),
        runtime_version=VERSION,
        runtime_licence=LICENCE,
    )


def _packed(content: bytes, number_bytes: int = 1) -> str:
    """Compress numbers of `number_bytes` bytes; the same bytes give the same text.

    First come the first bytes of all numbers, then the second ones, and so on: the exponents are alike.
    """
    planes = np.frombuffer(content, np.uint8).reshape(-1, number_bytes).T.tobytes()
    return base64.b64encode(gzip.compress(planes, 9, mtime=0)).decode()


def _examples(captions: list[str]) -> list[str]:
    """Captions of one or two words to begin with, evenly spaced."""
    short = (
        list(dict.fromkeys(caption for caption in captions if 1 <= len(caption.split()) <= 2)) or captions[:EXAMPLES]
    )
    return [short[number * len(short) // EXAMPLES] for number in range(min(EXAMPLES, len(short)))]
