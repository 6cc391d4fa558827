"""`oner-fast ablate oner`: the rows of OneR's ablation and its open factors, with seeds, in one resumable command."""
