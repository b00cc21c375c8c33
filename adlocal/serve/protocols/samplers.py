"""Fields that chat completions and completions share: how to sample, and when to stop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from . import limits
from .common import Body, bad, one_of
from .schemas import check_grammar, check_schema

Breaker = Annotated[str, Field(min_length=1, max_length=64)]
Bias = Annotated[float, Field(ge=-limits.BIAS_MAX, le=limits.BIAS_MAX)] | bool
BiasByToken = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias], Field(max_length=limits.LOGIT_BIAS_MAX)
]
BiasPairs = Annotated[
    list[Annotated[list[float | bool], Field(min_length=2, max_length=2)]], Field(max_length=limits.LOGIT_BIAS_MAX)
]


class StreamOptions(Body):
    """What comes with a stream."""

    include_usage: bool | None = None


class Sampling(Body):
    """How to sample, by llama-server's names."""

    temperature: limits.Temperature | None = None
    top_k: limits.TopK | None = None
    top_p: limits.Share | None = None
    min_p: limits.Share | None = None
    typical_p: limits.Share | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=100)] | None = None
    xtc_probability: limits.Share | None = None
    xtc_threshold: limits.Share | None = None
    min_keep: Annotated[int, Field(ge=0, le=1024)] | None = None
    repeat_last_n: limits.Lookback | None = None
    repeat_penalty: Annotated[float, Field(ge=limits.REPEAT_PENALTY_MIN, le=10)] | None = None
    frequency_penalty: limits.Penalty | None = None
    presence_penalty: limits.Penalty | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=10)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=10)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, le=1024)] | None = None
    dry_penalty_last_n: limits.Lookback | None = None
    dry_sequence_breakers: Annotated[list[Breaker], Field(min_length=1, max_length=16)] | None = None
    seed: limits.Seed | None = None


class Sampled(Sampling):
    """How to sample an answer, and when it ends."""

    model: limits.Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: limits.MaxTokens | None = None
    max_completion_tokens: limits.MaxTokens | None = None
    n_predict: limits.MaxTokens | None = None
    n: limits.Count | None = None
    n_cmpl: limits.Count | None = None
    stop: limits.Stop | limits.Stops | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    logit_bias: BiasByToken | BiasPairs | None = None
    n_probs: Annotated[int, Field(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    user: limits.Name | None = None


def sampled_fields(body: Sampled) -> dict[str, Any]:
    """What `Asked` has of it.

    Raises:
        Failed: 400, aliases disagree, or a grammar is none.
    """
    grammar = body.grammar or ""
    if grammar and body.json_schema is not None:
        raise bad("grammar", "this field and json_schema exclude each other: give one of them")
    check_grammar(grammar)
    return {
        "model": body.model,
        "stream": bool(body.stream),
        "include_usage": bool(body.stream_options and body.stream_options.include_usage),
        "max_tokens": max_tokens(body, "max_tokens", "max_completion_tokens", "n_predict"),
        "n": one_of(body, "n", "n_cmpl") or 1,
        "sampling": sampling(body),
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or [],
        "grammar": grammar,
        "logit_bias": _biases(body.logit_bias),
    }


def sampling(body: Body, names: Iterable[str] = tuple(Sampling.model_fields)) -> dict[str, Any]:
    """What the client said of how to sample. A seed of -1 is none, and -1 candidates are all."""
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if given.get("seed") == -1:
        del given["seed"]
    for name in ("top_k", "repeat_last_n", "dry_penalty_last_n"):
        if given.get(name) == -1:
            given[name] = 0 if name == "top_k" else limits.LOOKBACK_MAX
    return given


def max_tokens(body: Body, *names: str) -> int | None:
    """The length asked for; None where the client did not say.

    Raises:
        Failed: 400, it is 0, or its names disagree.
    """
    asked: int | None = one_of(body, *names)
    if asked == 0:
        raise bad(next(name for name in names if getattr(body, name) == 0), "0: expected at least 1")
    return None if asked == -1 else asked


def schema_of(body: Sampled, wanted: dict[str, Any] | None, param: str) -> dict[str, Any] | None:
    """The schema of the answer, from `response_format` or `json_schema`; any object where it is empty.

    Raises:
        Failed: 400, both are there and differ, or it cannot be enforced.
    """
    if body.json_schema is not None:
        if wanted not in (None, body.json_schema):
            raise bad("json_schema", f"this field contradicts {param}: give one of them")
        wanted, param = body.json_schema, "json_schema"
    if wanted is None:
        return None
    check_schema(wanted, param, enforced=True)
    if body.grammar:
        raise bad("grammar", f"this field and {param} exclude each other: give one of them")
    return wanted or {"type": "object"}


def _biases(given: dict[str, float | bool] | list[list[float | bool]] | None) -> dict[int, float]:
    """By token. `false` forbids one.

    Raises:
        Failed: 400, a token is no number, or a bias is `true`.
    """
    biases: dict[int, float] = {}
    for token, bias in given.items() if isinstance(given, dict) else given or ():
        number = int(token)
        if isinstance(token, bool) or number != float(token) or not 0 <= number <= limits.INT_MAX:
            raise bad("logit_bias", f"{token}: expected a token's number")
        if bias is True or abs(bias) > limits.BIAS_MAX:
            raise bad("logit_bias", f"{bias} for token {number}: expected a number within ±100, or false to forbid it")
        biases[number] = -limits.BIAS_MAX if bias is False else float(bias)
    return biases
