"""OneR: one transformer for images and text."""
