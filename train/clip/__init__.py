"""CLIP with two towers, and the contrastive second stage of UTA."""
