"""Text with the log-probabilities of its tokens, which stay with it wherever it is cut, and go where it goes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .events import Delta, Logprob


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: the part.
        tokens: log-probabilities with the characters [start, end) of `text` that their tokens have a share in.
        reasoning: whether it is the model's reasoning, and not its answer.
    """

    text: str
    tokens: tuple[tuple[int, int, Logprob], ...] = ()
    reasoning: bool = False

    @classmethod
    def of(cls, text: str, logprobs: Sequence[Logprob] = ()) -> Piece:
        """A chunk of the engine's.

        Tokens count from the chunk's end, because the engine tells the last token alone of a character that took
        several. Without a text to stay with, none can be said to be no hidden one: tokens that are not what the
        text ends in are dropped, all of the chunk.
        """
        data = text.encode("utf-8", "surrogatepass")
        said = b"".join(each.bytes for each in logprobs)
        if not said or not data.endswith(said):
            return cls(text)
        counted = _characters(data)
        start, tokens = len(data) - len(said), []
        for each in logprobs:
            end = start + len(each.bytes)
            if end > start:
                tokens.append((counted[start + 1] - 1, counted[end], each))
            start = end
        return cls(text, tuple(tokens))

    def __getitem__(self, part: slice) -> Piece:
        """Some of it, without the tokens that reach over its ends."""
        start, end, _ = part.indices(len(self.text))
        kept = ((a - start, b - start, each) for a, b, each in self.tokens if start <= a and b <= end)
        return Piece(self.text[start:end], tuple(kept), self.reasoning)

    def boundary(self, at: int) -> int:
        """The last place, `at` or before it, where no token is cut."""
        for start, end, _ in reversed(self.tokens):
            if start < at < end:
                at = start
        return at

    def delta(self, choice: int) -> Delta:
        """It as an event of the answer `choice`."""
        logprobs = tuple(each for _, _, each in self.tokens)
        if self.reasoning:
            return Delta(choice, reasoning=self.text, logprobs=logprobs)
        return Delta(choice, text=self.text, logprobs=logprobs)


def _characters(data: bytes) -> list[int]:
    """How many characters have begun in the first i bytes of UTF-8, for each i."""
    counted = [0]
    for byte in data:
        counted.append(counted[-1] + (byte & 0xC0 != 0x80))
    return counted


def joined(pieces: Iterable[Piece]) -> Piece:
    """One piece of several of a kind."""
    texts: list[str] = []
    tokens: list[tuple[int, int, Logprob]] = []
    length = 0
    for piece in pieces:
        tokens += [(start + length, end + length, each) for start, end, each in piece.tokens]
        texts.append(piece.text)
        length += len(piece.text)
    return Piece("".join(texts), tuple(tokens))


def unfinished(text: str, wanted: Collection[str]) -> int:
    """Where the longest end of `text` begins that one of `wanted` begins with, but is not whole; else len(text)."""
    longest = max((len(each) for each in wanted), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        end = text[start:]
        if any(each != end and each.startswith(end) for each in wanted):
            return start
    return len(text)


def first(text: str, wanted: Collection[str]) -> tuple[int, str] | None:
    """Where the earliest of `wanted` begins in `text`, and which; the shortest of several there. None for none."""
    found = min(((text.find(each), len(each), each) for each in wanted if each in text), default=None)
    return None if found is None else (found[0], found[2])
