"""OneR: one transformer tower for images, text and image+text (Jang et al., AAAI 2023, arXiv 2211.11153)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from oner_fast.nn import packed_rows
from oner_fast.nn.embeddings import PatchEmbedding, WordEmbedding
from oner_fast.nn.heads import Projector
from oner_fast.nn.transformer import Kept, Sequences, Trunk

PassName = Literal["image", "text", "image_text", "image_given_text", "text_given_image"]
_CONTEXT: dict[PassName, PassName] = {"image_given_text": "text_given_image", "text_given_image": "image_given_text"}


@dataclass(frozen=True)
class OneRConfig:
    """Sizes of the tower. The defaults, ViT-B/16 at 224 px with BERT's vocabulary, are our choice."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    vocab_size: int = 30522
    max_text_tokens: int = 78
    embed_dim: int = 256
    projector_hidden: int = field(default=4096, metadata={"least": 0})
    """Width of the two hidden layers of the projection head; 0 for a linear one."""
    shared_trunk: bool = True
    """False: one trunk for each modality, the two-tower row of the comparison (no image+text pass)."""
    shared_head: bool = True
    """False: one projection head for each modality, the row "one trunk, two heads" of the comparison."""
    grad_checkpointing: bool = False
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageInput:
    """Images of a pass.

    Attributes:
        images: (B, 3, S, S) uint8 or floating.
        cells: (B, M) int64, the patches to embed; all where None.
        masked: (B, M) bool, the patches shown as the mask token, the same number in each image; none where None.
        masked_count: that number, where the host knows it. Where None, it is read from `masked`: a GPU is waited for.
    """

    images: Tensor
    cells: Tensor | None = None
    masked: Tensor | None = None
    masked_count: int | None = None


@dataclass(frozen=True)
class TextInput:
    """Texts of a pass.

    Attributes:
        input_ids: (T,) int64 of packed captions without special tokens.
        cu_seqlens: (B + 1,) int32, their boundaries.
        longest: an upper bound of their lengths, where the host knows one better than the number of positions.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    longest: int | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass of the framework: F(I), F(T), F(I,T), F(I|T) or F(T|I).

    F(I|T) and F(T|I) run together, layer by layer, so both must be given.
    """

    name: PassName
    image: ImageInput | None = None
    text: TextInput | None = None

    def shown(self) -> tuple[ImageInput | None, TextInput | None]:
        """The inputs of this pass's own sequences; a context pass may also hold the other modality."""
        image = self.image if self.name in ("image", "image_text", "image_given_text") else None
        return image, self.text if self.name in ("text", "image_text", "text_given_image") else None


class Wanted(NamedTuple):
    """Outputs of a pass that are read, besides [CLS].

    Attributes:
        patches: rows (P,) int64 into the pass's B M patches; None for no patch.
        words: rows (W,) int64 into its T words; None for no word.
    """

    patches: Tensor | None = None
    words: Tensor | None = None


class PassOutput(NamedTuple):
    """Outputs of the trunk after the final norm: [CLS] (B, D), patches (B, M, D) or None, words (T, D) or None.

    Where a `Wanted` chose outputs, patches are (P, D) and words (W, D), in its order.
    """

    cls: Tensor
    patches: Tensor | None
    words: Tensor | None


