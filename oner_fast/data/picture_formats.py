"""The image formats that the library reads, and the suffixes of their files."""

SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
"""Suffixes of the files of each format, by Pillow's name of it; the usual one first."""

FORMATS = tuple(SUFFIXES_OF)
"""Pillow's names of the formats. No other format is ever opened, whatever a file is called."""

SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
"""Suffixes of image files in lower case, with the dot."""
