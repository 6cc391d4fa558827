"""The report of a small run with a real, untrained tower: it renders, is self-contained, and fetches nothing."""

import base64
import hashlib
import io
import json
import re
import shutil
import tarfile
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.evaluation.cli import main as evaluate
from oner_fast.evaluation.table import percent
from oner_fast.models.contrast import Contrast, save_contrast
from oner_fast.models.files import model_bytes
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.nn.heads import Predictor
from oner_fast.report import gallery, image_tiles
from oner_fast.report.cli import main
from oner_fast.report.content import about_content, evaluation_content, training_content
from oner_fast.report.curves import loss_charts
from oner_fast.report.examples import Example, Hit, Panels
from oner_fast.report.heat import HeatRow
from oner_fast.report.style import chart

CAPTIONS = ["arrow", "arrow up", "arrow down", "red cat", "cat", "bold arrow", "big red cat", "sun & moon <b>", "sun"]


def drawing(number: int) -> bytes:
    out = io.BytesIO()
    pixels = numpy.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).resize((24, 24)).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all of its parts, and the data beside it."""
    root = tmp_path_factory.mktemp("report")
    data, folder = root / "data", root / "tiny"
    data.mkdir()
    (folder / "snapshots").mkdir(parents=True)
    splits = {}
    for name in ("train", "val"):
        with tarfile.open(data / f"{name}-000000.tar", "w") as tar:
            for number, caption in enumerate(CAPTIONS):
                members = {"png": drawing(number + 50 * (name == "train")), "txt": caption.encode(), "json": b"{}"}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        shard = {"file": f"{name}-000000.tar", "samples": len(CAPTIONS)}
        splits[name] = {"samples": len(CAPTIONS), "captions": len(CAPTIONS), "shards": [shard]}
    credit = {"set": "drawn", "title": "Drawn", "author": "A <Author>", "licence": "CC-BY-SA-4.0", "samples": 9}
    listing = {"name": "tiny", "format": 1, "splits": splits, "attribution": [credit | {"url": "https://example.org"}]}
    (data / "dataset.json").write_text(json.dumps(listing))
    tokenizer = Tokenizer.train(CAPTIONS, 64)
    tokenizer.save(root / "tokenizer.json")
    torch.manual_seed(0)
    config = OneRConfig(
        image_size=16,
        patch_size=4,
        width=16,
        depth=1,
        heads=2,
        vocab_size=tokenizer.vocab_size,
        max_text_tokens=16,
        embed_dim=8,
        projector_hidden=16,
    )
    model = model_bytes(OneR(config), (root / "tokenizer.json").read_text())
    (folder / "model.safetensors").write_bytes(model)
    contrast = Contrast(Predictor(8, 4), None, OneR(config))
    save_contrast(folder / "contrast.safetensors", contrast, hashlib.sha256(model).hexdigest())
    (folder / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}, "optim": {"lr": 1e-3}}))
    lines = []
    for step in range(10, 210, 10):
        line = {"step": step, "loss": 9 / step, "loss/itc": 5 / step, "loss/mlm": None, "seconds": step % 110}
        line |= {"gap/projection": 1.5 / step, "gap/backbone": 1 / step, "gap/predictor": 0.5}
        line |= {"eval/mean_recall": step / 1000} if step % 50 == 0 else {}
        lines.append(json.dumps(line | {"samples_per_second": 99.0, "mfu": 0.3, "data_wait": 0.01, "skipped_steps": 0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for step in (0, 100, 150, 200):
        image, text = numpy.random.default_rng(step).normal(size=(2, 12, 8)).astype(numpy.float16)
        numpy.savez(folder / "snapshots" / f"step-{step:08d}.npz", image=image, text=text, step=step)
    assert evaluate([str(folder)]) == 0
    assert main([str(folder)]) == 0
    return folder


class Outside(HTMLParser):
    """Collect every address that a browser would fetch, every link, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.handlers: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attributes if name.startswith("on")}
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag not in ("a",)):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(run: Path) -> Outside:
    parser = Outside()
    parser.feed((run / "report.html").read_text(encoding="utf-8"))
    return parser


