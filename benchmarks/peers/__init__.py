"""Baselines from packages beside PyTorch: flash-attn, xFormers and NVIDIA's apex, where they are installed.

A package is found without being imported, and imported when one of its contenders is first called. All of them need a
CUDA GPU.
"""
