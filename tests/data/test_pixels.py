"""The one reader of image files: the same bits as Pillow's own, upright, and despite damaged metadata."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

import oner_fast
from oner_fast.data.dataset import CorruptSample
from oner_fast.data.given_images import as_rgb
from oner_fast.data.images import decode
from oner_fast.data.orientation import from_xmp
from oner_fast.data.picture_formats import FORMATS, SUFFIXES
from oner_fast.data.pixels import read_file, read_picture
from oner_fast.data.tar_index import KINDS

WIDTH, HEIGHT = 40, 24
TURNS = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
TURNS |= {6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {"quality": 95}}


def colours(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 7 * 30], 2).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes, *, early: bool = True) -> bytes:
    """Put a chunk after IHDR, or else before IEND."""
    place = 33 if early else len(png) - 12
    return png[:place] + chunk(kind, data) + png[place:]


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def pixels(data: bytes, side: int = 0) -> np.ndarray:
    return np.asarray(decode(data, side=side))


def before(data: bytes, side: int = 0) -> np.ndarray:
    """Decode as Pillow does, with no part of the file taken away and the image converted whole."""
    image = Image.open(io.BytesIO(data))
    if side and image.format == "JPEG":
        image.draft("RGB", (side, side))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        values = values / 257.0 if image.mode != "F" else values * (255.0 if values.max() <= 1.0 else 1.0)
        return np.repeat(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image.convert("RGB"))


def ordinary() -> dict[str, bytes]:
    big, small = colours(620, 430), colours()
    deep = Image.fromarray((np.arange(620 * 430).reshape(430, 620) % 65536).astype(np.uint16))
    alpha = big.convert("RGBA")
    alpha.putalpha(big.convert("L"))
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a cat", zip=True)
    profile = b"\0" * 128
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "png": (big, "PNG", {"pnginfo": text, "icc_profile": profile, "dpi": (72, 72)}),
        "grey16.png": (deep, "PNG", {}),
        "alpha.png": (alpha, "PNG", {}),
        "grey alpha.png": (alpha.convert("LA"), "PNG", {}),
        "palette.png": (big.quantize(32), "PNG", {"transparency": 3}),
        "colour key.png": (Image.new("RGB", (64, 48), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}),
        "bits.png": (big.convert("1"), "PNG", {}),
        "jpg": (big, "JPEG", {"icc_profile": profile, "comment": b"a comment", "exif": exif_of(1)}),
        "turned.jpg": (big, "JPEG", {"exif": exif_of(6)}),
        "progressive.jpg": (big, "JPEG", {"progressive": True, "subsampling": 0}),
        "cmyk.jpg": (big.convert("CMYK"), "JPEG", {}),
        "grey.jpg": (big.convert("L"), "JPEG", {}),
        "rgb.jpg": (big, "JPEG", {"keep_rgb": True}),
        "webp": (alpha, "WEBP", {}),
        "gif": (big.quantize(16), "GIF", {"transparency": 2, "comment": b"c"}),
        "moving.gif": (small.quantize(16), "GIF", {"save_all": True, "append_images": [small.quantize(4)]}),
        "moving.png": (small, "PNG", {"save_all": True, "append_images": [small.rotate(90)]}),
        "bmp": (big, "BMP", {}),
        "tif": (big, "TIFF", {"dpi": (72, 72)}),
        "lzw.tif": (big, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": (big, "TIFF", {"compression": "jpeg"}),
        "fax.tif": (big.convert("1"), "TIFF", {"compression": "group4"}),
        "big.tif": (big, "TIFF", {"big_tiff": True}),
        "float.tif": (Image.fromarray((np.asarray(deep) / 65535).astype(np.float32)), "TIFF", {}),
        "palette.tif": (big.quantize(16), "TIFF", {}),
        "ppm": (big, "PPM", {}),
        "pgm": (deep, "PPM", {}),
        "avif": (small, "AVIF", {"exif": exif_of(6)}),
    }
    return {name: encoded(image, kind, **options) for name, (image, kind, options) in kinds.items()}


def test_ordinary_images_decode_to_the_bits_of_pillow():
    for name, data in ordinary().items():
        for side in (0, 100):
            assert np.array_equal(pixels(data, side), before(data, side)), (name, side)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_obeyed(kind: str, orientation: int):
    plain = encoded(colours(), kind, **LOSSLESS[kind])
    turned = encoded(colours(), kind, exif=exif_of(orientation), **LOSSLESS[kind])
    expected = TURNS.get(orientation, np.asarray)(pixels(plain))
    assert np.array_equal(pixels(turned), expected)
    if kind == "JPEG":
        large = encoded(colours(320, 192), kind, exif=exif_of(orientation))
        drafted = TURNS.get(orientation, np.asarray)(pixels(encoded(colours(320, 192), kind), side=48))
        assert drafted.shape[0] * drafted.shape[1] == 80 * 48 and np.array_equal(pixels(large, side=48), drafted)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_read_wherever_it_stands(orientation: int):
    png = encoded(colours())
    expected = TURNS.get(orientation, np.asarray)(np.asarray(colours()))
    exif = exif_of(orientation).tobytes()
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    element = f"<tiff:Orientation>{orientation}</tiff:Orientation>".encode()
    raw = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode()
    key = b"Raw profile type exif\0"
    big_endian = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    long = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 4, 1, orientation, 0)
    for data in (
        with_chunk(png, b"eXIf", exif[6:], early=False),
        with_chunk(png, b"eXIf", big_endian),
        with_chunk(png, b"eXIf", long),
        with_chunk(png, b"tEXt", key + raw),
        with_chunk(png, b"zTXt", key + b"\0" + zlib.compress(raw)),
        with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(element), early=False),
        encoded(colours(), "TIFF", tiffinfo={274: orientation}),
        encoded(colours(), "TIFF", tiffinfo={274: orientation}, big_tiff=True),
        encoded(colours(), "TIFF", tiffinfo={700: xmp}),
        encoded(colours(), "WEBP", lossless=True, xmp=xmp),
    ):
        assert np.array_equal(pixels(data), expected)
    jpeg = encoded(colours(), "JPEG")
    turned = with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    assert np.array_equal(pixels(turned), TURNS.get(orientation, np.asarray)(pixels(jpeg)))


def damaged_png() -> dict[str, tuple[bytes, bytes]]:
    bomb = zlib.compress(bytes(3 << 20))
    return {
        "eXIf": (b"eXIf", b"garbage that is no TIFF"),
        "cut eXIf": (b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\x01"),
        "eXIf far away": (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
        "raw profile": (b"tEXt", b"Raw profile type exif\0\nexif\n  9\nnot hexadecimal"),
        "raw profile of nothing": (b"zTXt", b"Raw profile type exif\0\0not zlib"),
        "profile method": (b"iCCP", b"icc\0\7" + zlib.compress(b"x")),
        "profile bomb": (b"iCCP", b"icc\0\0" + bomb),
        "text bomb": (b"zTXt", b"Comment\0\0" + bomb),
        "text method": (b"zTXt", b"Comment\0\7x"),
        "short gAMA": (b"gAMA", b"\0"),
        "short cHRM": (b"cHRM", b"\0"),
        "short acTL": (b"acTL", b"\0"),
        "wild fcTL": (b"fcTL", bytes(3) + b"\1" + b"\xff" * 22),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='six'"),
    }


@pytest.mark.parametrize("name", damaged_png())
def test_damaged_metadata_of_a_png_cost_nothing(name: str):
    kind, data = damaged_png()[name]
    for early in (True, False):
        assert np.array_equal(pixels(with_chunk(encoded(colours()), kind, data, early=early)), np.asarray(colours()))
    wrong_sum = bytearray(with_chunk(encoded(colours()), kind, data))
    wrong_sum[33 + 8 + len(data)] ^= 1
    assert np.array_equal(pixels(bytes(wrong_sum)), np.asarray(colours()))


def test_damaged_metadata_of_a_jpeg_cost_nothing():
    jpeg = encoded(colours(), "JPEG", quality=95)
    expected = pixels(jpeg)
    odd = Image.Exif()
    odd[0x0112], odd[0x010F] = 6, "maker"
    strange = odd.tobytes().replace(b"\x01\x0f\0\x02", b"\x01\x0f\0\x63")  # a type that does not exist
    assert strange != odd.tobytes()
    for orientation, segment in (
        (1, (0xE1, b"Exif\0\0garbage")),
        (1, (0xE1, b"Exif\0\0II*\0\x08\0\0\0")),
        (1, (0xE0, b"JFIF\0")),
        (1, (0xEE, b"Adobe")),
        (1, (0xED, b"Photoshop 3.0\0008BIM\4\4")),
        (1, (0xE2, b"ICC_PROFILE\0\1\7broken")),
        (1, (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
        (1, (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=")),
        (6, (0xE1, strange)),
        (6, (0xE1, exif_of(6).tobytes() + b"\0\1\2")),
    ):
        assert np.array_equal(pixels(with_segment(jpeg, *segment)), TURNS.get(orientation, np.asarray)(expected)), (
            segment
        )
    # A tag whose value Pillow reads but cannot write back, in a photo that has to be turned.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 8) + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF)
    blob = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert np.array_equal(pixels(with_segment(jpeg, 0xE1, blob)), np.rot90(expected))
    large = encoded(colours(320, 192), "JPEG")
    assert np.array_equal(pixels(with_segment(large, 0xE1, blob), side=48), np.rot90(pixels(large, side=48)))


def test_damaged_metadata_of_other_formats_cost_nothing():
    for kind, options in (("WEBP", {"lossless": True}), ("AVIF", {"quality": 100})):
        plain = pixels(encoded(colours(), kind, **options))
        exif = exif_of(6)
        exif[0x010F] = "maker"
        whole = encoded(colours(), kind, exif=exif.tobytes()[6:], xmp=b"<broken", **options)
        damaged = whole.replace(b"MM\0*\0\0\0\x08", b"nonsense")
        assert damaged != whole
        # An AVIF states its turn a second time, outside of the EXIF.
        assert np.array_equal(pixels(damaged), TURNS[6](plain) if kind == "AVIF" else plain), kind
    tags = {34665: 0xFFFFFFF0, 34675: b"icc", 700: b"<broken", 37724: b"8B", 282: 0.0, 33723: b"\x1c"}
    assert np.array_equal(pixels(encoded(colours(), "TIFF", tiffinfo=tags)), np.asarray(colours()))


def test_photos_of_two_images_are_read():
    two = encoded(colours(), "MPO", save_all=True, append_images=[colours().rotate(180)])
    assert np.array_equal(pixels(two), before(two))
    picture = read_picture(two)
    assert picture.format == "JPEG" and picture.as_stored


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "SGI", "PCX", "DDS", "JPEG2000"])
def test_only_picture_formats_are_opened(kind: str):
    data = EPS if kind == "EPS" else encoded(colours(), kind)
    with pytest.raises(CorruptSample, match=re.escape("x.png: not a readable image (of no known format)")):
        decode(data, "x.png")


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "it has no bytes"),
        (b"\n<!DOCTYPE html><html>404", "a web page"),
        (b"<html>", "a web page"),
        (b"\xff\xd8\xff", "not a readable image"),
        (b"\xff\xd8\xff\xe1", "not a readable image"),
        (b"II*\0", "not a readable image"),
        (b"MM\0*\xff\xff\xff\xff", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIDAT", "not a readable image"),
    ],
)
def test_bytes_that_are_no_image_are_named(data: bytes, said: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptSample, match=f"^k: .*{said}"):
            decode(data, "k")


def test_cut_and_changed_files_give_an_image_or_a_corrupt_sample():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in ordinary().values():
            for _ in range(6):
                changed = bytearray(data)
                for place in rng.integers(0, min(len(data), 300), 3):
                    changed[place] = rng.integers(256)
                try:
                    assert decode(bytes(changed[: rng.integers(len(data) // 2, len(data) + 1)])).mode == "RGB"
                except CorruptSample as error:
                    assert "at 0x" not in str(error)


def test_suffixes_and_formats_belong_together():
    assert Image.registered_extensions().keys() >= set(SUFFIXES)
    assert {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == set(FORMATS)
    assert {f".{kind}" for kind, column in KINDS.items() if column == 0} <= set(SUFFIXES)


def test_a_file_is_read_only_where_it_is_one(tmp_path: Path):
    with pytest.raises(CorruptSample, match="a folder, not a file"):
        read_file(tmp_path)
    with pytest.raises(CorruptSample, match="a device or pipe, not a file"):
        read_file("/dev/zero")
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptSample, match="huge.png: over the budget of one sample: image_bytes 1,099,511,627,776"):
        read_file(huge)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.png")


def test_no_other_module_opens_images():
    package = Path(oner_fast.__file__).parent
    files = {path.resolve(): path for path in package.rglob("*.py")}
    opening = {path.name for path in files if re.search(r"\bImage\.open\b|\bread_image\b|\bcv2\b", path.read_text())}
    # The export writes a README in which the reader opens a picture.
    assert opening == {"pixels.py", "loading_guides.py"}


def small_png(depth: int, form: int, row: bytes, transparent: bytes, width: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, 1, depth, form, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


@pytest.mark.parametrize(
    ("depth", "form", "row", "transparent", "expected"),
    [
        (1, 0, b"\x40", (0,), [255, 255]),
        (1, 0, b"\x40", (1,), [0, 255]),
        (2, 0, b"\x60", (1,), [255, 170]),
        (4, 0, b"\x34", (3,), [255, 68]),
        (8, 0, b"\x03\x04", (3,), [255, 4]),
        (16, 0, struct.pack(">2H", 1000, 2570), (1000,), [255, 10]),
        (8, 2, b"\1\1\1\4\4\4", (1, 1, 1), [255, 4]),
        (16, 2, struct.pack(">6H", *[1000] * 3, *[2570] * 3), (1000, 1000, 1000), [255, 10]),
        (16, 2, struct.pack(">6H", *[257] * 3, *[2570] * 3), (1, 1, 1), [1, 10]),
    ],
)
def test_a_transparent_colour_is_white_at_every_depth(
    depth: int, form: int, row: bytes, transparent: tuple[int, ...], expected: list[int]
):
    data = small_png(depth, form, row, struct.pack(f">{len(transparent)}H", *transparent))
    assert pixels(data)[0].tolist() == [[value] * 3 for value in expected]
    opened = Image.open(io.BytesIO(data))
    for _ in range(2):  # the second time, Pillow has loaded it
        assert np.asarray(as_rgb(opened))[0].tolist() == [[value] * 3 for value in expected]


def test_grey_that_is_no_number_does_not_decide_the_scale():
    for odd in (np.nan, np.inf, -np.inf):
        grey = np.full((2, 2), 0.5, np.float32)
        grey[0, 0] = odd
        assert pixels(encoded(Image.fromarray(grey), "TIFF"))[1, 1].tolist() == [128] * 3


@pytest.mark.parametrize("value", [-1, 65_536, (1 << 31) - 1])
def test_integer_grey_of_more_than_16_bits_is_named(value: int):
    data = encoded(Image.fromarray(np.array([[0, value]], np.int32)), "TIFF")
    with pytest.raises(CorruptSample, match=re.escape(f"integer grey of {value:,}")):
        read_picture(data)
    largest = encoded(Image.fromarray(np.array([[0, 65_535]], np.int32)), "TIFF")
    assert pixels(largest)[0].tolist() == [[0] * 3, [255] * 3]


def test_grey_with_premultiplied_alpha_is_converted():
    assert as_rgb(Image.new("La", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("written", ['"6"', "'6'", ' = "6"', "= '6'"])
def test_xmp_is_read_in_every_way_of_quoting(written: str):
    written = written if "=" in written else f"={written}"
    assert from_xmp(f"<x tiff:Orientation{written}/>".encode()) == 6
