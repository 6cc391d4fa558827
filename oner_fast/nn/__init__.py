"""Modules built from the ops: embeddings of visible patches, the packed transformer, the heads, losses."""
