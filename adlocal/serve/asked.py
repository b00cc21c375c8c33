"""What clients ask, in no protocol's own words. Every body becomes one of these; nothing else of it goes further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: What policy tells apart.
Kind = Literal["chat", "completion"]


@dataclass(frozen=True)
class Asked:
    """One request for text.

    Attributes:
        kind: chat messages, or a prompt as it is.
        messages: for a chat: OpenAI's messages, of the fields that are known; each part of `content` is text.
        prompts: for a completion: one or several, as text or tokens.
        tools: OpenAI's function tools; none for none.
        tool_choice: OpenAI's: "auto", "none", "required", or one function.
        parallel_tool_calls: None where the client did not say.
        sampling: by llama-server's names (temperature, top_k, top_p, min_p, seed, ...), within their bounds.
        max_tokens: of an answer; None where the client did not say.
        stop: texts that end an answer.
        n: answers of each prompt.
        schema: JSON schema of the answer; None for free text.
        grammar: GBNF of the answer; "" for none.
        top_logprobs: candidates of each token whose log-probabilities are asked for; None for no log-probabilities.
        logit_bias: by token.
        reasoning: whether the model is to think first; None where the client did not say.
        prefill: whether the last message, the assistant's, is to be continued.
        stream: answer in parts.
        include_usage: tell the number of tokens at the end of a stream.
        echo: repeat the prompt before a completion.
        model: as the client names it.
        user: whom the client asks for, as it says.
    """

    kind: Kind
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | Sequence[int]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    schema: Mapping[str, Any] | None = None
    grammar: str = ""
    top_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    reasoning: bool | None = None
    prefill: bool = False
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    model: str | None = None
    user: str | None = None
