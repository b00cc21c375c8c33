"""What rules say together, and what a file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adlocal.errors import InputError
from adlocal.serve.asked import Asked
from adlocal.serve.config import checked, read
from adlocal.serve.policy import KINDS, Caller, Decision, Policy, decide, kinds_of, least
from adlocal.settings import Settings

BUNDLE = Settings(2.0, 0.1)


def policy(**tables: Any) -> Policy:
    return checked({"policy": tables}, Path("serve.toml")).policy


def decided(found: Policy, caller: Caller = Caller(), *kinds: Any) -> Decision:  # noqa: B008 # it is frozen
    return decide(found, caller, kinds or ("chat",), BUNDLE)


def test_what_nobody_names_is_protected_as_the_bundle_says() -> None:
    found = decided(policy())
    assert found.settings == BUNDLE
    assert (found.logprobs, found.logit_bias, found.grammar, found.prefill, found.embeddings) == (False,) * 5
    assert (found.raw, found.tools, found.disclosure, found.unknown) == (True, True, "show", "ignore")


def test_the_more_special_rule_holds() -> None:
    found = policy(
        default={"strength": 1.0, "guard": 0.2, "kinds": {"tools": {"strength": 1.5}}},
        tiers={"paid": {"strength": 2.0, "kinds": {"reasoning": {"strength": 3.0}}}},
        owners={"alice": {"strength": 4.0}},
        keys={"k1": {"kinds": {"completion": {"strength": 5.0}}}},
    )
    alice = Caller("k1", "alice", "paid")
    assert decided(found).settings.strength == 1.0
    assert decided(found, Caller(), "chat", "tools").settings.strength == 1.5
    assert decided(found, Caller(tier="paid"), "chat", "tools").settings.strength == 2.0
    assert decided(found, Caller(tier="paid"), "chat", "reasoning").settings.strength == 3.0
    assert decided(found, alice, "chat", "reasoning").settings.strength == 4.0
    assert decided(found, alice, "completion").settings.strength == 5.0
    assert decided(found, alice).sources["strength"] == "owners.alice"
    assert decided(found, alice).settings.guard == 0.2


def test_clean_text_has_to_be_meant() -> None:
    with pytest.raises(InputError, match=r"tiers\.own: strength = 0 is the plain teacher.*clean = true"):
        policy(tiers={"own": {"strength": 0}})
    found = policy(tiers={"own": {"strength": 0, "clean": True}})
    assert decided(found, Caller(tier="own")).settings.strength == 0
    assert decided(found).settings == BUNDLE


def test_who_sees_log_probabilities_has_one_strength() -> None:
    found = policy(
        default={"kinds": {"reasoning": {"strength": 6.0}}},
        tiers={"research": {"logprobs": True, "guard": 0.3, "kinds": {"tools": {"guard": 0.02}}}},
    )
    seen = [decided(found, Caller(tier="research"), "chat", kind) for kind in KINDS]
    assert {each.settings for each in seen} == {Settings(6.0, 0.02)}
    assert all(each.fixed for each in seen)
    assert not decided(found).fixed


def test_hidden_reasoning_closes_raw_prompts() -> None:
    assert not decided(policy(default={"disclosure": "answer-only"})).raw
    assert decided(policy(default={"disclosure": "answer-only", "raw": True})).raw


def test_the_watch_may_double_the_strength_by_default() -> None:
    assert decided(policy()).max_strength == 4.0
    assert decided(policy(default={"max_strength": 3.0})).max_strength == 3.0


def test_the_floor_is_the_least_that_anybody_is_given() -> None:
    found = policy(tiers={"a": {"strength": 0.5}, "b": {"kinds": {"chat": {"guard": 0.4}}}})
    assert least(found, BUNDLE) == Settings(0.5, 0.4)
    assert least(policy(default={"strength": 9}), BUNDLE) == BUNDLE


_RULES = st.fixed_dictionaries(
    {}, optional={"strength": st.floats(0.1, 9), "guard": st.floats(0, 1), "logprobs": st.booleans()}
)
_SUBJECTS = st.builds(
    lambda rule, kinds: {**rule, "kinds": kinds}, _RULES, st.dictionaries(st.sampled_from(KINDS), _RULES)
)


@given(_SUBJECTS, _SUBJECTS, _SUBJECTS, _SUBJECTS, st.sets(st.sampled_from(KINDS), min_size=1))
def test_nobody_is_given_less_than_the_floor(default: Any, tier: Any, owner: Any, key: Any, kinds: Any) -> None:
    found = policy(default=default, tiers={"t": tier}, owners={"o": owner}, keys={"k": key})
    floor = least(found, BUNDLE)
    for caller in (Caller(), Caller(tier="t"), Caller("k", "o", "t"), Caller("other", "o")):
        settings = decided(found, caller, *kinds).settings
        assert settings.strength >= floor.strength
        assert settings.guard <= floor.guard


def test_a_model_that_may_think_is_taken_to_think() -> None:
    assert kinds_of(Asked("chat")) == ("chat", "reasoning")
    assert kinds_of(Asked("chat", reasoning=False)) == ("chat",)
    assert kinds_of(Asked("chat", reasoning=True, tools=[{}])) == ("chat", "tools", "reasoning")
    assert kinds_of(Asked("completion")) == ("completion",)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("polcy = 1", "polcy: no such setting"),
        ("[policy.default]\nstrenght = 1", "policy.default.strenght: no such setting"),
        ("[policy.default]\nstrength = -1", "policy.default.strength"),
        ("[policy.default]\nstrength = nan", "policy.default.strength"),
        ("[policy.default]\ndisclosure = 'hide'", "'show', 'answer-only' or 'summary'"),
        ("[policy.tiers.a.kinds.dance]\nstrength = 1", "policy.tiers.a.kinds.dance: no such setting"),
        ("[engine]\nparallel = 0", "engine.parallel"),
        ("[engine\n", "no TOML"),
    ],
)
def test_a_broken_file_is_told_in_a_line(tmp_path: Path, toml: str, told: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(toml)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("model = 'teacher.gguf'\nbundle = '/elsewhere/bundle'\n")
    found = read(path)
    assert (found.model, found.bundle) == (tmp_path / "teacher.gguf", Path("/elsewhere/bundle"))


REASONING = {"reasoning": {"disclosure": "answer-only", "strength": 5.0}}


@pytest.mark.parametrize("kinds", [("chat",), ("chat", "reasoning"), ("completion",)])
def test_no_client_opens_what_is_hidden_by_saying_that_it_does_not_reason(kinds: Any) -> None:
    found = decided(policy(default={"kinds": REASONING}), Caller(), *kinds)
    assert found.disclosure == "answer-only"
    assert not found.raw


def test_the_reasoning_rule_follows_what_the_model_does() -> None:
    """And not what the client says of it."""
    on = policy(default={"reasoning": "on", "kinds": REASONING})
    assert decided(on, Caller(), "chat").settings.strength == 5.0
    off = policy(default={"reasoning": "off", "kinds": REASONING})
    assert decided(off, Caller(), "chat", "reasoning").settings == BUNDLE


def test_one_kind_with_log_probabilities_fixes_the_strength_of_all() -> None:
    found = policy(tiers={"t": {"kinds": {"completion": {"logprobs": True}, "tools": {"strength": 7.0}}}})
    chat = decided(found, Caller(tier="t"), "chat")
    assert (chat.fixed, chat.logprobs, chat.settings.strength) == (True, False, 7.0)
