"""The report of a run: one self-contained page of pictures and figures, and the same charts as PNG files."""
