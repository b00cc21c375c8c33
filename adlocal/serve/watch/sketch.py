"""Sketches of prompts: what stays of a text that is not kept.

The skeleton of a prompt is its words in lower case, where numbers, quoted spans and words of ten letters or more are
masked: two requests from one template differ in what is masked and in what the template was filled with. Three
MinHash signatures stand for it: of its first eight words and of its last eight, where a template begins and ends, and
of all its words, which is its content.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 64
ENDS = 8
#: Words of each end of a longer prompt: more cost time and say little.
MOST_WORDS = 512
#: Shares of equal signature entries from which two ends are of one template, and two contents the same.
SAME_TEMPLATE, SAME_CONTENT = 0.5, 0.8

Signature = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint64]

_QUOTED = re.compile(r"\"[^\"\n]{1,2000}\"|“[^”\n]{1,2000}”|`[^`]{1,2000}`")
_WORD = re.compile(r"[^\W_][\w'’]*")
_LONG = 10
_MULTIPLIERS, _OFFSETS = np.random.default_rng(1805_02628).integers(1, 2**63, (2, PERMUTATIONS), dtype=np.uint64)
_MULTIPLIERS = _MULTIPLIERS * np.uint64(2) + np.uint64(1)
_EMPTY = np.full(PERMUTATIONS, 0xFFFF, np.uint16)


@dataclass(frozen=True)
class Sketch:
    """Signatures of a prompt, each of shape (64,).

    Attributes:
        head, tail: of its first and last words.
        content: of all of them.
    """

    head: Signature
    tail: Signature
    content: Signature

    def to_bytes(self) -> bytes:
        """384 bytes."""
        return np.concatenate((self.head, self.tail, self.content)).astype("<u2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: it is of another length.
        """
        head, tail, content = np.frombuffer(data, "<u2").astype(np.uint16).reshape(3, PERMUTATIONS)
        return cls(head, tail, content)


def skeleton(prompt: str) -> list[str]:
    """The words of a prompt, masked: "0" for a number, "Q" for a quoted span, "W" for a long word."""
    half = 16 * MOST_WORDS  # characters; a text may be one endless word
    text = prompt if len(prompt) <= 2 * half else f"{prompt[:half]} {prompt[-half:]}"
    words = [_masked(word) for word in _WORD.findall(_QUOTED.sub(" QUOTEDSPAN ", text))]
    return words if len(words) <= 2 * MOST_WORDS else words[:MOST_WORDS] + words[-MOST_WORDS:]


def sketch(prompt: str) -> Sketch:
    """The sketch of a prompt. An empty one has a sketch of its own."""
    words = skeleton(prompt)
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    content = signature(hashes)
    if len(words) <= ENDS:
        end = signature(_with_pairs(hashes))
        return Sketch(end, end, content)
    return Sketch(signature(_with_pairs(hashes[:ENDS])), signature(_with_pairs(hashes[-ENDS:])), content)


def signature(hashes: Hashes) -> Signature:
    """MinHash: for each of 64 random functions, the low 16 bits of its least value over a set.

    The share of equal entries of two signatures estimates |A ∩ B| / |A ∪ B| with a standard error of at most 1/16.

    Args:
        hashes: shape (n,), of the set's members, 32 bits each; any may come twice.
    """
    if not len(hashes):
        return _EMPTY
    mixed = np.multiply.outer(hashes, _MULTIPLIERS) + _OFFSETS
    least: Hashes = (mixed >> np.uint64(32)).min(axis=0)
    return (least & np.uint64(0xFFFF)).astype(np.uint16)


def similarities(many: Signature, one: Signature) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarities: shape (n, 64) against (64,) gives (n,)."""
    found: npt.NDArray[np.float64] = np.count_nonzero(many == one, axis=-1) / PERMUTATIONS
    return found


def _masked(word: str) -> str:
    if word == "QUOTEDSPAN":
        return "Q"
    if any(map(str.isdigit, word)):
        return "0"
    return "W" if len(word) >= _LONG else word.lower()


def _with_pairs(hashes: Hashes) -> Hashes:
    """Words and pairs of neighbours, so that order counts."""
    pairs = (hashes[:-1] * np.uint64(0x9E3779B1) + hashes[1:]) & np.uint64(0xFFFFFFFF)
    return np.concatenate((hashes, pairs))
