"""The score and the ramp: no figure and no group raises alone; up and down within limits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adlocal.errors import InputError
from adlocal.serve.watch import AcrossKeys, Actions, Capacity, Ramp, WatchSettings, read_settings
from adlocal.serve.watch.baseline import fit, read_baseline, write_baseline
from adlocal.serve.watch.benign import DEFAULTS as BY_WINDOW
from adlocal.serve.watch.benign import Benign, usual
from adlocal.serve.watch.features import FEATURES, GROUPS, HEAVIEST_GROUP, coefficient_of_variation
from adlocal.serve.watch.ramp import Standing, follow, smoothstep, target
from adlocal.serve.watch.score import Scored, scored

DEFAULTS = BY_WINDOW[600]
MEDIANS = {name: each.median for name, each in DEFAULTS.items()}
HUGE = 1e12


def raised(ramp: Ramp, found: Scored) -> float:
    return target(ramp, found.score, ramp.agreed(found))


def test_weights_sum_to_one_and_no_group_reaches_the_start() -> None:
    assert sum(each.weight for each in FEATURES.values()) == pytest.approx(1)
    assert Ramp().start > HEAVIEST_GROUP
    assert len(GROUPS) == 4


@pytest.mark.parametrize("name", FEATURES)
def test_no_single_feature_raises_however_large(name: str) -> None:
    for needed in ("", *GROUPS):
        found = scored(600, {**MEDIANS, name: HUGE}, 1e9, DEFAULTS)
        assert found.score == pytest.approx(FEATURES[name].weight)
        assert raised(Ramp(needed=needed), found) == 0


@pytest.mark.parametrize("group", GROUPS)
def test_no_group_of_features_raises_alone(group: str) -> None:
    values = {name: HUGE if each.group == group else MEDIANS[name] for name, each in FEATURES.items()}
    found = scored(600, values, 1e9, DEFAULTS)
    assert found.signals == (group,)
    assert raised(Ramp(signals=2, needed=group), found) == 0


def test_all_together_reach_the_end_of_the_ramp() -> None:
    found = scored(600, dict.fromkeys(FEATURES, HUGE), 1e9, DEFAULTS)
    assert found.score == pytest.approx(1, abs=1e-6)
    assert found.signals == GROUPS
    assert raised(Ramp(), found) == 1


def test_few_requests_are_weak_evidence() -> None:
    """One standard formula: at 4 σ of everything, n requests score n / (n + 8)."""
    values = {name: each.median + 4 * max(each.sigma, FEATURES[name].floor) for name, each in DEFAULTS.items()}
    for n in (1, 8, 80):
        assert scored(600, values, n, DEFAULTS).score == pytest.approx(n / (n + 8))


def test_three_groups_without_the_needed_one_do_not_raise() -> None:
    values = {name: MEDIANS[name] if each.group == "thought" else HUGE for name, each in FEATURES.items()}
    found = scored(600, values, 1e9, DEFAULTS)
    assert len(found.signals) == 3
    assert raised(Ramp(), found) == 0
    assert raised(Ramp(needed=""), found) > 0.9


@given(st.dictionaries(st.sampled_from(list(FEATURES)), st.floats(-1e9, 1e9)), st.integers(0, 10**6))
def test_a_score_is_within_its_bounds(values: dict[str, float], n: int) -> None:
    found = scored(600, values, n, DEFAULTS)
    assert 0 <= found.score <= 1 + 1e-9
    assert all(0 <= term <= 1 for term in found.terms.values())


def test_less_than_usual_is_no_sign() -> None:
    assert scored(600, dict.fromkeys(FEATURES, -HUGE), 1e9, DEFAULTS).score == 0


# The ramp.


def test_smoothstep() -> None:
    assert [smoothstep(x) for x in (-1, 0, 0.5, 1, 2)] == [0, 0, 0.5, 1, 1]


def test_strength_only_rises_from_the_policys() -> None:
    assert [Ramp.strength(2, 6, x) for x in (0, 0.5, 1)] == [2, 4, 6]
    assert Ramp.strength(5, 1, 1) == 5


def test_it_rises_at_a_limited_rate() -> None:
    ramp, standing = Ramp(rise_per_minute=0.5), Standing()
    found = [follow(ramp, standing, 1.0, True, 1e9 + 30 * i) for i in range(6)]
    assert found == pytest.approx([0.5, 0.75, 1, 1, 1, 1])  # the first counts as a minute
    assert follow(ramp, Standing(0.0, 1e9), 1.0, True, 1e9 + 86_400) == 0.5  # a silence saves nothing up


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.floats(0, 7200)), max_size=30))
def test_no_change_is_faster_than_allowed(steps: list[tuple[float, bool, float]]) -> None:
    ramp, standing, now = Ramp(), Standing(0.0, 1e9), 1e9
    for score, agreed, wait in steps:
        before, now = standing.position, now + wait
        after = follow(ramp, standing, score, agreed, now)
        assert 0 <= after <= 1
        assert after - before <= ramp.rise_per_minute * wait / 60 + 1e-9
        assert before - after <= ramp.fall_per_hour * wait / 3600 + 1e-9


def test_it_holds_near_the_start_and_falls_below() -> None:
    ramp, standing = Ramp(start=0.4, hysteresis=0.1, fall_per_hour=0.5), Standing(1.0, 0.0)
    assert follow(ramp, standing, 0.31, False, 3600) == 1.0
    assert follow(ramp, standing, 0.29, False, 7200) == 0.5
    assert follow(ramp, standing, 0.29, False, 14_400) == 0.0


# Settings and baselines.


def test_what_is_not_calibrated_has_the_nearest_windows_default() -> None:
    known = {900: {"rate": Benign(7.0, 1.0)}}
    assert usual(900, known) == {**BY_WINDOW[600], "rate": Benign(7.0, 1.0)}
    assert usual(50_000, known) == BY_WINDOW[86_400]
    assert all(set(features) == set(FEATURES) for features in BY_WINDOW.values())


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"ramps": {}}, "watch.ramps: not known"),
        ({"ramp": {"start": 0.1}}, "watch.ramp.start=0.1: give above 0.32"),
        ({"ramp": {"start": "0.5"}}, "watch.ramp.start='0.5': expected such a value as 0.4"),
        ({"ramp": {"full": 0.2}}, "watch.ramp.full=0.2"),
        ({"ramp": {"signals": 1}}, "watch.ramp.signals=1: give 2 to 4"),
        ({"ramp": {"needed": "noise"}}, "watch.ramp.needed='noise'"),
        ({"ramp": 3}, "watch.ramp=3: give a table"),
        ({"actions": {"block": 1}}, "watch.actions.block=1"),
        ({"actions": {"block_at": 0.5}}, "watch.actions.throttle_at, block_at"),
        ({"across": {"keys": 1}}, "watch.across.keys=1"),
        ({"across": {"signals": 1}}, "watch.across.signals=1"),
        ({"capacity": {"subjects": 0}}, "watch.capacity.subjects=0"),
        ({"windows": [600, 100_000]}, "watch.windows"),
        ({"windows": []}, "watch.windows"),
        ({"long_answer": True}, "watch.long_answer=True"),
        ({"baseline": "/nowhere/x.toml"}, "/nowhere/x.toml: No such file"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: dict[str, object], told: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings(table)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_becomes_settings(tmp_path: Path) -> None:
    write_baseline(tmp_path / "b.toml", {600: {"rate": Benign(2.0, 0.5)}})
    table = {
        "windows": [600],
        "ramp": {"start": 0.5, "full": 1},
        "actions": {"block": True},
        "across": {"keys": 3},
        "capacity": {"records": 100},
        "baseline": str(tmp_path / "b.toml"),
    }
    expected = WatchSettings(
        windows=(600,),
        ramp=Ramp(start=0.5, full=1),
        actions=Actions(block=True),
        across=AcrossKeys(keys=3),
        capacity=Capacity(records=100),
        baseline={600: {"rate": Benign(2.0, 0.5)}},
    )
    assert read_settings(table) == expected
    assert read_settings({}) == WatchSettings()


def test_by_default_strength_is_all_that_is_touched() -> None:
    actions = WatchSettings().actions
    assert (actions.raise_strength, actions.throttle, actions.block, actions.raise_evaluation) == (
        True,
        False,
        False,
        False,
    )


def test_a_baseline_is_robust_to_a_few_wild_values() -> None:
    benign = [{"rate": 1 + i / 100} for i in range(100)]
    wild = [{"rate": 1e6}] * 10
    assert fit({600: benign + wild})[600]["rate"].median == pytest.approx(
        fit({600: benign})[600]["rate"].median, abs=0.1
    )
    assert fit({600: benign + wild})[600]["rate"].sigma < 0.6


def test_a_feature_that_never_varies_gets_the_floor_and_a_rare_one_its_default() -> None:
    found = fit({600: [{"cool": 0.0}] * 100 + [{"long": 0.1}] * 5})
    assert found == {600: {"cool": Benign(0.0, FEATURES["cool"].floor)}}


SPOILED = ("x = ", "windows = 3", "[windows.a]", '[windows."600"]\nrate = 3', '[windows."600"]\nfoo={median=1,sigma=1}')


@pytest.mark.parametrize("text", SPOILED)
def test_a_spoiled_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "b.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"b\.toml.*adlocal watch calibrate"):
        read_baseline(path)


def test_the_coefficient_of_variation() -> None:
    gaps = [1.0, 2.0, 3.0, 10.0]
    expected = math.sqrt(sum((x - 4) ** 2 for x in gaps) / 4) / 4
    found = coefficient_of_variation(4, sum(gaps), sum(x * x for x in gaps))
    assert found == pytest.approx(expected)
