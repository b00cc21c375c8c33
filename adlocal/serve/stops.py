"""Ends an answer at the client's stop texts. The engine is not told of them: in hidden text they count for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .aligned import Piece, first, joined, unfinished


class Cutter:
    """Cuts one answer before the earliest stop text, however the answer is chunked.

    Args:
        stops: texts; of several that begin at one place, the shortest counts. Empty ones are for the caller to refuse.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [each for each in stops if each]
        self._held = Piece("")
        self._ended = False

    def feed(self, pieces: Sequence[Piece]) -> tuple[list[Piece], str | None]:
        """What may be shown of the answer so far and has not been, and the stop text that ends it, if one does.

        Reasoning goes through as it is: stops are for the answer. After a stop nothing comes any more.
        """
        shown: list[Piece] = []
        for piece in pieces:
            if self._ended:
                break
            if piece.reasoning or not self._stops:
                shown.append(piece)
                continue
            stop = self._search(joined([self._held, piece]), shown, last=False)
            if stop is not None:
                return shown, stop
        return shown, None

    def end(self) -> tuple[list[Piece], str | None]:
        """The rest, once the answer has ended, and the stop text in it, if there is one."""
        shown: list[Piece] = []
        return shown, self._search(self._held, shown, last=True)

    def _search(self, text: Piece, shown: list[Piece], last: bool) -> str | None:
        found = first(text.text, self._stops)
        until = len(text.text) if last else unfinished(text.text, self._stops)
        if found is not None and (last or found[0] <= until):  # else one that began before it may yet come
            self._ended, self._held = True, Piece("")
            shown += _some(text[: found[0]])
            return found[1]
        cut = text.boundary(until)
        shown += _some(text[:cut])
        self._held = text[cut:]
        return None


def _some(piece: Piece) -> list[Piece]:
    return [piece] if piece.text else []
