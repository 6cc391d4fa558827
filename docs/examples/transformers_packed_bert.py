"""Train a small BERT on sentences packed into one row, so that no padding is computed.

python transformers_packed_bert.py [--steps N]

transformers' own collator packs the sentences. BERT tells them apart by positions that restart, which SDPA does not
look at: there every sentence would attend to all others.
"""

import argparse

import torch
from torch import Tensor

from oner_fast.integrations.transformers import register

register()  # the one line; then attn_implementation="oner_fast"

from transformers import AutoModelForMaskedLM, BertConfig, DataCollatorWithFlattening  # noqa: E402

MASK, WORDS = 1, 16


def sentences(count: int) -> list[dict[str, list[int]]]:
    """Draw sentences of 3 to 12 words, each of which says one word again and again."""
    lengths, words = torch.randint(3, 13, (count,)).tolist(), torch.randint(2, WORDS, (count,)).tolist()
    return [{"input_ids": [word] * length} for word, length in zip(words, lengths, strict=True)]


def hide(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace about every fifth word by a mask, and ask for it."""
    hidden = torch.rand(row["input_ids"].shape) < 0.2
    labels = torch.where(hidden, row["input_ids"], -100)
    return {**row, "input_ids": torch.where(hidden, MASK, row["input_ids"]), "labels": labels}


def main(steps: int) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="oner_fast")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    pack = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    losses = []
    for _ in range(steps):
        loss = model(**hide(pack(sentences(32)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
