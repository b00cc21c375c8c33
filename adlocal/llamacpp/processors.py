"""Logits processors whose failure reaches the caller.

llama-cpp-python calls them from C: ctypes prints what they raise and goes on, and a token is sampled as if they were
not there. And `LogitsProcessorList.extend`, by which it adds a logit bias to a caller's processors, returns None, which
drops both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llama_cpp import LogitsProcessorList

from ..errors import InputError

Processor = Callable[[Any, Any], Any]


class Processors(LogitsProcessorList):
    """A list of processors that keeps the first failure, for the caller to raise before a token is emitted."""

    def __init__(self, processors: Iterable[Processor] = ()) -> None:
        super().__init__(processors)
        self.failure: BaseException | None = None

    @classmethod
    def of(cls, given: Any) -> Processors | None:
        """The list that a caller gives, checked; None for none.

        Raises:
            InputError: it is no list of functions.
        """
        if given is None or isinstance(given, Processors):
            return given
        if not isinstance(given, Sequence) or not all(map(callable, given)):
            raise InputError(f"logits_processor={given!r}: give a LogitsProcessorList of functions (input_ids, scores)")
        return cls(given)

    def extend(self, more: Iterable[Processor]) -> Processors:  # type: ignore[override]
        """As of a list, and returns the list: the caller of llama-cpp-python goes on with what it returns."""
        super().extend(more)
        return self

    def apply(self, input_ids: Any, scores: Any) -> Any:
        """The scores after all processors; as they are where one fails, for the token is not to be used then."""
        if self.failure is not None:
            return scores
        try:
            changed = scores
            for processor in list(self):
                changed = processor(input_ids, changed)
            return _as_scores(changed, len(scores))
        except BaseException as failure:  # Ctrl-C too: C swallows whatever leaves this function
            self.failure = failure
            return scores

    def raise_failure(self) -> None:
        """Raises what a processor raised, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def _as_scores(changed: Any, n: int) -> Any:
    found = np.asarray(changed, dtype=np.float32)
    if found.shape != (n,):
        raise InputError(f"a logits processor returned scores of shape {found.shape}, expected ({n},)")
    return found
