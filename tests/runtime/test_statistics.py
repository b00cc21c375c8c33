"""Standard errors against closed forms, and against the spread of many simulated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adlocal.statistics import mean_error, paired_error, ratio_error


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(50, 9, 4, 37), (3, 1, 0, 0), (0, 20, 20, 0)])
def test_the_error_of_an_accuracy_drop_is_that_of_mcnemars_counts(
    both: int, first: int, second: int, neither: int
) -> None:
    """Prompts that both rounds get right, or neither, say nothing about the drop (b − c) / n."""
    n = both + first + second + neither
    before = [True] * (both + first) + [False] * (second + neither)
    after = [True] * both + [False] * first + [True] * second + [False] * neither
    variance = (first + second - (first - second) ** 2 / n) / (n - 1)
    assert paired_error(before, after) == pytest.approx(math.sqrt(variance / n), rel=1e-12)
    assert paired_error(after, before) == pytest.approx(paired_error(before, after))


def test_equal_rounds_have_no_error() -> None:
    assert paired_error([True, False, True], [True, False, True]) == 0.0


def test_the_paired_error_is_the_spread_of_drops() -> None:
    """4,000 sets of 200 prompts that differ in how hard they are. Taken for independent, it is 1.6 times that."""
    random = np.random.default_rng(0)
    hard = random.beta(0.4, 0.4, (4000, 200))
    before, after = random.random((2, 4000, 200)) > np.stack([hard, 0.9 * hard + 0.1])
    drops = before.mean(1) - after.mean(1)
    errors = [paired_error(a, b) for a, b in zip(before, after, strict=True)]
    assert np.mean(errors) == pytest.approx(drops.std(), rel=0.04)  # three standard errors of a spread of 4,000
    independent = [math.hypot(mean_error(a), mean_error(b)) for a, b in zip(before, after, strict=True)]
    assert np.mean(independent) > 1.4 * drops.std()


def test_independent_pairs_add_up() -> None:
    """Where items have nothing in common, both ways agree."""
    ours, theirs = np.random.default_rng(1).normal(size=(2, 20000))
    assert paired_error(ours, theirs) == pytest.approx(math.hypot(mean_error(ours), mean_error(theirs)), rel=0.03)


def test_pairs_need_as_many_of_each() -> None:
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_error([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_error_of_a_mean() -> None:
    assert mean_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert mean_error([5.0]) == 0.0


def test_the_error_of_a_ratio_is_the_spread_of_ratios() -> None:
    """Nats a token over 100 prompts of 10 to 60 tokens, whose rates differ."""
    random = np.random.default_rng(2)
    n = random.integers(10, 60, (4000, 100)).astype(float)
    sums = n * random.gamma(4.0, 0.05, n.shape)
    ratios = sums.sum(1) / n.sum(1)
    errors = [ratio_error(a, b) for a, b in zip(sums, n, strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.04)


def test_a_ratio_of_equal_counts_is_a_mean() -> None:
    sums = [1.0, 4.0, 2.0]
    assert ratio_error(sums, [2.0] * 3) == pytest.approx(mean_error(sums) / 2)
    assert ratio_error([3.0], [7.0]) == 0.0
