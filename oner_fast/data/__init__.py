"""Image-text pairs: indexed tar shards, an exactly resumable order, decoding, tokenizer, masks and packing.

Importing this package imports none of its modules. They are, in the order in which the data passes them:

* `tar_index`, `dataset`: random access to webdataset and img2dataset tars through an index of offsets
* `permutation`, `substitution`: the sample at each place of a batch, a pure function of (seed, step)
* `images`, `tokenizer`, `ragged`: images to uint8 tensors, captions to packed token ids
* `batch`, `loader`, `workers`, `streaming`: the batches of a training step
* `word_masks`: the masks of MLM (masks of patches are an op, `oner_fast.ops.patch_masks`)
"""
