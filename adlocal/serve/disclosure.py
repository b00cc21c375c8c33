"""How much of a model's reasoning is shown. What is hidden leaves no trace: no text, log-probability or white space.

In the modes that hide, an answer is what follows its last close, up to the next open: what stands before a close is
reasoning, opened or not, because templates open blocks, models forget to, and some open a second one. So nothing before
a close is safe to show until it is known that none comes any more:

- Where the plugin forbids both tags after the first close (`banned`), everything after that is shown at once. Tags
  that the model spells in other tokens are text of the answer then, as in code that speaks of them. A close that it
  spells forbids nothing: only one that comes alone, in a chunk of one token, is taken for the token itself.
- Elsewhere all is held back until the answer ends. A close that the answer itself writes, in code, hides what is
  before it, and an open what is after it: parts of an answer may be lost, reasoning is never shown.

An answer that ends without a close is what stands before its first open, and nothing if the prompt opened a block.

`show` divides as llama-server does: a block that the answer begins with is reasoning, and all after it, further tags
too, is text. Reasoning loses the white space around it, an answer the blank lines before it.

A model can repeat its reasoning in its answer, by itself or because it is asked to. No reading of tags hides that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .aligned import Piece, first, joined, unfinished
from .events import Logprob
from .tags import Tags

Disclosure = Literal["show", "answer-only", "summary"]

#: What clients send reasoning of earlier answers back in.
FIELDS = frozenset({"reasoning", "reasoning_content", "thinking"})
WHITE = " \t\r\n"

#: hidden: nothing is safe to show yet. opening: of `show`, whether a block comes is unknown; before: it has begun,
#: its text has not. reasoning: its text. after: blank lines. plain: text goes through.
_State = Literal["hidden", "opening", "before", "reasoning", "after", "plain"]


class Splitter:
    """Parts the raw text of one answer, however it is chunked.

    Args:
        tags: of the model; None for one that does not reason: its text goes through as it is.
        disclosure: what is shown.
        starts_hidden: whether the prompt has opened a block (`tags.opens_hidden`). The engine may repeat the open.
        banned: whether both tags cannot come after the first close, be it the prompt's or the answer's.

    Attributes:
        hidden_tokens: of chunks up to a close, or within an open block, where reasoning is hidden. A chunk that ends a
            block counts whole.
        hidden_seconds: that passed before them.
        n_closes: closes that were read where reasoning is hidden.
    """

    def __init__(
        self, tags: Tags | None, disclosure: Disclosure, starts_hidden: bool = False, banned: bool = False
    ) -> None:
        self._tags = tags or Tags("", "")
        self._hides = disclosure != "show"
        self._banned = banned
        self._starts_hidden = self._open = starts_hidden
        self._closed = False
        self._rest = Piece("")  # not looked at to its end: a tag may have begun
        self._held: list[Piece] = []  # text outside of blocks, until it is known whether a close comes after it
        self._state: _State = "plain" if tags is None else "hidden" if self._hides else "opening"
        if self._state == "opening" and starts_hidden:
            self._state = "before"
        self._n_pending, self._s_pending = 0, 0.0
        self._last: float | None = None
        self._old = 0  # characters of what is read that came before the last chunk
        self._n_untold, self._is_token = 0, False  # tokens whose text has not come; whether a chunk is one token
        self.hidden_tokens = 0
        self.hidden_seconds = 0.0
        self.n_closes = 0

    @property
    def thinking(self) -> bool:
        """Whether a block is open. A call of a tool that comes now is one that the model has only thought of."""
        return self._open if self._state == "hidden" else self._state in ("before", "reasoning")

    @property
    def undecided(self) -> bool:
        """Whether what came so far may turn out to be reasoning, which is hidden."""
        return self._state == "hidden"

    def feed(self, text: str, logprobs: Sequence[Logprob] = (), n_tokens: int = 1, now: float = 0.0) -> list[Piece]:
        """What may be shown now.

        Args:
            text: the next chunk.
            logprobs: of its tokens, which are shown with the text that they are of, and with no other.
            n_tokens: that have come since the chunk before.
            now: seconds of a monotonic clock.
        """
        self._old = len(self._rest.text)
        self._n_untold += n_tokens
        if text:
            self._is_token, self._n_untold = self._n_untold == 1, 0
        work = joined([self._rest, Piece.of(text, logprobs)])
        self._rest = Piece("")
        self._count(n_tokens, now)
        shown = self._advance(work)
        if self._hides and self._open:
            self._hide_pending()
        return shown

    def end(self) -> list[Piece]:
        """The rest, once the answer has ended, for whatever reason."""
        rest, self._rest = self._rest, Piece("")
        state, self._state = self._state, "plain"
        if state == "hidden":
            return self._answer(rest)
        if state == "after":
            return []  # white space
        if state in ("before", "reasoning"):
            return _reasoning(_without_end(rest))
        return _some(rest)

    def _advance(self, work: Piece) -> list[Piece]:
        """Reads `work` as far as it can be, through the states that it leads to."""
        steps = {
            "hidden": self._hidden,
            "opening": self._opening,
            "before": self._before,
            "reasoning": self._reasoning,
            "after": self._after,
        }
        shown: list[Piece] = []
        following: Piece | None = work
        while following is not None and self._state != "plain":
            work = following
            pieces, following = steps[self._state](work)
            shown += pieces
        return shown if following is None else [*shown, *_some(following)]

    # Each of these returns what it shows, and what is left for the next state; None if more must come first.

    def _hidden(self, work: Piece) -> tuple[list[Piece], Piece | None]:
        tags = self._tags
        wanted = (tags.close,) if self._open else (tags.open, tags.close)
        found = first(work.text, wanted)
        if found is None:
            cut = work.boundary(unfinished(work.text, wanted))
            self._hold(work[:cut])
            self._rest = work[cut:]
            return [], None
        at, tag = found
        self._hold(work[:at])
        self._open = tag == tags.open
        if tag == tags.close:
            self._held = []
            self._closed = True
            self.n_closes += 1
            self._hide_pending()
            if self._banned and self._is_token and at >= self._old:
                self._state = "after"
        self._old = max(0, self._old - at - len(tag))
        return [], work[at + len(tag) :]

    def _opening(self, work: Piece) -> tuple[list[Piece], Piece | None]:
        stripped = work.text.lstrip(WHITE)
        tags = (self._tags.open, self._tags.close)
        begun = next((tag for tag in tags if stripped.startswith(tag)), None)
        if begun is not None:
            self._state = "before" if begun == self._tags.open else "after"
            return [], work[len(work.text) - len(stripped) + len(begun) :]
        if any(tag.startswith(stripped) for tag in tags):
            self._rest = work
            return [], None
        self._state = "plain"
        return [], work

    def _before(self, work: Piece) -> tuple[list[Piece], Piece | None]:
        stripped = work.text.lstrip(WHITE)
        open = self._tags.open if self._starts_hidden else ""  # which the engine may repeat
        if not stripped or (open != stripped and open.startswith(stripped)):
            self._rest = work
            return [], None
        start = len(work.text) - len(stripped)
        if open and stripped.startswith(open):
            self._starts_hidden = False
            return [], work[start + len(open) :]
        self._state = "reasoning"
        return [], work[start:]

    def _reasoning(self, work: Piece) -> tuple[list[Piece], Piece | None]:
        close = self._tags.close
        at = work.text.find(close)
        if at >= 0:
            self._state = "after"
            return _reasoning(_without_end(work[:at])), work[at + len(close) :]
        until = unfinished(work.text, (close,))
        cut = work.boundary(len(work.text[:until].rstrip(WHITE)))
        self._rest = work[cut:]
        return _reasoning(work[:cut]), None

    def _after(self, work: Piece) -> tuple[list[Piece], Piece | None]:
        if not work.text.strip(WHITE):
            self._rest = work
            return [], None
        self._state = "plain"
        return [], _without_blank_lines(work)

    def _answer(self, rest: Piece) -> list[Piece]:
        """What may be shown of an answer that was held back to its end."""
        self._hold(rest)
        answer = joined(self._held)
        if (self._open or self._closed) and not answer.text.strip(WHITE):
            return []
        return _some(_without_blank_lines(answer) if self._closed else answer)

    def _hold(self, piece: Piece) -> None:
        """Keeps what may turn out to be the answer. What stands in an open block never does, and is forgotten."""
        if not self._open:
            self._held.append(piece)

    def _count(self, n_tokens: int, now: float) -> None:
        if self._hides and self._state == "hidden":
            self._n_pending += n_tokens
            self._s_pending += 0.0 if self._last is None else now - self._last
        self._last = now

    def _hide_pending(self) -> None:
        self.hidden_tokens += self._n_pending
        self.hidden_seconds += self._s_pending
        self._n_pending, self._s_pending = 0, 0.0


def scrub(messages: Sequence[Mapping[str, Any]], tags: Tags | None) -> list[Mapping[str, Any]]:
    """Messages without the reasoning of earlier answers, in fields of its own or between tags in the text.

    For the modes that hide: such a client was given none, so it is made up, or another's. Left in, an open without a
    close would look like the template's own (`tags.opens_hidden`), and made-up turns would teach the model to reason
    where it is not hidden. Where reasoning is shown, clients may send back what they were sent; templates want it.
    """
    return [_scrubbed(each, tags) if each.get("role") == "assistant" else each for each in messages]


def _scrubbed(message: Mapping[str, Any], tags: Tags | None) -> Mapping[str, Any]:
    kept = {name: value for name, value in message.items() if name not in FIELDS}
    content = kept.get("content")
    if isinstance(content, list | tuple):
        content = "".join(part.get("text", "") for part in content)
    if tags is not None and isinstance(content, str) and (tags.open in content or tags.close in content):
        splitter = Splitter(tags, "answer-only")
        pieces = [*splitter.feed(content), *splitter.end()]
        kept["content"] = "".join(piece.text for piece in pieces)
    return kept


def _some(piece: Piece) -> list[Piece]:
    return [piece] if piece.text else []


def _reasoning(piece: Piece) -> list[Piece]:
    return _some(Piece(piece.text, piece.tokens, reasoning=True))


def _without_end(piece: Piece) -> Piece:
    """Without the white space that it ends in. That before reasoning is gone by then; some within it may come first."""
    return piece[: len(piece.text.rstrip(WHITE))]


def _without_blank_lines(piece: Piece) -> Piece:
    """The text from its first line on that is not blank, whose indentation stays."""
    n_white = len(piece.text) - len(piece.text.lstrip(WHITE))
    return piece[piece.text.rfind("\n", 0, n_white) + 1 :]
