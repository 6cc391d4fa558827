"""Evaluation: retrieval, zero-shot classification, word-patch localisation and the modality gap.

Everything here works on embeddings or on a loaded model (`oner_fast.load`) and knows no trainer. The modules
`retrieval`, `zero_shot`, `localisation` and `modality_gap` need torch alone; reading images needs the `train` extra.
"""
