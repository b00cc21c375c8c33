"""What becomes of every field that llama-server, OpenAI's or Anthropic's clients may send: one table.

A field is obeyed, left to policy, ignored or refused. Ignored are fields that mean nothing here or only ask for more
to be told. Refused are fields that would change what is protected, or that reach into the engine: a client whose
request means something else without them has to know. Nothing is handed on that is not obeyed or allowed by policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..events import Failed

Route = Literal["chat", "completions", "responses", "messages"]
Fate = Literal["obeyed", "policy", "ignored", "refused"]
Unknown = Literal["ignore", "refuse"]

ROUTES: Final[tuple[Route, ...]] = ("chat", "completions", "responses", "messages")
PATHS: Final[Mapping[Route, str]] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


@dataclass(frozen=True)
class Field:
    """A field of a request's body.

    Attributes:
        name: with dots where it lies in another one; `*` for every other name there.
        routes: where this line holds.
        fate: what becomes of it.
        reason: in a line.
        harmless: values with which a refused field says nothing; null always does.
    """

    name: str
    routes: tuple[Route, ...]
    fate: Fate
    reason: str
    harmless: tuple[Any, ...] = ()


_C: Final = ("chat",)
_P: Final = ("completions",)
_R: Final = ("responses",)
_M: Final = ("messages",)
_CP: Final = ("chat", "completions")
_CR: Final = ("chat", "responses")
_CRM: Final = ("chat", "responses", "messages")
_CPM: Final = ("chat", "completions", "messages")

#: Each line: routes, fate, names, reason, and the harmless values of a refused one.
_LINES: Final[tuple[tuple[Any, ...], ...]] = (
    (ROUTES, "obeyed", "model", "the name is given back; there is one model"),
    (_C, "obeyed", "messages messages.role messages.content messages.name", "text alone; images are refused"),
    (
        _C,
        "obeyed",
        "messages.tool_calls messages.tool_call_id",
        "arguments may be text or an object, ids may be absent",
    ),
    (_C, "ignored", "messages.reasoning_content messages.refusal", "reasoning of earlier turns is not read again"),
    (_M, "obeyed", "messages system", "text, tool_use and tool_result blocks; images are refused"),
    (_R, "obeyed", "input instructions", "text, messages, calls and their outputs; reasoning items are dropped"),
    (_P, "policy", "prompt", "raw completions are allowed by policy; each prompt is a request of its own"),
    (_CRM, "obeyed", "tools tool_choice", "functions alone"),
    (_CR, "obeyed", "parallel_tool_calls", ""),
    (ROUTES, "obeyed", "stream", ""),
    (_CP, "obeyed", "stream_options stream_options.include_usage", "usage comes only where it is asked for"),
    (
        ("chat", "completions", "responses"),
        "ignored",
        "stream_options.include_obfuscation",
        "pads against eavesdroppers",
    ),
    (_R, "ignored", "stream_options", "usage always comes with the last event"),
    (
        _CP,
        "policy",
        "max_tokens max_completion_tokens n_predict",
        "one length; -1 is not said; policy has the last word",
    ),
    (_R, "policy", "max_output_tokens", "policy has the last word"),
    (_M, "policy", "max_tokens", "policy has the last word"),
    (_CP, "policy", "n n_cmpl", "one number; each answer is a request of its own"),
    (ROUTES, "policy", "temperature", "not under the policy's minimum"),
    (ROUTES, "obeyed", "top_p", ""),
    (_CPM, "obeyed", "top_k", ""),
    (_CP, "obeyed", "min_p typical_p top_n_sigma xtc_probability xtc_threshold min_keep", "within bounds"),
    (_CP, "obeyed", "repeat_last_n repeat_penalty frequency_penalty presence_penalty", "within bounds"),
    (
        _CP,
        "obeyed",
        "dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers",
        "within bounds",
    ),
    (_CP, "obeyed", "seed", "-1 is a random one"),
    (_CP, "obeyed", "stop", "the end of an answer"),
    (_M, "obeyed", "stop_sequences", "the end of an answer"),
    (_C, "obeyed", "response_format", "a schema that cannot be enforced is refused"),
    (_R, "obeyed", "text text.format", "a schema that cannot be enforced is refused"),
    (_CP, "obeyed", "json_schema grammar", "within bounds; one of them, and none with tools"),
    (_CP, "policy", "logprobs n_probs", "log-probabilities help whoever distils; off by default"),
    (_CR, "policy", "top_logprobs", "log-probabilities help whoever distils; off by default"),
    (_R, "policy", "include", '"message.output_text.logprobs" asks for log-probabilities; the rest is ignored'),
    (_CP, "policy", "logit_bias", "shows the logits behind the protection; off by default, and by token alone"),
    (_P, "policy", "echo", "of prompts that are text, without log-probabilities"),
    (_C, "policy", "reasoning_effort", '"none" asks for no reasoning, everything else for reasoning'),
    (_R, "policy", "reasoning reasoning.effort", '"none" asks for no reasoning, everything else for reasoning'),
    (_M, "policy", "thinking thinking.type", '"disabled" asks for no reasoning, everything else for reasoning'),
    (_CRM, "policy", "chat_template_kwargs chat_template_kwargs.enable_thinking", "asks for reasoning, or for none"),
    (_CRM, "refused", "chat_template_kwargs.*", "would change the prompt's form behind the policy's back"),
    (
        _C,
        "policy",
        "continue_final_message add_generation_prompt",
        "an answer that the client began is policy's to allow",
    ),
    (_CR, "obeyed", "user safety_identifier", "names the end user, for keys that may"),
    (_P, "obeyed", "user", "names the end user, for keys that may"),
    (_M, "obeyed", "metadata metadata.user_id", "names the end user, for keys that may"),
    # What would reach into the engine, or around the protection.
    (ROUTES, "refused", "samplers", "the order of samplers decides which logits are protected", [], ""),
    (ROUTES, "refused", "backend_sampling", "samples on the device, before the protection", False),
    (ROUTES, "refused", "mirostat", "samples in its own way, under no minimum temperature", 0),
    (ROUTES, "refused", "dynatemp_range", "goes under the minimum temperature", 0),
    (ROUTES, "refused", "post_sampling_probs", "tells another distribution than was sampled from", False),
    (ROUTES, "refused", "id_slot", "slots are the gateway's: another tenant's may be in it", -1),
    (ROUTES, "refused", "lora", "changes the model that the protection was made for", []),
    (ROUTES, "refused", "n_cache_reuse", "moves what was computed for another prompt", 0),
    (ROUTES, "refused", "speculative speculative.*", "drafts are set up by the operator"),
    (
        ROUTES,
        "refused",
        "grammar_lazy grammar_triggers grammar_type preserved_tokens",
        "is the engine's own",
        False,
        [],
    ),
    (
        ROUTES,
        "refused",
        "generation_prompt chat_parser chat_format",
        "is the engine's own: it tells where reasoning starts",
    ),
    (ROUTES, "refused", "message_delimiters", "is the engine's own", []),
    (ROUTES, "refused", "parse_tool_calls", "shows reasoning as text where it is false", True),
    (ROUTES, "refused", "chat_template", "would replace the model's template"),
    (ROUTES, "refused", "reasoning_budget_start_tag reasoning_budget_end_tag", "moves the end of reasoning"),
    (ROUTES, "refused", "reasoning_budget_end_tags reasoning_budget_message", "puts words into the model's mouth"),
    (ROUTES, "refused", "ignore_eos", "makes the model go on after its end", False),
    (ROUTES, "refused", "__metadata_user_id", "is the engine's own"),
    # What has no meaning here, or asks for something to be told that is not told.
    (ROUTES, "ignored", "reasoning_format", "policy says how much of the reasoning is shown"),
    (
        ROUTES,
        "ignored",
        "reasoning_budget reasoning_budget_tokens thinking_budget_tokens",
        "the operator sets the budget",
    ),
    (ROUTES, "ignored", "reasoning_control", "nothing here ends reasoning early"),
    (_M, "ignored", "thinking.budget_tokens thinking.display", "the operator sets both"),
    (_R, "ignored", "reasoning.summary reasoning.generate_summary", "policy says how much of the reasoning is shown"),
    (ROUTES, "ignored", "cache_prompt", "the gateway decides, so that no key can tell what another asked"),
    (ROUTES, "ignored", "return_tokens response_fields verbose", "nothing of the engine's own answer is passed on"),
    (ROUTES, "ignored", "timings_per_token return_progress", "times tell what other keys asked"),
    (ROUTES, "ignored", "sse_ping_interval", "the operator sets it"),
    (ROUTES, "ignored", "t_max_predict_ms t_max_prompt_ms", "the operator sets limits of time"),
    (ROUTES, "ignored", "n_keep n_discard", "prompts are never shifted"),
    (ROUTES, "ignored", "n_indent input_prefix input_suffix input_extra", "there is no infilling"),
    (ROUTES, "ignored", "dynatemp_exponent mirostat_tau mirostat_eta", "goes with a field that is refused"),
    (ROUTES, "ignored", "adaptive_target adaptive_decay", "has no effect without `samplers`"),
    (ROUTES, "ignored", "session_id conversation_id", "no request outlives its connection"),
    (_C, "ignored", "echo", "an answer that the client began is not repeated"),
    (
        ("chat", "completions", "responses"),
        "ignored",
        "metadata store service_tier",
        "nothing is stored, and there is one tier",
    ),
    (_CR, "ignored", "verbosity prompt_cache_key prompt_cache_retention", "has no meaning here"),
    (_C, "ignored", "prediction", "has no meaning here"),
    (_M, "ignored", "service_tier cache_control container context_management", "has no meaning here"),
    (_M, "ignored", "output_config output_config.effort", "how hard the model thinks is its own affair"),
    (_M, "refused", "output_config.format output_format", "answers in a schema are not offered by this protocol here"),
    (_M, "refused", "mcp_servers", "there are none"),
    (_R, "ignored", "truncation max_tool_calls text.verbosity", "has no meaning here"),
    (_C, "refused", "functions function_call", "is OpenAI's form of before `tools`: use that"),
    (_C, "refused", "audio web_search_options", "there is neither"),
    (_C, "refused", "modalities", "answers are text", ["text"]),
    (_P, "refused", "best_of", "is not offered; use `n`", 1),
    (_P, "refused", "suffix", "there is no infilling", ""),
    (_R, "refused", "previous_response_id conversation", "nothing is stored: send the whole conversation"),
    (_R, "refused", "background", "no request outlives its connection", False),
    (_R, "refused", "prompt", "there are no stored prompts"),
)


def _table() -> Iterator[Field]:
    """The lines, and what the other routes make of fields that have a meaning on some."""
    for routes, fate, names, reason, *harmless in _LINES:
        for name in names.split():
            yield Field(name, routes, fate, reason, tuple(harmless))
    listed: dict[str, set[Route]] = {}
    for routes, _, names, *_ in _LINES:
        for name in names.split():
            listed.setdefault(name, set()).update(routes)
    for name, known in listed.items():
        rest = tuple(route for route in ROUTES if route not in known)
        if rest and "." not in name:
            yield Field(name, rest, "ignored", "is no part of this protocol")


FIELDS: Final[tuple[Field, ...]] = tuple(_table())
_BY_ROUTE: Final[Mapping[Route, Mapping[str, Field]]] = {
    route: {field.name: field for field in FIELDS if route in field.routes} for route in ROUTES
}


def check(body: Mapping[str, Any], route: Route, unknown: Unknown = "ignore") -> None:
    """Refuses what the table refuses, in the body and in its parts.

    Args:
        body: as the client sent it.
        route: where to.
        unknown: what becomes of names that the table has not.

    Raises:
        Failed: 400, for the first field that is refused.
    """
    known = _BY_ROUTE[route]
    for name, value in _named(body):
        group, _, rest = name.partition(".")
        field = known.get(name) or (known.get(f"{group}.*") if rest else None)
        if field is None:
            if unknown == "refuse" and not (rest and _leaf(known, group)):
                raise _refusal(name, "this field is not known here")
        elif field.fate == "refused" and value is not None and not _says_nothing(value, field.harmless):
            raise _refusal(name, f"not accepted: {field.reason}")


def _named(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())


def _leaf(known: Mapping[str, Field], group: str) -> bool:
    """Whether the table lists no names within this field, so that they are its model's to judge."""
    return group in known and not any(name.startswith(f"{group}.") for name in known)


def _says_nothing(value: Any, harmless: Iterable[Any]) -> bool:
    return any(type(value) is type(each) and value == each for each in harmless)


def _refusal(name: str, message: str) -> Failed:
    name = name if len(name) <= 64 else f"{name[:61]}..."
    return Failed(400, "invalid_request_error", f"{name}: {message}; leave it out", name)


def as_markdown() -> str:
    """The table, for the documentation."""
    lines = ["| field | routes | fate | why |", "|---|---|---|---|"]
    for field in sorted(FIELDS, key=lambda field: (field.name, field.routes)):
        routes = "all" if field.routes == ROUTES else ", ".join(field.routes)
        harmless = ", ".join(f"`{_as_json(value)}`" for value in field.harmless)
        reason = f"{field.reason} (except {harmless})" if harmless else field.reason
        lines.append(f"| `{field.name}` | {routes} | {_FATES[field.fate]} | {reason} |")
    return "\n".join(lines) + "\n"


_FATES: Final[Mapping[Fate, str]] = {
    "obeyed": "obeyed",
    "policy": "by policy",
    "ignored": "ignored",
    "refused": "400",
}


def _as_json(value: Any) -> str:
    return {False: "false", True: "true"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
