"""The page in a headless Chromium gives what `oner_fast.load` gives, from a disk, without a network."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import statistics
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import oner_fast
from oner_fast.data.splits import open_split
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.evaluation.localisation import heat_map, patch_scores
from oner_fast.explorer import cli
from oner_fast.explorer import runtime as runtime_module
from oner_fast.explorer.cli import Options, explore, main
from oner_fast.explorer.runtime import Runtime, find_runtime
from oner_fast.models.files import save_model
from oner_fast.models.oner import OneR, OneRConfig

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (oner_fast[export])")
pytest.importorskip("jinja2", reason="jinja2 is not installed (oner_fast[export])")

WORDS = ["arrow", "up", "down", "left", "red", "blue", "big", "small", "cat", "dog", "heart", "bold", "sun", "moon"]
PICTURES = 60
HOSTILE = "cat </script><img src=x onerror=document.title='gone'>"
STYLE = (Path(cli.__file__).parent / "style.css").read_text()


def caption(number: int) -> str:
    return HOSTILE if number == 7 else " ".join(random.Random(number).sample(WORDS, 1 + number % 3))


def make_run(folder: Path, **changes: Any) -> Path:
    """A run of a small tower with random weights, and its data."""
    data = folder / "data"
    data.mkdir(parents=True)
    with tarfile.open(data / "val-000000.tar", "w") as tar:
        for number in range(PICTURES):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4 + number % 2, 3), dtype=np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).resize((40, 32 + number % 9), Image.Resampling.NEAREST).save(out, "png")
            for suffix, content in (("png", out.getvalue()), ("txt", caption(number).encode()), ("json", b"{}")):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    splits = {"val": {"samples": PICTURES, "shards": [{"file": "val-000000.tar", "samples": PICTURES}]}}
    credit = {"title": "Drawn", "author": "A <b>", "licence": "MIT", "url": "javascript:alert(1)", "samples": 9}
    listing = {"name": "tiny", "format": 1, "splits": splits, "attribution": [credit]}
    (data / "dataset.json").write_text(json.dumps(listing))
    tokenizer = Tokenizer.train([*map(caption, range(400)), *(word + "s été" for word in WORDS)], 300)
    torch.manual_seed(7)  # to the texts of the tests, no two of its nearest pictures are within 1e-5
    sizes = {"width": 64, "depth": 2, "heads": 4, "max_text_tokens": 16, "embed_dim": 32, "projector_hidden": 48}
    config = OneRConfig(image_size=32, patch_size=8, vocab_size=tokenizer.vocab_size, **sizes | changes)
    tower = OneR(config)
    with torch.no_grad():
        for weights in tower.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    run = folder / "tiny run"
    run.mkdir()
    save_model(run / "model.safetensors", tower, tokenizer.to_json())
    (run / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}}))
    figures = {f"{kind}{k}": k / 40 for kind in ("R@", "chance@") for k in (1, 5, 10)}
    (run / "evaluation.json").write_text(json.dumps({"val": {"data": str(data), "text_to_image": figures}}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    try:
        find_runtime()
    except ValueError as error:
        pytest.skip(str(error))
    return explore(Options(run))[0]


@pytest.fixture(scope="module")
def opened(browser: Any, page: Path) -> Any:
    browser.resize(1280, 900)
    browser.open(page)
    return browser


@pytest.fixture(scope="module")
def library(run: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, the pixels of every picture, and their embeddings."""
    loaded = oner_fast.load(run)
    dataset = open_split(str(run.parent / "data"), "val")
    pixels = torch.stack([loaded.preprocess(dataset.read(row).image) for row in range(len(dataset))])
    return loaded, pixels, loaded.encode_image(pixels)


def best(query: torch.Tensor, gallery: torch.Tensor, left: int | None = None) -> list[int]:
    scores = query @ gallery.T
    if left is not None:
        scores[left] = -torch.inf
    return scores.sort(descending=True, stable=True).indices[:10].tolist()


