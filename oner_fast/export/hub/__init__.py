"""Files that an exported folder for transformers holds as they are; they import nothing of this package."""
