"""`oner-fast ablate`: the rows of OneR's ablation and of UTA's masks, with seeds, in one resumable command each."""
