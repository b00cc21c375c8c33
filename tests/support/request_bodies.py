"""Random bodies for llama-server's routes: what clients send, what they should not, and garbage."""

from __future__ import annotations

import json
import random
from typing import Any

ROUTES = ("/completion", "/v1/completions", "/v1/chat/completions", "/infill", "/v1/messages", "/v1/responses")

_WORDS = ("3 + 4 =", "a longer one, of some more tokens", "x", "", "\u00e9\u4e16 \U0001f600", " " * 40, "x" * 200)
# "infill" ends a text that a grammar does not let end, whereupon llama-server aborts, without adlocal as well.
_SAMPLERS = ("top_k", "typ_p", "top_p", "min_p", "temperature", "xtc", "dry", "penalties", "top_n_sigma")
_ANYTHING: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    1e308,
    -0.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    [None],
    "\x00",
    float("nan"),
)

# Values that mean something, by the name of the parameter.
_PARAMETERS: dict[str, tuple[Any, ...]] = {
    "n_predict": (0, 1, 4, 12),
    "max_tokens": (0, 1, 4, 12),
    "temperature": (0, 0.7, 1.5, -1),
    "top_k": (0, 1, 40),
    "top_p": (0.0, 0.5, 1.0),
    "min_p": (0.0, 0.2),
    "typical_p": (0.5, 1.0),
    "xtc_probability": (0.0, 0.5),
    "dynatemp_range": (0.0, 0.5),
    "mirostat": (0, 1, 2),
    "repeat_penalty": (1.0, 1.3),
    "presence_penalty": (0.0, 0.5),
    "dry_multiplier": (0.0, 0.8),
    "seed": (0, 7, -1),
    "samplers": (["temperature"], ["top_k", "min_p", "temperature"], [], "kt"),
    "backend_sampling": (True, False),
    "n_probs": (0, 1, 5),
    "post_sampling_probs": (True, False),
    "logprobs": (1, 3, True),
    "top_logprobs": (2,),
    "n": (1, 2, 3),
    "n_cmpl": (1, 2),
    "cache_prompt": (True, False),
    "id_slot": (0, 1, 99),
    "stop": ([], ["\n"], [".", "x"], [""]),
    "logit_bias": ([[65, 5.0]], [[66, False]], {"67": -100}, [["a", 1]]),
    "ignore_eos": (True, False),
    "grammar": ('root ::= [a-z ]+ "."', "root ::= ", 'root ::= ("a" | "b") root?'),
    "json_schema": ({"type": "object"}, {"type": "string", "maxLength": 4}, {"type": "nonsense"}),
    "response_format": ({"type": "json_object"}, {"type": "text"}, {"type": "x"}),
    "return_tokens": (True,),
    "timings_per_token": (True,),
    "stream": (True, False),
    "echo": (True,),
    "suffix": ("the end",),
    "n_keep": (0, 4, -1),
    "n_discard": (1,),
    "t_max_predict_ms": (1, 1000),
    "lora": ([], [{"id": 0, "scale": 1.0}]),
    "reasoning_format": ("none", "deepseek"),
    "chat_template_kwargs": ({"enable_thinking": False},),
    "tools": ([], [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
}


def request(rng: random.Random) -> tuple[str, bytes]:
    """A route and a body. One in ten is no JSON, and one in five parameters has a value that it should not have."""
    route = rng.choice(ROUTES)
    if rng.random() < 0.1:
        return route, rng.choice((b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt":', rng.randbytes(40)))
    body = _asked(rng, route)
    for name in rng.sample(list(_PARAMETERS), rng.randrange(6)):
        body[name] = rng.choice(_ANYTHING if rng.random() < 0.2 else _PARAMETERS[name])
    if isinstance(body.get("samplers"), list) and rng.random() < 0.5:
        body["samplers"] = rng.sample(_SAMPLERS, rng.randrange(len(_SAMPLERS)))
    return route, json.dumps(body).encode()


def _asked(rng: random.Random, route: str) -> dict[str, Any]:
    words = rng.choice(_WORDS)
    limit = {"max_tokens": 8, "n_predict": 8, "max_output_tokens": 8}
    if route == "/v1/responses":
        return {"input": words, **limit}
    if route == "/infill":
        return {"input_prefix": words, "input_suffix": rng.choice(_WORDS), **limit}
    if route.endswith(("chat/completions", "messages")):
        return {"messages": [{"role": rng.choice(("user", "system", "assistant", "x")), "content": words}], **limit}
    prompts = (words, [65, 66, 67], [words, words], [65, "x"], [2**20], {"prompt_string": words})
    return {"prompt": rng.choice(prompts), **limit}
