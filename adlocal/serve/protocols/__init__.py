"""Client protocols: what clients send becomes an `Asked`, and what comes of it becomes their protocol's bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..asked import Asked
from ..events import Answer, Event, Failed, Usage
from . import chat, completions, messages, responses
from .chat_answers import Chat
from .common import Body, gather, read_json
from .completions import Completions
from .errors import error_body, error_headers
from .fields import PATHS, Route, Unknown, as_markdown, check
from .messages_answers import Messages
from .responses_answers import Responses

__all__ = [
    "PATHS",
    "PROTOCOLS",
    "ClientProtocol",
    "Renderer",
    "Route",
    "Unknown",
    "as_markdown",
    "check",
    "error_body",
    "error_headers",
    "gather",
    "read_json",
]


class Renderer(Protocol):
    """What writes one answer, in parts or at once."""

    def begin(self) -> bytes:
        """What comes before the first event."""

    def event(self, event: Event) -> bytes:
        """The bytes of one event; b"" where it shows nothing."""

    def end(self, usage: Usage) -> bytes:
        """What follows the last event, after every answer has finished."""

    def failed(self, failed: Failed) -> bytes:
        """The end of a stream that breaks off."""

    def body(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The answers at once, of a renderer that has written nothing."""


@dataclass(frozen=True)
class ClientProtocol:
    """How clients of one route speak.

    Attributes:
        route: its name.
        request: the model of a body, for OpenAPI.
        asked_of: a body's meaning; raises `Failed` for one that has none.
        renderer: made with the request, letters and digits that are unique, the model's name for clients, and
            seconds since 1970.
    """

    route: Route
    request: type[Body]
    asked_of: Callable[[Mapping[str, Any], Unknown], Asked]
    renderer: Callable[[Asked, str, str, int], Renderer]


PROTOCOLS: Final[Mapping[Route, ClientProtocol]] = {
    "chat": ClientProtocol("chat", chat.ChatRequest, chat.asked_of, Chat),
    "completions": ClientProtocol("completions", completions.CompletionRequest, completions.asked_of, Completions),
    "responses": ClientProtocol("responses", responses.ResponsesRequest, responses.asked_of, Responses),
    "messages": ClientProtocol("messages", messages.MessagesRequest, messages.asked_of, Messages),
}
