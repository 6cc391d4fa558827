"""One OneR training step: ours, and the same step in plain PyTorch, eager and compiled."""
