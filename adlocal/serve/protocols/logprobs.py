"""Log-probabilities, as OpenAI writes them."""

from __future__ import annotations

import math
from typing import Any, Final

from ..events import Logprob

#: OpenAI's number for a token that cannot come: JSON has no infinity.
_NEVER: Final = -9999.0


def bounded(logprob: float) -> float:
    """Nats that JSON can hold."""
    return logprob if math.isfinite(logprob) and logprob > _NEVER else _NEVER


def with_rivals(logprob: Logprob) -> dict[str, Any]:
    """A token's log-probability with those of its rivals."""
    return {**_alone(logprob), "top_logprobs": [_alone(rival) for rival in logprob.top]}


def _alone(logprob: Logprob) -> dict[str, Any]:
    return {"token": logprob.token, "logprob": bounded(logprob.logprob), "bytes": list(logprob.bytes)}
