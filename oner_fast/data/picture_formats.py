"""The image formats that the library reads, and the suffixes of their files."""

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}

FORMATS = tuple(_SUFFIXES)
"""Pillow's names of the formats. No other format is ever opened, whatever a file is called."""

SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
"""Suffixes of image files in lower case, with the dot."""
