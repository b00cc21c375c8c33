"""Who gets how much protection: rules, written by the operator, and what follows from them for one request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..settings import Settings
from .asked import Asked

#: What is shown of a model's reasoning: all, nothing, or its length.
Disclosure = Literal["show", "answer-only", "summary"]
#: Who decides whether the model thinks first.
Reasoning = Literal["client", "on", "off"]
RequestKind = Literal["chat", "completion", "tools", "reasoning"]

_Strength = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A table of the configuration: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Strict):
    """What a tier, an owner, a key or a kind of request is given. What is left out, a more general rule says.

    Attributes:
        strength: nats. 0 is the plain teacher, and needs `clean`.
        guard: share of the top token's probability.
        max_strength: nats up to which the extraction watch may raise it; twice the strength if nothing is said.
        clean: allow a strength of 0, which is the plain teacher.
        min_temperature: a lower one is raised to it; above 0, top_k and its like are the engine's own.
        max_tokens: of an answer.
        disclosure: what is shown of the reasoning.
        reasoning: who decides whether the model thinks first.
        logprobs: tell log-probabilities, of 5 candidates at most; the strength of such a key never moves.
        logit_bias: obey biases, of 5 nats at most; the strength of such a key never moves.
        grammar: obey GBNF grammars; JSON schemas are always obeyed.
        prefill: go on with an assistant's last message.
        raw: answer completions, whose prompt the client writes as a whole; by default where reasoning is shown.
        tools: let the model call tools.
        embeddings: answer /v1/embeddings.
        unknown: what becomes of fields that nobody knows.
        requests_per_minute: of a key.
        tokens_per_minute: of a key, prompts and answers.
        tokens_per_day: of a key.
        parallel: requests of a key at once.
        owner_requests_per_minute: of all keys of an owner.
        owner_tokens_per_minute: of all keys of an owner.
        owner_tokens_per_day: of all keys of an owner.
    """

    strength: _Strength | None = None
    guard: _Share | None = None
    max_strength: _Strength | None = None
    clean: bool | None = None
    min_temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    max_tokens: _Count | None = None
    disclosure: Disclosure | None = None
    reasoning: Reasoning | None = None
    logprobs: bool | None = None
    logit_bias: bool | None = None
    grammar: bool | None = None
    prefill: bool | None = None
    raw: bool | None = None
    tools: bool | None = None
    embeddings: bool | None = None
    unknown: Literal["ignore", "refuse"] | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None
    parallel: _Count | None = None
    owner_requests_per_minute: _Count | None = None
    owner_tokens_per_minute: _Count | None = None
    owner_tokens_per_day: _Count | None = None


class Kinds(Strict):
    """Rules by the kind of a request. One may be of several kinds; of two rules, the later here holds."""

    chat: Rule = Rule()
    completion: Rule = Rule()
    tools: Rule = Rule()
    reasoning: Rule = Rule()


class Subject(Rule):
    """A rule for a tier, an owner or a key, and others for its kinds of requests."""

    kinds: Kinds = Kinds()


class Policy(Strict):
    """All rules. Of two that say something, the later holds: defaults, the tier's, the owner's, the key's.

    Attributes:
        default: for whatever is not named.
        tiers, owners, keys: by name, and keys by their id.
    """

    default: Subject = Subject()
    tiers: Mapping[str, Subject] = {}
    owners: Mapping[str, Subject] = {}
    keys: Mapping[str, Subject] = {}

    @model_validator(mode="after")
    def _clean_is_meant(self) -> Policy:
        """Nobody is given clean text by a slip."""
        for where, rule in self.named_rules():
            if rule.strength == 0 and not rule.clean:
                raise ValueError(
                    f"{where}: strength = 0 is the plain teacher; say clean = true beside it if it is meant"
                )
        return self

    def named_rules(self) -> Iterator[tuple[str, Rule]]:
        """Every rule, with its place in the file."""
        for where, subject in self._subjects():
            yield where, subject
            for kind in Kinds.model_fields:
                yield f"{where}.kinds.{kind}", getattr(subject.kinds, kind)

    def _subjects(self) -> Iterator[tuple[str, Subject]]:
        yield "default", self.default
        for group in ("tiers", "owners", "keys"):
            yield from ((f"{group}.{name}", subject) for name, subject in getattr(self, group).items())


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        key: its id; "" where no keys are asked for.
        owner, tier: of the key.
        operator: may see what is steered.
        trusted: may name the end user for whom it asks.
        budget_tokens: of the key, for ever; None for none.
        declared: what its owner says that it is for.
    """

    key: str = ""
    owner: str = ""
    tier: str = "default"
    operator: bool = False
    trusted: bool = False
    budget_tokens: int | None = None
    declared: Literal["evaluation"] | None = None


@dataclass(frozen=True)
class Decision:
    """What is in force for a caller and a kind of request. Names are those of `Rule`, with nothing left open.

    Attributes:
        settings: strength and guard.
        max_strength: up to which the watch may raise it.
        fixed: the watch must not raise it: two strengths could be compared.
        sources: the rule that decided, by the name of the field.
    """

    settings: Settings
    max_strength: float
    fixed: bool
    min_temperature: float
    max_tokens: int | None
    disclosure: Disclosure
    reasoning: Reasoning
    logprobs: bool
    logit_bias: bool
    grammar: bool
    prefill: bool
    raw: bool
    tools: bool
    embeddings: bool
    unknown: Literal["ignore", "refuse"]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    parallel: int | None
    owner_requests_per_minute: int | None
    owner_tokens_per_minute: int | None
    owner_tokens_per_day: int | None
    sources: Mapping[str, str]


