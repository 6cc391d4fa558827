"""Evaluation: retrieval, zero-shot classification, word-patch localisation and the modality gap.

A figure of OneR names the space in which it was measured (`spaces`).

All modules work on embeddings or on a loaded model (`oner_fast.load`), and none imports a trainer. `retrieval`,
`zero_shot`, `localisation` and `modality_gap` need torch alone; reading images needs the `train` extra.
"""
