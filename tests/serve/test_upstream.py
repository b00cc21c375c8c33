"""What the engine is asked: what policy says, and nothing that a client wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adlocal.serve.asked import Asked
from adlocal.serve.config import checked
from adlocal.serve.policy import Caller, Decision, decide, kinds_of
from adlocal.serve.upstream import MAX_BIAS, bodies
from adlocal.settings import Settings

USER = {"role": "user", "content": "Hi"}


def decided(asked: Asked, **rule: Any) -> Decision:
    policy = checked({"policy": {"default": rule}}, Path("serve.toml")).policy
    return decide(policy, Caller(), kinds_of(asked), Settings())


def body(asked: Asked, **rule: Any) -> dict[str, Any]:
    (found,) = bodies(asked, decided(asked, **rule))
    return found.at(3, reuse=False)


def test_a_chat_is_asked_for_by_what_is_known() -> None:
    found = body(Asked("chat", messages=[USER], sampling={"temperature": 0.5, "top_k": 7}, max_tokens=9))
    assert found == {
        "messages": [USER],
        "reasoning_format": "none",
        "temperature": 0.5,
        "top_k": 7,
        "n_predict": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "timings_per_token": True,
        "id_slot": 3,
        "cache_prompt": False,
    }


@pytest.mark.parametrize(
    ("asked", "rule", "most"), [(None, 5, 5), (9, None, 9), (9, 5, 5), (3, 5, 3), (None, None, None)]
)
def test_the_shorter_length_holds(asked: int | None, rule: int | None, most: int | None) -> None:
    found = body(Asked("chat", messages=[USER], max_tokens=asked), **({"max_tokens": rule} if rule else {}))
    assert found.get("n_predict") == most


def test_a_minimum_temperature_cannot_be_gone_around() -> None:
    narrow = {"temperature": 0.0, "top_k": 1, "top_p": 0.0, "min_p": 1.0, "typical_p": 0.0, "top_n_sigma": 0.0}
    found = body(Asked("chat", messages=[USER], sampling=narrow), min_temperature=0.7)
    assert found["temperature"] == 0.7
    assert not found.keys() & (narrow.keys() - {"temperature"})


def test_biases_and_log_probabilities_are_bounded() -> None:
    asked = Asked("chat", messages=[USER], logit_bias={5: 100.0, 6: -100.0, 7: 1.0}, top_logprobs=20)
    found = body(asked, logit_bias=True, logprobs=True)
    assert found["logit_bias"] == [[5, MAX_BIAS], [6, -MAX_BIAS], [7, 1.0]]
    assert found["top_logprobs"] == 5


@pytest.mark.parametrize(
    ("says", "asked", "thinks"),
    [
        ("client", None, None),
        ("client", True, True),
        ("client", False, False),
        ("on", False, True),
        ("off", True, False),
    ],
)
def test_who_decides_whether_the_model_thinks(says: str, asked: bool | None, thinks: bool | None) -> None:
    found = body(Asked("chat", messages=[USER], reasoning=asked), reasoning=says)
    assert found.get("chat_template_kwargs") == (None if thinks is None else {"enable_thinking": thinks})


def test_each_prompt_and_answer_is_a_request_of_its_own() -> None:
    asked = Asked("completion", prompts=["a", [1, 2]], n=2, sampling={"seed": 2**32 - 1})
    found = [each.fields for each in bodies(asked, decided(asked))]
    assert [each["prompt"] for each in found] == ["a", "a", [1, 2], [1, 2]]
    assert [each["seed"] for each in found] == [2**32 - 1, 0, 2**32 - 1, 0]
