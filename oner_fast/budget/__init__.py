"""Estimates of a training step on GPUs, from counts and named assumptions; nothing here is measured."""
