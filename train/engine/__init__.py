"""The training loop and its parts, which know no model."""