def test_nothing_is_fetched_from_outside(page: Outside, run: Path) -> None:
    assert page.fetched
    assert all(address.startswith(("data:", "#")) for address in page.fetched)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    html = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|@font-face|url\((?!#)", html)
    outside = re.findall(r'https?://[^\s"<]+', html)
    assert sorted(set(outside)) == sorted(link for link in set(page.links) if link.startswith("http"))
    assert set(outside) == {"https://example.org", "https://creativecommons.org/licenses/by-sa/4.0/"}


def test_a_hostile_data_set_gives_no_script_and_no_link_but_to_the_web(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "data", tmp_path / "data")
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    script = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>"
    listing = json.loads((tmp_path / "data" / "dataset.json").read_text())
    listing["name"] = script
    listing["splits"] |= {script: {"samples": 1, "shards": []}}
    listing["attribution"] = [
        {"title": script, "author": script, "licence": script, "samples": 3, "url": url}
        for url in ("javascript:alert(1)", " java\tscript:alert(1)", "data:text/html,x", "//a.org", 'https://b.org/"x')
    ]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(listing))
    assert main([str(tmp_path), "--data", str(tmp_path / "data")]) == 0
    seen = Outside()
    seen.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {link for link in seen.links if not link.startswith("#")} == {'https://b.org/"x'}
    assert "script" not in seen.tags and not seen.handlers
    assert seen.text.count("alert(1)") >= 3  # as text
    assert all(address.startswith(("data:", "#")) for address in seen.fetched)


def test_the_policy_stands_before_everything_that_it_rules(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    head = html.partition("<style>")[0]
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    assert policy in head and "script" not in policy
    directives = [part.split() for part in policy.replace("&#39;", "'").split(";")]
    assert ["default-src", "'none'"] in directives and ["img-src", "data:"] in directives
    assert not re.search(r"<script|\son\w+=", html)


def test_charts_take_any_text(tmp_path: Path) -> None:
    text = "</text><script>alert(1)</script> $5 or $\\oops$"
    made = chart("one", lambda axes: axes.set_title(text), tmp_path, size=(3.0, 2.0))
    assert "<script" not in made["svg"] and "&lt;script&gt;" in made["svg"] and "$\\oops$" in made["svg"]


def test_links_within_the_page_have_targets(page: Outside) -> None:
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert {"figures", "classes", "examples", "heat", "composed", "gap", "training", "made"} == inner
    assert inner <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))  # of the charts too


def test_images_are_image_files(page: Outside) -> None:
    inline = {address for address in page.fetched if address.startswith("data:image")}
    assert len(inline) >= len(CAPTIONS)
    for address in inline:
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).verify()


def test_the_page_shows_its_sections_and_figures(page: Outside, run: Path) -> None:
    for words in ("Retrieval on what it has never seen", "Drawn by seed", "a right answer", "optim.lr"):
        assert words in page.text
    assert "A <Author>" in page.text  # escaped in the source, whole when read
    assert "sun & moon <b>" in page.text
    assert "b" not in {tag for tag in page.tags if tag == "script"}
    figures = json.loads((run / "evaluation.json").read_text())["val"]
    share = f"{100 * figures['image_to_text']['R@10']:.0f} %"
    assert share in page.text
    assert "undefined" not in page.text.lower()
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())


def test_the_headline_shows_the_spaces_and_the_image_alone(page: Outside, run: Path) -> None:
    val = json.loads((run / "evaluation.json").read_text())["val"]
    text = " ".join(page.text.split())
    for space in ("backbone", "projection", "predictor", "teacher", "max"):
        figures = val["spaces"][space]
        shares = [percent(figures[way]["R@10"]) for way in ("image_to_text", "text_to_image")]
        gap = f" {figures['modality_gap']:.2f}" if space != "max" else ""
        line = f"{space} {shares[0]} {shares[1]} {percent(figures['zero_shot']['top1'])}{gap}"
        assert line.replace(" ", "") in text.replace(" ", "")
    alone = val["image_text_to_image"]["image_only"]["R@10"]
    assert f"the image alone {percent(alone)}" in text
    assert (run / "figures" / "gap-by-space.png").is_file()