def test_the_page_finds_the_same_ten_pictures(opened: Any, library: Any) -> None:
    loaded, _, gallery = library
    texts = [" ".join(random.Random(number).choices(WORDS, k=1 + number % 5)) for number in range(100)]
    found = opened.run(
        f"(async () => {{ const all = []; for (const text of {json.dumps(texts)}) {{ const begun = performance.now();"
        "explorer.texts.clear(); const ten = await explorer.search(text);"
        "all.push([ten.map(({index}) => index), ten[0].score, performance.now() - begun]); } return all; })()"
    )
    expected = loaded.encode_text(texts)
    assert [ten for ten, _, _ in found] == [best(query, gallery) for query in expected]
    scores = torch.tensor([score for _, score, _ in found])
    assert (scores - (expected @ gallery.T).amax(1)).abs().max() < 1e-4
    assert statistics.median(took for _, _, took in found) < 100


def test_a_text_added_to_a_picture(opened: Any, library: Any) -> None:
    loaded, pixels, gallery = library
    for index, text in ((3, "bold"), (41, "big red"), (12, "")):
        found = {
            how: opened.run(f"explorer.compose({index}, {json.dumps(text)}, '{how}').then(f => f.map(r => r.index))")
            for how in ("pass", "sum")
        }
        if not text:
            expected = {how: best(gallery[index], gallery, index) for how in found}
        else:
            both = loaded.encode_image_text(pixels[index : index + 1], [text])[0]
            total = F.normalize(gallery[index] + loaded.encode_text([text])[0], dim=0)
            expected = {"pass": best(both, gallery, index), "sum": best(total, gallery, index)}
        assert found == expected


def test_a_word_lights_the_patches_of_the_library(opened: Any, library: Any) -> None:
    loaded, pixels, _ = library
    found = opened.run("explorer.heat(5, 'heart', 50).then(({shares, map}) => [shares, Array.from(map)])")
    shares = patch_scores(loaded.encode_patches(pixels[5:6])[0], loaded.encode_text(["heart"])[0])
    assert (torch.tensor(found[0]) - shares).abs().max() < 1e-5
    assert (torch.tensor(found[1]).view(50, 50) - heat_map(shares, (50, 50))).abs().max() < 2e-3


def test_the_tokenizer_gives_the_same_ids_for_ten_thousand_captions(opened: Any, library: Any) -> None:
    letters = "abcxyzéÉßİΣςñ東京日ー한😀👍🏽’“”—…·$+<=>^`|~!?,.;:-_/\\'\"()[]{}#%&*@ 0123456789"
    letters += "\t\n\r\x0b\x0c\x00\x85\u200d\ufeff\u3000\xa0\u0301"
    draw = random.Random(0)
    texts = ["", " ", HOSTILE, "[MASK] [UNK] ##s", "a" * 100, "a" * 101, "e\u0301te\u0301", "arrows" * 30]
    while len(texts) < 10_000:
        words = [
            draw.choice(WORDS) + draw.choice(["", "s", "ing", "-up", "'s", ", ", "É"])
            for _ in range(draw.randint(1, 6))
        ]
        noise = "".join(draw.choices(letters, k=draw.randint(0, 12)))
        words.insert(draw.randint(0, len(words)), noise)
        texts.append(" ".join(draw.choice([str.upper, str.title, str])(word) for word in words))
    packed = library[0].tokenizer(texts, 16)
    expected = [ids.tolist() for ids in packed.input_ids.split(packed.cu_seqlens.diff().tolist())]
    found = opened.run(f"{json.dumps(texts)}.map(explorer.tokenize)")
    wrong = [text for text, ours, theirs in zip(texts, expected, found, strict=True) if ours != theirs]
    assert not wrong, (len(wrong), wrong[:5])


def wait(browser: Any, expression: str) -> None:
    end = time.monotonic() + 60
    while not browser.run(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.05)


