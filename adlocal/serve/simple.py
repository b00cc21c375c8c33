"""Routes that answer at once: tokens, templates, counts, embeddings. Their bodies, too, are built and never copied."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from . import admission, upstream
from .asked import Asked
from .events import Failed
from .gateway import Gateway
from .policy import Caller, Decision
from .protocols import PATHS, Unknown
from .protocols.chat import ChatRequest
from .protocols.chat import asked_of as chat_of
from .protocols.common import Body, validate
from .protocols.messages import CountRequest, counted_of
from .protocols.responses import ResponsesRequest
from .protocols.responses import asked_of as responses_of

_TOKENS_MAX = 1_000_000
_INPUTS_MAX = 256
Token = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeRequest(Body):
    """The body of POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: Annotated[list[Token], Field(max_length=_TOKENS_MAX)]


class EmbeddingsRequest(Body):
    """The body of POST /v1/embeddings."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=_INPUTS_MAX)]
    )
    model: str | None = None
    encoding_format: Literal["float"] | None = None
    dimensions: None = None
    user: str | None = None


Answers = Callable[[Gateway, Caller, Mapping[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Simple:
    """A route.

    Attributes:
        name, path: of the route.
        summary: in a line.
        request: the model of its body, for OpenAPI.
        answer: from a caller and a body; raises `Failed`.
    """

    name: str
    path: str
    summary: str
    request: type[Body]
    answer: Answers


async def _tokenize(gateway: Gateway, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = validate(TokenizeRequest, body)
    gateway.model.check_text([asked.content], "content")
    async with gateway.charged(caller):
        found = await upstream.ask(gateway.client, "/tokenize", asked.model_dump())
    return {"tokens": found["tokens"]}


async def _detokenize(gateway: Gateway, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = validate(DetokenizeRequest, body)
    gateway.model.check_tokens(asked.tokens, "tokens")
    async with gateway.charged(caller):
        found = await upstream.ask(gateway.client, "/detokenize", asked.model_dump())
    return {"content": found["content"]}


async def _template(gateway: Gateway, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    asked, decision = _conversation(gateway, caller, chat_of(body, gateway.unknown_fields(caller)))
    async with gateway.charged(caller):
        return {"prompt": await gateway.rendered(asked, decision)}


def _counter(ask: Callable[[Mapping[str, Any], Unknown], Asked], extra: Mapping[str, Any]) -> Answers:
    async def count(gateway: Gateway, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
        asked, decision = _conversation(gateway, caller, ask(body, gateway.unknown_fields(caller)))
        async with gateway.charged(caller):
            prompt = await gateway.rendered(asked, decision)
            found = await upstream.ask(gateway.client, "/tokenize", {"content": prompt, "add_special": True})
        return {**extra, "input_tokens": len(found["tokens"])}

    return count


def _conversation(gateway: Gateway, caller: Caller, asked: Asked) -> tuple[Asked, Decision]:
    """The conversation as it would be answered."""
    decision = gateway.decide(caller, asked)
    admission.permit(asked, decision)
    return admission.cleaned(asked, gateway.model, decision), decision


async def _embeddings(gateway: Gateway, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = validate(EmbeddingsRequest, body)
    if not gateway.decide(caller, Asked("completion")).embeddings:
        message = "embeddings are not allowed by this server's policy"
        raise Failed(403, "permission_error", message)
    if gateway.config.engine.pooling is None:
        raise Failed(501, "not_found_error", "the engine has no pooling; the operator can set engine.pooling")
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    async with gateway.charged(caller, admission.tokens_at_most(inputs, 1, 1)) as charge:
        found = await upstream.ask(gateway.client, "/v1/embeddings", {"input": inputs, "encoding_format": "float"})
        n_tokens = charge.tokens = int(found["usage"]["prompt_tokens"])
    data = [{"object": "embedding", "index": i, "embedding": each["embedding"]} for i, each in enumerate(found["data"])]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": asked.model or gateway.model.name, "usage": usage}


SIMPLE: Final = (
    Simple("tokenize", "/tokenize", "Text as tokens", TokenizeRequest, _tokenize),
    Simple("detokenize", "/detokenize", "Tokens as text", DetokenizeRequest, _detokenize),
    Simple("apply-template", "/apply-template", "Messages as the model reads them", ChatRequest, _template),
    Simple(
        "chat-tokens", f"{PATHS['chat']}/input_tokens", "Tokens of a chat's prompt", ChatRequest, _counter(chat_of, {})
    ),
    Simple(
        "responses-tokens",
        f"{PATHS['responses']}/input_tokens",
        "Tokens of a response's prompt",
        ResponsesRequest,
        _counter(responses_of, {"object": "response.input_tokens"}),
    ),
    Simple(
        "messages-tokens",
        f"{PATHS['messages']}/count_tokens",
        "Tokens of a message's prompt",
        CountRequest,
        _counter(counted_of, {}),
    ),
    Simple(
        "embeddings", "/v1/embeddings", "Pooled embeddings, where policy allows them", EmbeddingsRequest, _embeddings
    ),
)