def test_the_page_shows_classification(run: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "evaluation.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    figures = {"top1": 0.125, "top5": 0.5432, "chance@1": 0.0625, "chance@5": 0.3125, "images": 1234, "classes": 16}
    evaluation["val"] |= {"zero_shot": figures, "knn": {"set": figures | {"majority": 0.375}}}
    evaluation["linear_probe"] = figures | {"majority": 0.25}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert main([str(tmp_path), "--data", str(run.parent / "data")]) == 0
    seen = Outside()
    seen.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "#classes" in seen.links and "classes" in seen.ids
    text = re.sub(r"\s+", "", seen.text)
    for words in ("zero-shot,concept1,2341612.5%", "k-NN,set1,2341612.5%", "imagefolderlinearprobe1,2341612.5%"):
        assert words in text
    assert text.count("54.3%") == 3 and "37.5%" in text and "25.0%" in text


@pytest.mark.parametrize(
    ("config", "command", "from_scratch"),
    [
        ({"objectives": {}}, "oner", True),
        ({"alignment": {}}, "uta", True),
        ({"contrast": {"init_image": ""}, "model": {"width": 8}}, "clip", True),
        ({"contrast": {"init_image": "runs/uta"}, "model": {"width": 8}}, "clip", False),
        ({"contrast": {}, "model": {"grid": 6}}, "lit", False),
    ],
)
def test_the_page_shows_the_command_of_the_training(
    config: dict[str, object], command: str, from_scratch: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | {"run": {"recipe": "a_recipe_cpu"}}))
    about = about_content(tmp_path, None, "runs/it")
    assert about["commands"][0] == f"oner-fast train {command} --recipe a_recipe_cpu --run.run-dir runs/it"
    assert about["from_scratch"] is from_scratch


def test_a_run_that_began_with_weights_says_so(run: Path, tmp_path: Path) -> None:
    settings = {"init_from": "runs/my demo", "resume": "latest", "recipe": "tuned_cpu"}
    (tmp_path / "config.json").write_text(json.dumps({"objectives": {}, "run": settings}))
    file = "/home/ann/demo/model.safetensors"
    origin = {"kind": "weights", "given": "/home/ann/demo", "file": file, "sha256": "0", "step": None}
    (tmp_path / "lineage.json").write_text(json.dumps({"format_version": 1, "lineage": [origin]}))
    about = about_content(tmp_path, None, "runs/it")
    assert about["commands"][0] == (
        "oner-fast train oner --recipe tuned_cpu --init-from 'runs/my demo' --run.run-dir runs/it"
    )
    assert about["began_with"] == ["demo/model.safetensors"] and about["from_scratch"] is False
    tuned = tmp_path / "tuned"
    shutil.copytree(run, tuned)
    shutil.copy(tmp_path / "lineage.json", tuned)
    assert main([str(tuned)]) == 0
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert "steps from the weights of demo/model.safetensors" in page and "random weights" not in page
    assert "Retrieval on what was held out" in page and "never seen" not in page
    assert "images held out from this training" in page and "/home/ann" not in page
    assert "Training saw no concept" not in page  # true of the library's own data sets alone


def test_charts_follow_the_pages_colours(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r'<svg class="chart".*?</svg>', html, flags=re.DOTALL)
    assert len(charts) == 11  # loss, one part, evaluation, speed, mfu, waiting, two of the gap, three maps
    for each in charts:
        assert "var(--" in each
        assert not re.search(r"(?:fill|stroke): #", each)
    assert "prefers-color-scheme: dark" in html


def test_figures_are_written(run: Path) -> None:
    names = {path.name for path in (run / "figures").glob("*.png")}
    assert {"loss.png", "modality-gap.png", "map-1.png", "map-3.png", "text-to-image.png", "heat-maps.png"} <= names
    for name in names:
        assert Image.open(run / "figures" / name).width > 300


