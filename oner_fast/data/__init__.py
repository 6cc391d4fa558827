"""Image-text pairs: tar shards with an index, an exactly resumable order, decoding, tokenizer, masks, packing.

Nothing is imported here, so that `import oner_fast.data` costs nothing. The modules, in the order the data takes:

* `tar_index`, `dataset`: webdataset and img2dataset tars, read at random through an index of offsets
* `permutation`, `substitution`: which sample stands where, a pure function of (seed, step)
* `images`, `tokenizer`, `packing`: pictures to uint8 tensors, captions to packed token ids
* `batch`, `loader`, `workers`, `streaming`: what a training step receives
* `word_masks`: the masks of MLM (those of patches are an op, `oner_fast.ops.patch_masks`)
"""
