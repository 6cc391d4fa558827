"""UTA: a vision transformer whose tokens are aligned to those of a frozen CLIP."""
