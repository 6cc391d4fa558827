"""The student: the tower with what only training needs (predictor, masked-word and masked-patch heads, temperature)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast import ops
from oner_fast.models.contrast import Contrast
from oner_fast.models.oner import OneR, OneRConfig, PassName, PassOutput
from oner_fast.nn.heads import MaskedPatchHead, MaskedWordHead, Predictor, normalised_pixels
from oner_fast.train.config.common import MIN_TEMPERATURE
from oner_fast.train.oner.initial_gap import open_gap
from oner_fast.train.oner.inputs import StudentInput
from oner_fast.train.oner.settings import Objectives


class StudentOutput(NamedTuple):
    """The student's output for a micro-batch.

    Attributes:
        embeddings: (B, E) of each pass, not normalised.
        logit_scale: 0-d.
        mlm_sum: sum of the masked-word losses, 0-d.
        mim_sum: sum of the masked-patch losses, 0-d.
    """

    embeddings: dict[PassName, Tensor]
    logit_scale: Tensor
    mlm_sum: Tensor
    mim_sum: Tensor


class Student(nn.Module):
    """The tower with predictor, heads and temperature; `forward` runs all passes as one packed batch."""

    def __init__(self, config: OneRConfig, objectives: Objectives) -> None:
        super().__init__()
        self.tower = OneR(config)
        self.predictor = Predictor(config.embed_dim, objectives.predictor_hidden) if objectives.predicts else None
        self.text_predictor = (
            Predictor(config.embed_dim, objectives.predictor_hidden)
            if objectives.predicts and objectives.predictor == "per_head"
            else None
        )
        self.word_head = MaskedWordHead(config.width, config.vocab_size) if objectives.mlm else None
        patch_pixels = len(config.image_mean) * config.patch_size**2
        self.patch_head = MaskedPatchHead(config.width, patch_pixels) if objectives.mim else None
        self.contrastive = objectives.contrastive
        self.log_logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / objectives.temperature)),
            requires_grad=objectives.learnable_temperature and self.contrastive,
        )
        if objectives.equal_heads and self.tower.text_head is not None:
            self.tower.text_head.load_state_dict(self.tower.head.state_dict())
        if objectives.init_gap:
            open_gap(self.tower, objectives.init_gap)
        # Parameters that no loss reaches take no gradient: the other ranks would wait for one.
        mask_token = self.tower.patch_embedding.mask_token
        assert mask_token is not None
        mask_token.requires_grad_(self.patch_head is not None)
        for head in (self.tower.head, self.tower.text_head):
            if head is not None:
                head.requires_grad_(self.contrastive)

    def forward(self, inputs: StudentInput) -> StudentOutput:
        """Compute the embeddings (B, embed_dim) of each pass and the sums of the masked losses."""
        outputs = self.tower(inputs.passes, inputs.wanted())
        embeddings: dict[PassName, Tensor] = {}
        if self.contrastive:
            embeddings = self.contrast.predicted(self.tower.project_cls(outputs))
        scale = self.log_logit_scale.exp()
        return StudentOutput(embeddings, scale, self._mlm(inputs, outputs), self._mim(inputs, outputs))

    @property
    def contrast(self) -> Contrast:
        """The predictors, without a teacher."""
        return Contrast(self.predictor, self.text_predictor, None)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep a learnt logit_scale at 100 at most, as CLIP does; call it after the optimiser's step."""
        self.log_logit_scale.clamp_(max=math.log(1 / MIN_TEMPERATURE))

    def _mlm(self, inputs: StudentInput, outputs: dict[PassName, PassOutput]) -> Tensor:
        """Sum the cross-entropies of the masked words."""
        if self.word_head is None:
            return torch.zeros((), device=self.log_logit_scale.device)
        hidden = [_chosen(outputs[name].words) for name in inputs.words]
        ids = torch.cat([each.ids for each in inputs.words.values()])
        logits = self.word_head(torch.cat(hidden), self.tower.word_embedding.words.weight)
        return F.cross_entropy(logits.float(), ids, reduction="sum")

    def _mim(self, inputs: StudentInput, outputs: dict[PassName, PassOutput]) -> Tensor:
        """Sum the mean absolute error of normalised pixels over masked patches."""
        if self.patch_head is None:
            return torch.zeros((), device=self.log_logit_scale.device)
        sums = []
        images = {each.name: each.image for each in inputs.passes}
        for name, targets in inputs.targets.items():
            image = images[name]
            if image is None:
                raise ValueError(f"pass {name} has masked patches but no image")
            patches = ops.gather_patches(image.images, targets.cells, self.tower.config.patch_size, dtype=torch.float32)
            target = normalised_pixels(patches).flatten(0, 1)
            sums.append((self.patch_head(_chosen(outputs[name].patches)).float() - target).abs().mean(dim=1).sum())
        return torch.stack(sums).sum()


def _chosen(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("the pass has no such tokens to predict")
    return tokens
