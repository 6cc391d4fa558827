"""`oner-fast export`: a run's tower as a folder for plain PyTorch, for transformers, or as ONNX."""
