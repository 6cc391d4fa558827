"""The concept of a caption, and the split that follows from it: training never sees a concept of a validation split."""

import hashlib
import re
import unicodedata

STOP_WORDS = frozenset(
    {"a", "an", "and", "at", "by", "for", "from", "in", "into", "of", "on", "or", "the", "to", "with"}
)
VALIDATION_PERCENT = 8
# Where a word is in this list, its concept reads well; which words are one concept does not depend on the list.
_IN_IE = frozenset(
    {
        "beanie", "birdie", "brownie", "calorie", "collie", "cookie", "eerie", "foodie", "genie", "goalie",
        "hippie", "hoodie", "indie", "junkie", "magpie", "movie", "necktie", "newbie", "pixie", "prairie", "rookie",
        "selfie", "smoothie", "sortie", "veggie", "walkie", "zombie"
    }
)  # fmt: skip
SPLIT_RULE = 2
"""Version of what decides the split of a sample: the concept of its caption, and the pictures that are nearly equal."""

_WORD = re.compile(r"[^\W\d_]+")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": None, "\u201d": None})


def singular(word: str) -> str:
    """Remove a plural s; short words and words in -ss ("us", "glass") stay as they are.

    "batteries" and "battery" give one word, and so do "zombies" and "zombie": of longer words, an ending -ie and an
    ending -y are the same, written -ie for the words of `_IN_IE`.
    """
    one = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    if len(one) <= 3 or not one.endswith(("ie", "y")):
        return one
    stem = one[:-2] if one.endswith("ie") else one[:-1]
    return f"{stem}ie" if f"{stem}ie" in _IN_IE else f"{stem}y"


def concept(caption: str) -> str:
    """Lower-cased words of `caption` without digits, stop words and plural s, sorted and joined by blanks.

    "Batteries 10" and "battery 20" are one concept, and so are "arrow down" and "down arrow", and the two ways in which
    Unicode composes an accented letter. A caption without such a word ("24", "to") is its own concept.
    """
    text = unicodedata.normalize("NFC", caption).lower().translate(_QUOTES).replace("'s", "")
    words = sorted(singular(word) for word in _WORD.findall(text) if word not in STOP_WORDS)
    return " ".join(words) or text.strip()


def percentile(text: str) -> int:
    """Compute sha1(text) mod 100: a number in [0, 100) that never changes."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()) % 100


def split_of(caption: str, percent: int = VALIDATION_PERCENT) -> str:
    """ "val" where sha1(concept of the caption) mod 100 < `percent`, else "train"."""
    return "val" if percentile(concept(caption)) < percent else "train"


def caption_of_name(name: str) -> str:
    """Turn a file or icon name into words: "arrow-down_bold" and "arrowDown Bold" give "arrow down bold"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.translate(_QUOTES))
    return " ".join(re.sub(r"[-_:/\s]+", " ", spaced).lower().split())
