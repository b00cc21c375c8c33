"""What the watch is told of a request, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["chat", "completion"]
Action = Literal["none", "raise", "throttle", "block"]

#: The subject that all requests belong to.
ALL = "all"


@dataclass(frozen=True)
class Observation:
    """A request at its admission.

    Attributes:
        time: seconds since 1970.
        key: id of the key, never its secret.
        owner: of the key.
        user: whom a trusted front end asks for; None where it does not say.
        kind: of request.
        reasoning: whether the model is to think first.
        temperature: as it will be sampled; None where the engine decides.
        prompt: text of the last user message. Nothing of it is kept but its sketch.
        prompt_tokens: of the whole prompt, as far as they are known at admission.
        declared: what policy says that the key is for: "evaluation" is scored and shown, and raised only where
            `Actions.raise_evaluation` says so.
    """

    time: float
    key: str
    owner: str
    user: str | None = None
    kind: Kind = "chat"
    reasoning: bool = False
    temperature: float | None = None
    prompt: str = ""
    prompt_tokens: int = 0
    declared: Literal["evaluation"] | None = None


@dataclass(frozen=True)
class Outcome:
    """A request at its end.

    KL is left out: it follows the strength, which the watch itself moves, and so would prove itself right.

    Attributes:
        time: seconds since 1970.
        key, owner, user: as at admission.
        completion_tokens: of all its answers, hidden reasoning included.
        n_rows, n_choices: rows that were sampled from, and of these where two tokens or more passed the guard: a
            measure of the entropy that does not depend on the strength.
        dose: summed over its tokens.
        prompt_tokens: that `Observation.prompt_tokens` did not count.
    """

    time: float
    key: str
    owner: str
    user: str | None = None
    completion_tokens: int = 0
    n_rows: int = 0
    n_choices: int = 0
    dose: float = 0.0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Level:
    """What becomes of a request: one value from its admission to its end.

    Attributes:
        position: on the operator's ramp, 0 for the policy's strength and 1 for the highest; see `Ramp.strength`.
        action: the strongest that is due and allowed. Where it is "throttle" or "block", `position` holds as well.
        score: 0 to 1, of the subject that decided.
        signals: groups of features that speak for an extraction.
        subject: that decided.
    """

    position: float = 0.0
    action: Action = "none"
    score: float = 0.0
    signals: tuple[str, ...] = ()
    subject: str = ""


def party(key: str, user: str | None) -> str:
    """The subject that one client is: the end user of a front end that names one, else the key."""
    return f"key:{key}" if user is None else f"user:{key}/{user[:128]}"


def subjects(key: str, owner: str, user: str | None) -> tuple[str, ...]:
    """All subjects that a request counts for; the first is its party."""
    named = (party(key, user), f"key:{key}", f"owner:{owner}", ALL)
    return tuple(dict.fromkeys(named))
