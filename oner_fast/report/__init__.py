"""The report of a run: one self-contained page of images and figures, and the same charts as PNG files."""
