"""What one sample may cost: refused before it is decoded, and named with the limit and the value."""

import inspect
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oner_fast.data import budget, pixels
from oner_fast.data.budget import BUDGET, SampleBudget, excess
from oner_fast.data.dataset import CorruptSample, PairDataset, caption_of, fields_of
from oner_fast.data.images import RANDOMS, EvalTransform, ImageTransform, decode

MB = 1 << 20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(width: int, height: int, bits: int = 1, colour: int = 0, rows: int | None = None) -> bytes:
    """Make a black PNG of a few bytes; of its first rows alone where `rows` is given."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (width * bits * {0: 1, 2: 3, 4: 2, 6: 4}[colour] + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_what_a_limit_says():
    assert excess("pixels", BUDGET.pixels) is None
    assert excess("pixels", 100_000_000) == "over the budget of one sample: pixels 100,000,000, at most 89,478,485"


@pytest.mark.parametrize(
    "data, said",
    [
        (blank_png(13_300, 13_300, 16, rows=1), "pixels 176,890,000, at most 89,478,485"),
        (blank_png(1, 20_000, 8, rows=1), "aspect 20,000, at most 1,000"),
        (blank_png(20_000, 1, 8, rows=1), "aspect 20,000, at most 1,000"),
        (blank_png(9_000, 9_000, 8, 6, rows=1), "decoded_bytes 648,000,000, at most 536,870,912"),
        (blank_png(40_000, 40_000, rows=1), "pixels 1,600,000,000, at most 89,478,485"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_over_the_budget_are_refused_before_they_are_decoded(data: bytes, said: str, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    for side in (0, 64):
        with pytest.raises(CorruptSample, match=f"^a.tar:k: over the budget of one sample: {said}$"):
            decode(data, "a.tar:k", side)


def test_an_upright_photo_of_50_megapixels_is_within_the_budget():
    assert pixels._over((8160, 6144), "RGB", 0, True) is None
    assert pixels._over((12_240, 9_180), "RGB", 0, False) is not None


def test_a_jpeg_of_many_scans_is_refused_and_its_coefficients_count(monkeypatch):
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG", progressive=True, subsampling=0)
    assert decode(data).size == (64, 64)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    with pytest.raises(CorruptSample, match="scans 1,010, at most 100"):
        decode(data[:-2] + scan * 1000 + data[-2:])
    after = data + b"\xff\xda\0\0" * 1000  # what follows the image is not part of it
    assert np.array_equal(np.asarray(decode(after)), np.asarray(decode(data)))
    monkeypatch.setattr(budget, "BUDGET", SampleBudget(decoded_bytes=64 * 64 * 8))
    with pytest.raises(CorruptSample, match="decoded_bytes 40,960, at most 32,768"):
        decode(data)


def test_a_decoder_that_takes_too_long_is_stopped(monkeypatch):
    """Numbers as text, and empty parts, cost time that a file's size in pixels does not show."""
    monkeypatch.setattr(pixels, "BUDGET", SampleBudget(seconds=0.05))
    started = time.thread_time()
    with pytest.raises(CorruptSample, match="k: over the budget of one sample: more than 0.05 seconds"):
        decode(b"P2 3000 3000 255\n" + b"1 " * 9_000_000, "k")
    empty = blank_png(8, 8, 8)
    place = empty.index(b"IDAT") - 4
    with pytest.raises(CorruptSample, match="more than 0.05 seconds"):
        decode(empty[:place] + chunk(b"IDAT", b"") * 500_000 + empty[place:])
    assert time.thread_time() - started < 1.0


def test_the_end_of_a_slow_decoding_counts_too(monkeypatch):
    data = encoded(Image.effect_noise((900, 900), 90), "WEBP", lossless=True)
    monkeypatch.setattr(pixels, "BUDGET", SampleBudget(seconds=0.001))
    with pytest.raises(CorruptSample, match="more than 0.001 seconds"):
        decode(data)


CHILD = """
import sys
import numpy as np
from PIL import Image
from oner_fast.data.images import EvalTransform, ImageTransform, RANDOMS, decode
from oner_fast.data.dataset import CorruptSample


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def cost(work):
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    work()
    return memory("VmHWM") - before


def refused(data):
    try:
        decode(data)
    except CorruptSample:
        return
    sys.exit("not refused")


long = [Image.new("RGB", size) for size in ((1, 20_000), (20_000, 1), (3, 60_000))]
randoms = np.array([0, 1 << 31, 0, 0, 0])
deep = blank_png(4000, 4000, 16)
alpha = blank_png(4000, 4000, 8, 6)
for name, work in (
    ("a deep image too large", lambda: refused(DEEPEST)),
    ("narrow in evaluation", lambda: [EvalTransform(224)(image) for image in long]),
    ("narrow in training", lambda: [ImageTransform(224)(image, randoms) for image in long]),
    ("deep", lambda: decode(deep)),
    ("transparent", lambda: decode(alpha)),
):
    DEEPEST = blank_png(13_300, 13_300, 16) if name == "a deep image too large" else b""
    print(name, cost(work), memory("VmHWM"), sep=",")
"""


