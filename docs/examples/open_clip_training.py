"""Train a CLIP by open_clip's own command, on its synthetic pairs, with our losses, patch dropout and attention.

Without arguments it trains a tiny model for a moment. Arguments are those of `python -m open_clip_train.main`:

    python docs/examples/open_clip_training.py
    torchrun --nproc-per-node 2 docs/examples/open_clip_training.py --model ViT-B-32 --dataset-type synthetic
"""

import json
import sys
import tempfile
from pathlib import Path

import open_clip
from open_clip_train.main import main

import oner_fast.integrations.open_clip

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SHORT = (
    "--model tiny --dataset-type synthetic --train-num-samples 32 --batch-size 8 --epochs 1 --warmup 1 --workers 0 "
    "--lr 1e-3 --log-every-n-steps 1"
)


if __name__ == "__main__":
    oner_fast.integrations.open_clip.patch()  # the one line
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tiny.json"
        config.write_text(json.dumps(TINY))
        open_clip.add_model_config(config)
        main(sys.argv[1:] or SHORT.split())