class OneR(nn.Module):
    """The unified tower: input maps, one trunk, one projection head.

    No block, token or type embedding belongs to one modality.
    """

    def __init__(self, config: OneRConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.image_size, config.patch_size, config.width, config.image_mean, config.image_std
        )
        self.word_embedding = WordEmbedding(config.vocab_size, config.max_text_tokens, config.width)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.trunk = self._trunk()
        self.text_trunk = None if config.shared_trunk else self._trunk()
        self.head = self._head()
        self.text_head = None if config.shared_head else self._head()

    def _trunk(self) -> Trunk:
        c = self.config
        return Trunk(c.width, c.depth, c.heads, c.mlp_ratio, c.grad_checkpointing)

    def _head(self) -> Projector:
        return Projector(self.config.width, self.config.projector_hidden, self.config.embed_dim)

    def forward(
        self, passes: Sequence[Pass], wanted: Mapping[PassName, Wanted] | None = None
    ) -> dict[PassName, PassOutput]:
        """Run all `passes` as one packed variable-length batch (one for each trunk where there are two), by name.

        With `wanted`, only these outputs and [CLS] are computed; a pass that it does not name gives [CLS] alone. The
        last block then computes no more than they need.

        Raises:
            ValueError: a pass is given twice or without its input, a context pass without the other one, the numbers of
                images and captions differ, or two trunks cannot run a pass.
        """
        _check(passes)
        if self.text_trunk is None:
            return self._run(self.trunk, passes, wanted)
        texts = [each for each in passes if each.name == "text"]
        images = [each for each in passes if each.name == "image"]
        if len(texts) + len(images) != len(passes):
            raise ValueError("two trunks run the passes image and text only; set shared_trunk=True for the others")
        outputs: dict[PassName, PassOutput] = {}
        for trunk, part in ((self.trunk, images), (self.text_trunk, texts)):
            if part:
                outputs |= self._run(trunk, part, wanted)
        return outputs

    def _run(
        self, trunk: Trunk, passes: Sequence[Pass], wanted: Mapping[PassName, Wanted] | None
    ) -> dict[PassName, PassOutput]:
        table = _RowTable(self)
        packed = [table.pack(each) for each in passes]
        lengths = torch.cat([each.lengths for each in packed])
        cu_seqlens = packed_rows.cumulative(lengths)
        rows = torch.cat([each.rows for each in packed])
        tokens = packed_rows.select_rows(table.rows(), rows)
        longest = max(self._longest(each) for each in passes)
        sequences = _sequences(passes, packed, cu_seqlens, rows.shape[0], longest)
        sizes = [each.rows.shape[0] for each in packed]
        places = [_places(each, size) for each, size in zip(passes, sizes, strict=True)]
        if wanted is None:
            parts = trunk(tokens, sequences).split(sizes)
            return {each.name: place.take(part) for each, place, part in zip(passes, places, parts, strict=True)}
        chosen = [place.choose(wanted.get(each.name, Wanted())) for each, place in zip(passes, places, strict=True)]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        kept = torch.cat([place.all() + start for place, start in zip(chosen, starts, strict=True)]).sort().values
        hidden = trunk(tokens, sequences, Kept(kept, torch.searchsorted(kept, cu_seqlens.long()).to(torch.int32)))
        return {
            each.name: place.moved(kept, start).take(hidden)
            for each, place, start in zip(passes, chosen, starts, strict=True)
        }

    def _longest(self, each: Pass) -> int:
        """Bound the length of a pass's sequences, on the host."""
        image, text = each.shown()
        count = 1
        if image is not None:
            grid = image.images.shape[-1] // self.config.patch_size
            count += grid**2 if image.cells is None else image.cells.shape[1]
        if text is not None:
            count += self.config.max_text_tokens if text.longest is None else text.longest
        return count

    def project(self, cls: Tensor, name: PassName) -> Tensor:
        """Project outputs (..., D) of the named pass by its head: (..., embed_dim), not normalised."""
        head = self.text_head if self.text_head is not None and name == "text" else self.head
        return head(cls)

    def project_cls(self, outputs: Mapping[PassName, PassOutput]) -> dict[PassName, Tensor]:
        """Project the [CLS] of each pass: (B, embed_dim), not normalised.

        Each head makes one product for all of its passes.
        """
        found: dict[PassName, Tensor] = {}
        texts = [name for name in outputs if self.text_head is not None and name == "text"]
        for names in (texts, [name for name in outputs if name not in texts]):
            if names:
                cls = [outputs[name].cls for name in names]
                projected = self.project(torch.cat(cls), names[0]).split([each.shape[0] for each in cls])
                found |= dict(zip(names, projected, strict=True))
        return {name: found[name] for name in outputs}

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, S, S), uint8 or floats in [0, 1]: the projected F(I), (B, embed_dim), not normalised.

        S may be any multiple of the patch size: positions of another grid than the configuration's are resampled.
        """
        return self._encode(Pass("image", image=ImageInput(images)))

    def encode_text(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed packed captions (T,), (B + 1,): the projected F(T), (B, embed_dim), not normalised."""
        return self._encode(Pass("text", text=TextInput(input_ids, cu_seqlens)))

    def encode_image_text(self, images: Tensor, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed image-text pairs: the projected F(I,T), (B, embed_dim), not normalised."""
        return self._encode(Pass("image_text", ImageInput(images), TextInput(input_ids, cu_seqlens)))

    def encode_patches(self, images: Tensor) -> Tensor:
        """Project each patch output of F(I): (B, N, embed_dim), row-major, not normalised."""
        patches = self([Pass("image", image=ImageInput(images))])["image"].patches
        assert patches is not None
        return self.project(patches, "image")

    def _encode(self, single: Pass) -> Tensor:
        return self.project(self([single], {})[single.name].cls, single.name)


class _RowTable:
    """The embedded rows of a step: [CLS] in row 0, then each distinct image or text input once."""

    def __init__(self, tower: OneR) -> None:
        self.tower = tower
        self.parts = [tower.cls_token.unsqueeze(0)]
        self.count = 1
        self.first: dict[int, tuple[int, tuple[int, ...]]] = {}

    def pack(self, each: Pass) -> packed_rows.Packed:
        image, text = each.shown()
        if image is not None:
            first_patch, (count, tokens) = self._image(image)
            if text is None:
                return packed_rows.pack_images(count, tokens, first_patch, self.parts[0].device)
        if text is None:
            raise ValueError(f"pass {each.name} has neither image nor text")
        first_word, (words,) = self._text(text)
        if image is None:
            return packed_rows.pack_texts(text.cu_seqlens, words, first_word)
        return packed_rows.pack_pairs(text.cu_seqlens, words, tokens, first_patch, first_word)

    def rows(self) -> Tensor:
        return torch.cat(self.parts)

    def _image(self, image: ImageInput) -> tuple[int, tuple[int, ...]]:
        if id(image) not in self.first:
            tokens = self.tower.patch_embedding(image.images, image.cells, image.masked, image.masked_count)
            self._add(id(image), tokens.flatten(0, 1), (tokens.shape[0], tokens.shape[1]))
        return self.first[id(image)]

    def _text(self, text: TextInput) -> tuple[int, tuple[int, ...]]:
        if id(text) not in self.first:
            tokens = self.tower.word_embedding(text.input_ids, text.cu_seqlens)
            self._add(id(text), tokens, (tokens.shape[0],))
        return self.first[id(text)]

    def _add(self, key: int, rows: Tensor, shape: tuple[int, ...]) -> None:
        self.first[key] = (self.count, shape)
        self.parts.append(rows)
        self.count += rows.shape[0]


def _sequences(
    passes: Sequence[Pass], packed: Sequence[packed_rows.Packed], cu_seqlens: Tensor, total: int, longest: int
) -> Sequences:
    """Let context passes take their keys from each other's sequences, and all other passes from their own."""
    names = [each.name for each in passes]
    if not any(name in _CONTEXT for name in names):
        return Sequences(cu_seqlens, longest=longest)
    counts = [each.lengths.shape[0] for each in packed]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    device = cu_seqlens.device
    sources = [names.index(_CONTEXT.get(name, name)) for name in names]
    order = torch.cat(
        [torch.arange(starts[source], starts[source] + counts[source], device=device) for source in sources]
    )
    cu_seqlens_k = packed_rows.cumulative(cu_seqlens.diff().long().index_select(0, order))
    return Sequences(cu_seqlens, packed_rows.rows_of_sequences(cu_seqlens, order, total), cu_seqlens_k, longest)


class _Places(NamedTuple):
    """Packed rows that hold a pass's outputs: for [CLS] (B,), for patches and for words, in the outputs' shapes."""

    cls: Tensor
    patches: Tensor | None
    words: Tensor | None

    def choose(self, wanted: Wanted) -> _Places:
        patches, words = wanted
        if (patches is not None and self.patches is None) or (words is not None and self.words is None):
            raise ValueError("wanted names patches or words of a pass that has none")
        return _Places(
            self.cls,
            None if patches is None or self.patches is None else self.patches.flatten().index_select(0, patches),
            None if words is None or self.words is None else self.words.index_select(0, words),
        )

    def all(self) -> Tensor:
        return torch.cat([each.flatten() for each in self if each is not None])

    def moved(self, kept: Tensor, start: int) -> _Places:
        """Find the rows among `kept`, ascending rows of the batch, in which this pass begins at `start`."""
        cls, patches, words = (None if each is None else torch.searchsorted(kept, each + start) for each in self)
        assert cls is not None
        return _Places(cls, patches, words)

    def take(self, hidden: Tensor) -> PassOutput:
        def rows(places: Tensor) -> Tensor:
            return hidden.index_select(0, places.flatten()).unflatten(0, places.shape)

        cls, patches, words = self
        return PassOutput(rows(cls), None if patches is None else rows(patches), None if words is None else rows(words))


def _places(each: Pass, size: int) -> _Places:
    """Find the rows of a pass whose packed outputs are `size` rows."""
    image, text = each.shown()
    if text is None:
        assert image is not None
        rows = torch.arange(size, device=image.images.device).view(image.images.shape[0], -1)
        return _Places(rows[:, 0], rows[:, 1:], None)
    device, count, words = text.cu_seqlens.device, text.cu_seqlens.shape[0] - 1, text.input_ids.shape[0]
    head = (size - words) // count
    starts = text.cu_seqlens[:-1].long() + torch.arange(count, device=device) * head
    words_at = torch.arange(words, device=device) + (packed_rows.sample_of_word(text.cu_seqlens, words) + 1) * head
    patches = starts.unsqueeze(1) + torch.arange(1, head, device=device) if head > 1 else None
    return _Places(starts, patches, words_at)


def _check(passes: Sequence[Pass]) -> None:
    if not passes:
        raise ValueError("passes must hold at least one pass")
    names = [each.name for each in passes]
    if len(set(names)) != len(names):
        raise ValueError(f"each pass may be given once, got {names}")
    for each in passes:
        image, text = each.shown()
        lacks_image = image is None and each.name in ("image", "image_text", "image_given_text")
        if lacks_image or (text is None and each.name in ("text", "image_text", "text_given_image")):
            raise ValueError(f"pass {each.name} needs {'an image' if lacks_image else 'a text'} input, got None")
        other = _CONTEXT.get(each.name)
        if other is not None and other not in names:
            raise ValueError(f"pass {each.name} runs together with {other}; give both")
        counts = {count for one in passes if one.name in (each.name, other) for count in _sample_counts(one)}
        if len(counts) > 1:
            together = each.name if other is None else f"{each.name} and {other}"
            raise ValueError(
                f"{together} need one caption for each image, got {' and '.join(map(str, sorted(counts)))}"
            )
        if counts == {0}:
            raise ValueError(f"pass {each.name} must hold at least one sample, got 0")


def _sample_counts(each: Pass) -> list[int]:
    """Numbers of images and of captions in a pass's own sequences."""
    image, text = each.shown()
    images = [] if image is None else [image.images.shape[0]]
    return images if text is None else [*images, text.cu_seqlens.shape[0] - 1]
