"""Builders of datasets on disk: tar shards in webdataset's format with a `dataset.json` beside them.

* `pictograms`: emoji and icons that PyPI packages ship, the data of the demo
* `icons`: the larger set, drawn from npm packages
* `pairs`: a user's own pictures and captions
* `concepts`: what a caption is about, and which split that puts it in
* `rendering`, `pictures`, `building`, `writer`, `progress`, `npm`: the parts the builders share
* `cli`: `oner-fast data ...`
"""