def test_two_reports_are_equal(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    assert main([str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


def test_a_run_that_was_not_evaluated_and_logged_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert main([str(tmp_path), "--data", str(run.parent / "data")]) == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "It has not been evaluated yet" in html
    assert 'id="training"' not in html
    assert 'id="gap"' not in html
    assert 'id="examples"' in html


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    return capsys.readouterr().err


def test_a_run_of_one_tar_shows_training_pairs_and_says_so(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    (alone / "evaluation.json").unlink()
    tar = run.parent / "data" / "train-000000.tar"
    (alone / "config.json").write_text(json.dumps({"data": {"train_data": str(tar)}}))
    assert evaluate([str(alone), "--split", "train"]) == 0 and main([str(alone)]) == 0
    page = (alone / "report.html").read_text()
    assert (alone / "figures" / "evaluation-mean-recall.png").is_file() and "On held-out pairs" in page
    for words in ("These are <strong>training pairs</strong>", "images of its training", "Retrieval on its training"):
        assert words in page
    assert "held out from training" not in page and "held-out captions" not in page
    assert evaluate([str(alone)]) == 1
    # With sources that the user names, they are held out again, and each licence is shown once.
    both = f"{run.parent / 'data'}::{run.parent / 'data'}"
    assert main([str(alone), "--data", both]) == 0
    page = (alone / "report.html").read_text()
    assert "These are <strong>training pairs</strong>" not in page and page.count("CC-BY-SA-4.0") == 1


def test_errors_say_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder" in fails([str(tmp_path / "none")], capsys)
    assert "neither model.safetensors nor a checkpoint" in fails([str(tmp_path)], capsys)
    assert "no data at" in fails([str(run), "--data", str(tmp_path / "gone")], capsys)
    assert "no split 'style'; it has train, val" in fails([str(run), "--split", "style"], capsys)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "give its folder with --data" in fails([str(tmp_path)], capsys)
    assert "model.safetensors is empty (0 bytes)" in fails([str(tmp_path), "--data", str(run.parent / "data")], capsys)


def test_an_interrupted_report_writes_no_page(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(oner_fast, "load", stop, raising=False)
    assert main([str(run)]) == 130
    assert "was not written" in capsys.readouterr().err


HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "{{ 7*7 }}",
    "$\\frac{1}{$", "$5 to $10", "$_$", "nul\x00\x1b[31m", "x" * 5000, "\u202ertl", "../../x",
]  # fmt: skip


def test_captions_with_markup_and_formulas_are_shown_as_they_are(tmp_path: Path) -> None:
    hits = [Hit(False, 0.5, caption, image_tiles.tile(drawing(0))) for caption in HOSTILE[:5]]
    drawn = [Example(caption, hits, 1, 5) for caption in HOSTILE]
    rows = [HeatRow(caption, hits[0].picture or "", [(caption, hits[0].picture or "")]) for caption in HOSTILE]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gallery.write({"to_image": Panels(drawn), "composed_examples": None, "heat": rows}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"text-to-image.png", "heat-maps.png"}


def test_names_of_losses_inject_nothing(tmp_path: Path) -> None:
    metrics = [{"step": step, **{f"loss/{name}": 1.5 for name in HOSTILE}, "loss/": 2.0} for step in (1, 2)]
    _, parts = loss_charts(metrics, tmp_path)
    assert len(parts) == len(HOSTILE) + 1 == len({part["name"] for part in parts}) == len(list(tmp_path.iterdir()))
    seen = Outside()
    seen.feed("".join(part["svg"] for part in parts))
    assert seen.tags <= {"svg", "g", "path", "defs", "use", "text", "clippath", "rect", "style", "tspan"}
    assert all(re.fullmatch(r"loss-[\w-]+", name) for name in seen.ids)
    assert len(seen.ids) == len(set(seen.ids))


def test_metrics_without_bounds_are_left_out(tmp_path: Path) -> None:
    last = {"step": 1, "loss": 10**400, "seconds": "x", "skipped_steps": float("inf"), "corrupt_samples": {}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last))
    content = training_content(tmp_path, tmp_path)
    assert content["loss"] == [] and content["skipped_steps"] is None and content["corrupt_samples"] is None


SHARES = {"queries": 1, "gallery": 1} | {f"{name}@{k}": 0.5 for name in ("R", "chance") for k in (1, 5, 10)}


@pytest.mark.parametrize(
    "entry",
    [
        {"image_to_text": SHARES, "pairs": 1}, {"image_to_text": SHARES, "text_to_image": SHARES},
        {"image_to_text": []}, {"image_to_text": SHARES | {"R@1": 7}}, {"knn": 3}, {"knn": {"set": None}},
        {"image_to_text": SHARES | {"queries": "<b>"}}, {"image_to_text": SHARES | {"chance@1": float("nan")}},
    ],
)  # fmt: skip
def test_figures_of_another_kind_are_named(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="evaluation.json holds no figures of oner-fast eval .*remove it"):
        evaluation_content({"val": entry})


@pytest.mark.parametrize("described", [{"splits": {"val": 3, "x": {"samples": None}}, "build": []}, {"splits": []}])
def test_a_listing_or_configuration_of_other_types_is_shown(described: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text(json.dumps({"contrast": 3, "model": [], "run": None}))
    about = about_content(tmp_path, str(tmp_path), "runs/it")
    assert about["splits"] == ({"x": {"samples": 0, "captions": 0}} if described["splits"] else {})