_BUILT_IN: Mapping[str, Any] = {
    "min_temperature": 0.0,
    "disclosure": "show",
    "reasoning": "client",
    "logprobs": False,
    "logit_bias": False,
    "grammar": False,
    "prefill": False,
    "tools": True,
    "embeddings": False,
    "unknown": "ignore",
}
#: From what tells most to what tells least.
_HIDES: tuple[Disclosure, ...] = ("show", "summary", "answer-only")
KINDS: tuple[RequestKind, ...] = ("chat", "completion", "tools", "reasoning")


def kinds_of(asked: Asked) -> tuple[RequestKind, ...]:
    """The kinds that a request is of. A model that thinks unless it is told not to, thinks."""
    kinds: list[RequestKind] = [asked.kind]
    if asked.tools:
        kinds.append("tools")
    if asked.kind == "chat" and asked.reasoning is not False:
        kinds.append("reasoning")
    return tuple(kinds)


def decide(policy: Policy, caller: Caller, kinds: tuple[RequestKind, ...], default: Settings) -> Decision:
    """What is in force.

    Args:
        default: of the bundle, where no rule names a strength or a guard.
    """
    values, sources = _folded(policy, caller, kinds)
    thinks = values["reasoning"] == "on" or (values["reasoning"] == "client" and "reasoning" in kinds)
    if "completion" not in kinds and thinks != ("reasoning" in kinds):  # what will be, and not what the client says
        kinds = (*(kind for kind in kinds if kind != "reasoning"), *(("reasoning",) if thinks else ()))
        values, sources = _folded(policy, caller, kinds)
    values["disclosure"], sources["disclosure"] = _most_hidden(policy, caller, kinds)
    fixed = any(_tells_logits(policy, caller, kind) for kind in KINDS)
    settings = default.but(values.get("strength"), values.get("guard"))
    if fixed:
        settings, sources["strength"] = _one_for_all_kinds(policy, caller, settings, default, sources["strength"])
    if values.get("raw") is None:
        values["raw"] = values["disclosure"] == "show"
    if values.get("max_strength") is None:
        values["max_strength"] = 2 * settings.strength
    given = {name: values.get(name) for name in Rule.model_fields if name not in ("strength", "guard", "clean")}
    return Decision(settings=settings, fixed=fixed, sources=sources, **given)  # type: ignore[arg-type]


def _folded(policy: Policy, caller: Caller, kinds: tuple[RequestKind, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the rules say together, and which rule said it."""
    values, sources = dict(_BUILT_IN), dict.fromkeys(Rule.model_fields, "built in")
    for where, rule in _in_order(policy, caller, kinds):
        for name, value in rule:
            if name != "kinds" and value is not None:
                values[name], sources[name] = value, where
    return values, sources


def _most_hidden(policy: Policy, caller: Caller, kinds: tuple[RequestKind, ...]) -> tuple[Disclosure, str]:
    """Reasoning is hidden as if the model reasoned: no client can say for sure that it will not."""
    found = [_folded(policy, caller, each) for each in (kinds, (*kinds, "reasoning"))]
    values, sources = max(found, key=lambda each: _HIDES.index(each[0]["disclosure"]))
    return values["disclosure"], sources["disclosure"]


def _tells_logits(policy: Policy, caller: Caller, kind: RequestKind) -> bool:
    values, _ = _folded(policy, caller, (kind,))
    return bool(values["logprobs"] or values["logit_bias"])


def _one_for_all_kinds(
    policy: Policy, caller: Caller, settings: Settings, default: Settings, source: str
) -> tuple[Settings, str]:
    """The most that any kind of this caller's requests has: two strengths on one prompt could be solved for Δ."""
    for kind in KINDS:
        found = default
        for where, rule in _in_order(policy, caller, (kind,)):
            found = found.but(rule.strength, rule.guard)
            if found.strength > settings.strength:
                source = where
        settings = Settings(max(settings.strength, found.strength), min(settings.guard, found.guard))
    return settings, source


def least(policy: Policy, default: Settings) -> Settings:
    """The least protection that any request can be given: the engine's floor."""
    rules = [rule for _, rule in policy.named_rules()]
    strengths = [default.strength, *(rule.strength for rule in rules if rule.strength is not None)]
    guards = [default.guard, *(rule.guard for rule in rules if rule.guard is not None)]
    return Settings(min(strengths), max(guards))


def _in_order(policy: Policy, caller: Caller, kinds: tuple[RequestKind, ...]) -> Iterator[tuple[str, Rule]]:
    named = [
        ("default", policy.default),
        (f"tiers.{caller.tier}", policy.tiers.get(caller.tier)),
        (f"owners.{caller.owner}", policy.owners.get(caller.owner)),
        (f"keys.{caller.key}", policy.keys.get(caller.key)),
    ]
    for where, subject in named:
        if subject is not None:
            yield where, subject
            yield from ((f"{where}.kinds.{kind}", getattr(subject.kinds, kind)) for kind in KINDS if kind in kinds)
