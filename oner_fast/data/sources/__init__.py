"""Builders of datasets on disk: tar shards in webdataset's format with a `dataset.json` beside them.

* `pictograms`: emoji and icons from PyPI packages, the data of the demo
* `icons`: a larger set, drawn from npm packages
* `pairs`, `tables` and the modules `pair_...`: a user's own images and captions
* `concepts`: the concept of a caption, and the split that it belongs to
* `rendering`, `drawings`, `building`, `owned_files`, `writer`, `progress`, `npm`: parts that the builders share
* `cli`, `commands`: `oner-fast data ...`
"""