def test_peak_memory():
    """One child process, whose peak is reset before each image."""
    script = "import struct, zlib\n" + inspect.getsource(chunk) + inspect.getsource(blank_png) + CHILD
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cost, peak = {}, {}
    for line in done.stdout.splitlines():
        name, grown, top = line.split(",")
        cost[name], peak[name] = int(grown), int(top)
    assert cost["a deep image too large"] < 20 * MB and peak["a deep image too large"] < 300 * MB
    assert cost["narrow in evaluation"] < 20 * MB
    assert cost["narrow in training"] < 20 * MB
    assert cost["deep"] < 4000 * 4000 * 6 + 20 * MB  # its 2 bytes a pixel, and 4 of RGB
    assert cost["transparent"] < 4000 * 4000 * 8 + 20 * MB


def noise(width: int, height: int) -> Image.Image:
    """Smooth noise; a bicubic filter would ring on harder edges, where roundings differ more."""
    rng = np.random.default_rng(width)
    rough = rng.integers(60, 200, (max(1, height // 8), max(1, width // 8), 3)).astype(np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def old_evaluation(image: Image.Image, size: int) -> np.ndarray:
    """Resize the image whole, then cut out the centre."""
    shorter = min(image.size)
    width, height = (round(side * size / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    x, y = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((x, y, x + size, y + size))).transpose(2, 0, 1)


def test_evaluation_keeps_its_bits_up_to_a_ratio_of_16():
    for width, height in ((50, 40), (331, 97), (97, 331), (1600, 100), (24, 383), (7, 3)):
        image = noise(width, height)
        assert np.array_equal(EvalTransform(32)(image).numpy(), old_evaluation(image, 32))


@pytest.mark.parametrize("width, height", [(1700, 100), (31, 1999), (1, 900), (900, 1), (4001, 13)])
def test_a_long_image_differs_by_two_levels_at_most(width: int, height: int):
    image = noise(width, height)
    found, expected = EvalTransform(32)(image).numpy().astype(int), old_evaluation(image, 32).astype(int)
    assert np.abs(found - expected).max() <= 2 and (found != expected).mean() < 0.06


def test_narrow_images_train():
    for size in ((1, 900), (900, 1)):
        assert ImageTransform(16)(Image.new("RGB", size, (9, 9, 9)), np.zeros(RANDOMS, np.int64)).unique().tolist() == [
            9
        ]


def test_captions_and_metadata_have_limits(tmp_path: Path):
    with pytest.raises(CorruptSample, match="k: over the budget of one sample: caption_bytes 70,000, at most 65,536"):
        caption_of("k", b"a" * 70_000, {})
    with pytest.raises(CorruptSample, match="caption_bytes 80,000"):
        caption_of("k", None, {"caption": "é" * 40_000})
    with pytest.raises(CorruptSample, match="json_bytes 2,000,000, at most 1,048,576"):
        fields_of("k", b" " * 2_000_000)
    for depth in (33, 100_000):
        with pytest.raises(CorruptSample, match="^k: its JSON is nested deeper than 32 levels$"):
            fields_of("k", b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    assert caption_of("k", b"a" * 65_536, {}) == "a" * 65_536
    assert fields_of("k", b'{"a": {"b": [1]}}') == {"a": {"b": [1]}}

    members = {"a.png": blank_png(4, 4, 8), "a.txt": b"x" * 70_000, "b.png": blank_png(4, 4, 8), "b.txt": b"fine"}
    members |= {"b.json": json.dumps({"note": "x" * 2_000_000}).encode()}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    pairs = PairDataset(tmp_path / "t.tar")
    with pytest.raises(CorruptSample, match="t.tar:a: over the budget of one sample: caption_bytes 70,000"):
        pairs.read(0)
    with pytest.raises(CorruptSample, match="t.tar:b: over the budget of one sample: json_bytes"):
        pairs.read(1)
    assert pairs.read(1, meta=False).caption == "fine"


def test_an_image_member_has_a_limit(tmp_path: Path, monkeypatch):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in {"a.png": bytes(5000), "a.txt": b"x"}.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    monkeypatch.setattr(budget, "BUDGET", SampleBudget(image_bytes=4999))
    with pytest.raises(CorruptSample, match="t.tar:a: over the budget of one sample: image_bytes 5,000, at most 4,999"):
        PairDataset(tmp_path / "t.tar").picture(0)
    with pytest.raises(CorruptSample, match="image_bytes 5,000, at most 4,999"):
        decode(bytes(5000))
