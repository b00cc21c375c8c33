"""What a fuzz of the gateway sends: what it describes, all fields that there are, and nonsense, the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from adlocal.serve.protocols.fields import PATHS, Route

from .gateway_bodies import Sent, bodies, greedy_bodies, minimal, simple_bodies
from .gateway_garbage import monsters

#: From so many bodies on, each monster goes to every route.
_MANY = 2000


def collected(schema: dict[str, Any], total: int, names: Sequence[str]) -> list[tuple[Sent, str]]:
    """All that is sent, each with the name of a key.

    Args:
        schema: in which the gateway describes itself, OpenAPI.
        total: bodies, more or less.
        names: of the keys.
    """
    found: list[Sent] = []
    shares = (bodies(), total * 11 // 20), (simple_bodies(), total // 20), (greedy_bodies(), max(40, total // 20))
    for sent, n in shares:
        found += examples(sent, n, lambda each: each)
    found += [_thinking(i) for i in range(max(12, total // 25))]
    described = schemathesis.openapi.from_dict(schema)
    paths = [path for path, methods in schema["paths"].items() if "post" in methods]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for i, path in enumerate(paths * 2):
        cases: st.SearchStrategy[Any] = described[path]["POST"].as_strategy(generation_mode=modes[i // len(paths)])
        found += examples(cases, max(1, total * 6 // 20 // len(paths) // 2), of_case(path))
    for (name, raw), path in ((one, path) for one in monsters() for path in (*PATHS.values(), "/tokenize")):
        if path in (PATHS["chat"], PATHS["completions"]) or total > _MANY:
            found.append(Sent(path, raw, f"monster {name}"))
    places = sorted(range(len(found)), key=lambda i: (i * 7919) % 10007)  # one kind is not sent all at once
    return [(found[i], names[i % len(names)]) for i in places]


def examples(strategy: st.SearchStrategy[Any], n: int, made: Callable[[Any], Sent]) -> list[Sent]:
    """As many of a strategy, the same ones each time."""
    found: list[Sent] = []

    @seed(20)
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(made(value))

    collect()
    return found[:n]


def of_case(path: str) -> Callable[[Any], Sent]:
    """Turns schemathesis's cases into requests."""

    def made(case: Any) -> Sent:
        body = case.body
        raw = body if isinstance(body, bytes) else json.dumps(body, default=str).encode("utf-8", "surrogatepass")
        return Sent(path, raw, "schema")

    return made


def _thinking(i: int) -> Sent:
    """A request to think first, on one route after the other."""
    routes: tuple[Route, ...] = ("chat", "responses", "messages")
    body = {**minimal(routes[i % 3], f"Hi {i}", 9), "chat_template_kwargs": {"enable_thinking": True}}
    return Sent(PATHS[routes[i % 3]], json.dumps({**body, "stream": i % 2 == 0}).encode(), "thinking")