def text_of(browser: Any, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def test_typing_choosing_and_pointing_by_keyboard_alone(opened: Any, page: Path) -> None:
    opened.open(page)
    opened.run("document.getElementById('query').focus()")
    opened.type("red h")
    wait(opened, "document.getElementById('found').textContent === 'Nearest to “red h”'")
    before = text_of(opened, "#results")
    opened.type("eart")
    wait(opened, "document.getElementById('found').textContent === 'Nearest to “red heart”'")
    assert text_of(opened, "#results") != before and re.search(
        r"24 of 60 pictures in \d+ ms", text_of(opened, "#status")
    )
    opened.press("Tab")
    while "picture" not in opened.run("document.activeElement.className"):
        opened.press("Tab")
    opened.press("Enter")
    first = opened.run("document.activeElement.querySelector('.caption').textContent")
    wait(opened, "document.querySelectorAll('#neighbours button').length === 12")
    assert text_of(opened, "#caption") == first
    assert opened.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    chips = opened.run("Array.from(document.querySelectorAll('#words button'), (chip) => chip.textContent)")
    assert chips[: len(first.split())] == first.split() and {"red", "heart"} <= set(chips)
    opened.run(f"document.querySelectorAll('#words button')[{chips.index('heart')}].focus()")
    wait(opened, "document.getElementById('where').textContent.startsWith('“heart” is strongest at')")
    painted = "document.getElementById('heat').getContext('2d').getImageData(0, 0, 240, 240).data.some((v) => v > 0)"
    assert opened.run(painted)
    alone = text_of(opened, "#neighbours")
    opened.run("document.getElementById('added').focus()")
    opened.type("moon")
    wait(opened, "document.getElementById('composed').textContent.endsWith('with “moon”')")
    assert text_of(opened, "#neighbours") != alone
    wait(opened, "location.hash.includes('add=moon')")
    fragment = opened.run("location.hash")
    opened.open(page, fragment)
    wait(opened, "document.querySelectorAll('#neighbours button').length === 12")
    assert text_of(opened, "#caption") == first and opened.run("document.getElementById('query').value") == "red heart"
    opened.run("document.getElementById('leave').click()")
    assert opened.run("document.activeElement.id") == "query"


def test_a_pasted_book_and_words_that_the_model_lacks(opened: Any, page: Path) -> None:
    opened.resize(400, 800)
    try:
        opened.open(
            page, "#" + urlencode({"q": "שלום " + "x" * 3000, "add": "y" * 3000, "word": "y" * 3000, "picture": 1})
        )
        wait(opened, "document.getElementById('where').textContent.includes('is strongest at')")
        wait(opened, "document.getElementById('composed').textContent.endsWith('…”')")
        for place in ("found", "composed", "where", "words", "chosen"):
            fits = "(({ scrollWidth, clientWidth, clientHeight }) => scrollWidth <= clientWidth && clientHeight < 2000)"
            assert opened.run(f"{fits}(document.getElementById('{place}'))"), place
        assert "the model knows no word of this text" in text_of(opened, "#status")
        assert opened.run("document.getElementById('query').matches(':dir(rtl)')")
        assert len(opened.run("explorer.tokenize('cat '.repeat(20000))")) == 16
        assert not opened.run("explorer.knowsNothingOf('cat')")
    finally:
        opened.resize(1200, 900)


def noise(width: int, height: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def test_pictures_of_ones_own_have_the_pixels_of_the_library(opened: Any, library: Any) -> None:
    for width, height in ((32, 32), (41, 60), (300, 200), (20, 9), (33, 32), (97, 41)):
        content = noise(width, height)
        coded = json.dumps(base64.b64encode(content).decode())
        found = opened.run(
            f"explorer.read(new File([Uint8Array.from(atob({coded}), (c) => c.charCodeAt(0))], 'a.png'))"
            ".then((index) => Array.from(explorer.pixelsOf(index)))"
        )
        assert found == library[0].preprocess(content).flatten().tolist(), (width, height)


def test_a_picture_of_ones_own(opened: Any, page: Path, library: Any, tmp_path: Path) -> None:
    loaded, _, gallery = library
    file = tmp_path / "my cat.png"
    file.write_bytes(noise(50, 40))
    opened.open(page, "#q=red+heart")
    chooser = opened.run("document.getElementById('own')", by_value=False)
    opened.call("DOM.setFileInputFiles", files=[str(file)], objectId=chooser)
    wait(opened, "document.querySelectorAll('#neighbours button').length === 12")
    found = opened.run(f"explorer.compose({PICTURES}, '').then(f => f.map(r => r.index))")
    assert found == best(loaded.encode_image(file)[0], gallery)
    assert text_of(opened, "#caption") == "my cat.png"
    assert opened.run("Array.from(document.querySelectorAll('#words button'), (b) => b.textContent)") == [
        "red",
        "heart",
    ]
    wait(opened, "document.getElementById('where').textContent.startsWith('“red” is strongest at')")


def test_a_file_that_is_no_picture_is_named(opened: Any, page: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no picture")
    opened.open(page)
    found = opened.run("document.getElementById('own')", by_value=False)
    opened.call("DOM.setFileInputFiles", files=[str(file)], objectId=found)
    wait(opened, "document.getElementById('status').textContent.startsWith('notes.txt could not be read as a picture')")


def test_it_fetches_nothing_and_captions_are_text_alone(opened: Any, page: Path) -> None:
    opened.open(page, "#q=cat&picture=7")
    sent = [each["params"]["request"]["url"] for each in opened.events if each["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in sent[0] and all(url.startswith(("file:", "blob:", "data:")) for url in sent)
    assert sum(url.startswith("file:") for url in sent) == 1
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert not [each for each in opened.events if each["method"] in complaints]
    assert opened.run("document.title").startswith("tiny run") and text_of(opened, "#caption") == HOSTILE
    assert not opened.run("Array.from(document.links, (link) => link.protocol).includes('javascript:')")


def test_every_control_has_a_name(opened: Any, page: Path) -> None:
    opened.open(page, "#q=cat&picture=3&add=red")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        each for each in nodes if each.get("role", {}).get("value") in ("button", "searchbox", "textbox", "radio")
    ]
    assert len(controls) > 40
    assert not [each for each in controls if not each.get("name", {}).get("value")]


@pytest.mark.parametrize("width", [320, 390, 820])
def test_narrow_windows_do_not_scroll_sideways(width: int, opened: Any, page: Path) -> None:
    opened.resize(width, 800)
    try:
        opened.open(page, "#q=cat&picture=7&add=red")
        assert opened.run("document.documentElement.scrollWidth <= innerWidth"), width
    finally:
        opened.resize(1280, 900)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for the edges of controls and for what marks a state."""
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    text = [(ink, paper) for ink in ("ink", "muted", "text") for paper in ("paper", "card")] + [("on", "text")]
    edges = [(edge, paper) for edge in ("edge", "image") for paper in ("paper", "card")]
    for pairs, least in ((text, 4.5), (edges, 3.0)):
        for one, other in pairs:
            bright, dark = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= least, (one, other)


# --- without a browser ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without onnxruntime-web, which cannot run."""
    monkeypatch.setattr(runtime_module, "find_runtime", lambda given: Runtime(b"script", b"wasm"))


def payload(page: Path) -> dict[str, Any]:
    found = re.search(r'id="payload-about">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_most_exact_weights_that_fit_are_taken(
    run: Path, tmp_path: Path, no_runtime: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, worst = {}, {}
    for precision in ("float24", "float16", "int8"):
        page, errors = explore(Options(run, precision=precision, out=tmp_path / f"{precision}.html"))
        sizes[precision], worst[precision] = page.stat().st_size, max(errors.values())
    assert worst["float24"] < 1e-4 and 16 * worst["float24"] < worst["float16"] < worst["int8"] / 4
    assert sizes["float24"] > sizes["float16"] > sizes["int8"]
    again, _ = explore(Options(run, out=tmp_path / "again.html"))
    assert again.read_bytes() == (tmp_path / "float24.html").read_bytes()
    monkeypatch.setattr(cli, "MOST_BYTES", sizes["float16"])
    page, _ = explore(Options(run, out=tmp_path / "fits.html"))
    assert page.stat().st_size == sizes["float16"]
    monkeypatch.setattr(cli, "MOST_BYTES", 1000)
    assert main([str(run), "--out", str(tmp_path / "none.html")]) == 1
    assert "MB with weights in int8" in capsys.readouterr().err and not (tmp_path / "none.html").exists()


def test_fewer_pictures_and_two_towers(tmp_path: Path, no_runtime: None) -> None:
    run = make_run(tmp_path, shared_trunk=False)
    page, errors = explore(Options(run, limit=10))
    about = payload(page)
    assert page == run / "explorer.html" and len(about["pictures"]) == 10
    assert about["pictures"][1]["caption"] == caption(6)
    assert about["graphs"].keys() == {"image", "text", "patches"} and errors.keys() == {"image", "text", "patches"}


def test_what_is_missing_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--split", "test"]) == 1
    assert "has no split 'test'; it has val" in capsys.readouterr().err
    assert main([str(run), "--runtime", str(tmp_path / "none.tgz")]) == 1
    assert "given with --runtime" in capsys.readouterr().err
    (tmp_path / "other.tgz").write_bytes(b"another package")
    assert main([str(run), "--runtime", str(tmp_path / "other.tgz")]) == 1
    assert "make it with `npm pack onnxruntime-web@1.30.0`" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    assert main([str(run)]) == 1
    assert "give the file onnxruntime-web-1.30.0.tgz with --runtime" in capsys.readouterr().err
