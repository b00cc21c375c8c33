"""The equation against float64, written here from the paper and not from the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adlocal import InputError, ProxyError
from adlocal.adjust import Adjusted, adjust, candidates, check_guard, check_strength, delta, expectation
from support.reference import log_softmax

Row = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

N = 300
INF = float("inf")
# Adjusted rows are float32: half a unit in the last place of a logit under 64 is 2e-6, and two roundings add up.
ROUNDING = 1e-5


def random_row(seed: int) -> tuple[Row, Row]:
    """Logits of a teacher and Δ, of the sizes that real ones have."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, N).astype(np.float32), rng.normal(0, 1, N).astype(np.float32)


def row(*logits: float) -> Row:
    return np.array(logits, dtype=np.float32)


def softmax(z: npt.ArrayLike) -> Exact:
    return np.asarray(np.exp(log_softmax(z)), dtype=np.float64)


def plausible(z: Row, guard: float) -> npt.NDArray[np.bool_]:
    """p(i) ≥ guard · max p, told by probabilities."""
    p = softmax(z)
    return np.asarray(p >= guard * p.max())


def shifted(z: Row, d: Row, lam: float, inside: npt.NDArray[np.bool_]) -> Exact:
    """Logits of p · exp(λΔ) inside, scaled to the probability that was inside before."""
    logits = z.astype(np.float64)
    tilted = log_softmax(logits[inside] + lam * d[inside[: len(d)]].astype(np.float64))
    logits[inside] = tilted + np.log(np.sum(np.exp(logits[inside])))
    return logits


def kl(q: npt.ArrayLike, p: npt.ArrayLike) -> float:
    """KL(softmax(q) ‖ softmax(p)) = Σ q log(q / p), where 0 log 0 = 0."""
    log_q, log_p = log_softmax(q), log_softmax(p)
    some = np.exp(log_q) > 0
    return float(np.sum(np.exp(log_q[some]) * (log_q[some] - log_p[some])))


# The paper


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_without_guard_the_distribution_is_the_papers(lam: float, tau: float) -> None:
    """softmax((z + λΔ) / τ): centring cancels. Probabilities to 1e-4 of themselves, ROUNDING / τ in the exponent."""
    for seed in range(20):
        z, d = random_row(seed)
        got = softmax(adjust(z, d, lam=lam, guard=0.0).logits.astype(np.float64) / tau)
        expected = softmax((z.astype(np.float64) + lam * d.astype(np.float64)) / tau)
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_lambda_is_the_papers_times_temperature_and_gradient_norm() -> None:
    """log p/τ + λ_paper Δ_paper, with the raw gradient's Δ_paper = ‖g‖ Δ and λ = τ λ_paper ‖g‖."""
    tau, norm, lam_paper = 0.6, 7.05, 0.2
    z, d = random_row(0)
    paper = softmax(log_softmax(z) / tau + lam_paper * norm * d.astype(np.float64))
    ours = adjust(z, d, lam=tau * lam_paper * norm, guard=0.0).logits.astype(np.float64)
    np.testing.assert_allclose(softmax(ours / tau), paper, rtol=1e-4)


def test_greedy_decoding_is_protected() -> None:
    """As λ grows the largest logit goes to the largest Δ among the candidates, at any temperature."""
    for seed in range(20):
        z, d = random_row(seed)
        worst = np.argmax(np.where(plausible(z, 0.05), d, -INF))
        assert np.argmax(adjust(z, d, lam=1e6, guard=0.05).logits) == worst


def test_a_constant_in_delta_cancels() -> None:
    z, d = random_row(1)
    shifted = adjust(z, d + np.float32(8), lam=1.0, guard=0.05).logits
    np.testing.assert_allclose(shifted, adjust(z, d, lam=1.0, guard=0.05).logits, atol=ROUNDING)


# Guard and centring


@pytest.mark.parametrize("guard", [0.0, 1e-3, 0.05, 0.5, 1.0])
def test_candidates_are_the_tokens_with_a_share_of_the_top_probability(guard: float) -> None:
    for seed in range(50):
        z, d = random_row(seed)
        assert candidates(z, guard).tolist() == np.flatnonzero(plausible(z, guard)).tolist()
        assert adjust(z, d, lam=1.0, guard=guard).n_candidates == plausible(z, guard).sum()


@pytest.mark.parametrize("guard", [0.0, 1e-3, 0.05, 0.5, 1.0])
def test_candidates_share_their_mass_anew_and_nothing_else_moves(guard: float) -> None:
    for seed in range(50):
        z, d = random_row(seed)
        c = plausible(z, guard)
        got = adjust(z, d, lam=2.5, guard=guard).logits
        np.testing.assert_allclose(got[c], shifted(z, d, 2.5, c)[c], atol=ROUNDING)
        assert got[~c].tobytes() == z[~c].tobytes()


def test_a_permutation_of_the_tokens_permutes_the_row() -> None:
    """To a rounding: sums run in another order."""
    z, d = random_row(2)
    z[:5] = z.max() - 1
    order = np.random.default_rng(0).permutation(N)
    straight = adjust(z, d, lam=2.0, guard=0.05, ends=np.array([3, 200]))
    turned = adjust(z[order], d[order], lam=2.0, guard=0.05, ends=np.flatnonzero(np.isin(order, [3, 200])))
    np.testing.assert_allclose(turned.logits, straight.logits[order], atol=ROUNDING)
    assert turned.n_candidates == straight.n_candidates
    assert turned.kl == pytest.approx(straight.kl, abs=1e-9)


def test_one_plausible_token_leaves_nothing_to_steer() -> None:
    z, d = row(9.0, 0.0, -1.0), row(-100.0, 5.0, 7.0)
    for z[0] in (9.0, 0.1, -0.0):  # to the bit
        z[1:] = z[0] - 9
        result = adjust(z, d, lam=1e30, guard=0.05)
        assert (result.logits.tobytes(), result.kl, result.n_candidates) == (z.tobytes(), 0.0, 1)


def test_guard_1_steers_among_ties_for_the_top() -> None:
    z, d = row(2.0, 2.0, 1.999, 2.0), row(1.0, 0.0, 50.0, -1.0)
    top = 2 + np.log(3 / (np.e + 1 + 1 / np.e))
    expected = row(top + 1, top, 1.999, top - 1)
    np.testing.assert_allclose(adjust(z, d, lam=1.0, guard=1.0).logits, expected, atol=ROUNDING)


def test_ties_part_by_lambda_times_their_difference_in_delta() -> None:
    z, d = np.zeros(4, dtype=np.float32), row(0.5, -0.5, 1.5, 2.5)
    logits = adjust(z, d, lam=2.0, guard=0.05).logits
    np.testing.assert_allclose(np.diff(logits), [-2.0, 4.0, 2.0], atol=ROUNDING)


def test_the_teachers_row_is_left_alone() -> None:
    z, d = random_row(3)
    before = z.copy(), d.copy()
    adjust(z, d, lam=1.0, guard=0.0)
    assert (z.tobytes(), d.tobytes()) == (before[0].tobytes(), before[1].tobytes())


# λ = 0, padding, −inf


@pytest.mark.parametrize("guard", [0.0, 0.05, 1.0])
def test_lambda_0_is_the_teacher_bit_for_bit(guard: float) -> None:
    for seed in range(50):
        z, d = random_row(seed)
        z[seed] = -INF
        result = adjust(z, d, lam=0.0, guard=guard)
        assert result.logits.tobytes() == z.tobytes()
        assert result.kl == 0.0


@pytest.mark.parametrize("guard", [0.0, 0.05])
def test_tokens_beyond_the_proxys_vocabulary_are_never_lifted(guard: float) -> None:
    for seed in range(20):
        z, d = random_row(seed)
        z[-8:] = z.max() - 1  # plausible, so that only the padding keeps them in place
        c = plausible(z, guard)
        c[-8:] = False
        result = adjust(z, d[:-8], lam=2.0, guard=guard)
        np.testing.assert_allclose(result.logits, shifted(z, d[:-8], 2.0, c), atol=ROUNDING)
        assert result.logits[-8:].tobytes() == z[-8:].tobytes()
        assert result.kl == pytest.approx(kl(result.logits, z), abs=1e-5)


def test_nothing_moves_when_only_tokens_beyond_the_proxy_are_plausible() -> None:
    z = row(0.0, 0.0, 20.0)
    result = adjust(z, row(1.0, -1.0), lam=1.0, guard=0.05)
    assert (result.logits.tolist(), result.kl, result.n_candidates) == (z.tolist(), 0.0, 0)


def test_minus_infinity_stays_and_is_no_candidate() -> None:
    z, d = row(-INF, 1.0, 1.0, -INF), row(9.0, 1.0, 3.0, -9.0)
    result = adjust(z, d, lam=1.0, guard=0.0)
    top = 1 + np.log(2 / (1 + np.exp(-2)))
    np.testing.assert_allclose(result.logits, [-INF, top - 2, top, -INF], atol=ROUNDING)
    assert result.n_candidates == 2


# Ends of generation


ENDS = np.array([3, 77, 290])


def with_ends(seed: int) -> tuple[Row, Row]:
    """A row with an end that is plausible, one that is not and one that is ruled out; their Δ is not asked for."""
    z, d = random_row(seed)
    z[ENDS] = row(z.max() - 0.5, z.min(), -INF)
    d[ENDS] = row(40.0, float("nan"), INF)
    return z, d


@pytest.mark.parametrize("lam", [-3.0, 0.1, 2.0, 1e6])
@pytest.mark.parametrize("guard", [0.0, 1e-3, 0.05, 0.5])
def test_ends_and_what_the_guard_leaves_out_keep_their_probability(guard: float, lam: float) -> None:
    """Their logits to the bit, and so their probability, to 1e-6: candidates are rounded to float32."""
    for seed in range(50):
        z, d = with_ends(seed)
        c = plausible(z, guard)
        c[ENDS] = False
        result = adjust(z, d, lam=lam, guard=guard, ends=ENDS)
        assert candidates(z, guard, ends=ENDS).tolist() == np.flatnonzero(c).tolist()
        assert result.n_candidates == c.sum()
        assert result.logits[~c].tobytes() == z[~c].tobytes()
        np.testing.assert_allclose(softmax(result.logits)[~c], softmax(z)[~c], rtol=2e-6)
        exact = shifted(z, d, lam, c)
        if exact[c].max() > z[3] or z[3] == z.max():
            np.testing.assert_allclose(result.logits[c], exact[c], rtol=1e-6, atol=ROUNDING)
            assert result.kl == pytest.approx(kl(exact, z), abs=1e-9)


@pytest.mark.parametrize("n_shared", [299, 250, 4])
def test_ends_beyond_the_proxys_vocabulary_stay_too(n_shared: int) -> None:
    z, d = with_ends(7)
    z[299] = z.max()
    c = plausible(z, 0.05)
    c[ENDS] = c[n_shared:] = False
    result = adjust(z, d[:n_shared], lam=2.0, guard=0.05, ends=np.array([*ENDS, 299]))
    assert result.n_candidates == c.sum()
    assert result.logits[~c].tobytes() == z[~c].tobytes()


def test_the_guard_asks_for_a_share_of_the_top_even_if_that_is_an_end() -> None:
    z = row(5.0, 3.0, 1.9)
    assert candidates(z, 0.05, ends=np.array([0])).tolist() == [1]
    assert adjust(z, row(9.0, 1.0, 0.0), lam=1.0, guard=0.05, ends=np.array([0])).n_candidates == 1


@pytest.mark.parametrize("guard", [0.0, 0.05])
def test_nothing_moves_when_only_ends_are_plausible(guard: float) -> None:
    z = row(5.0, -0.0, 4.5) if guard else row(5.0, -INF, 4.5)
    result = adjust(z, row(1.0, float("nan"), 2.0), lam=3.0, guard=guard, ends=np.array([0, 2]))
    assert (result.logits.tobytes(), result.kl, result.n_candidates) == (z.tobytes(), 0.0, 0)


def even(n: int, end: float, others: tuple[float, ...] = ()) -> tuple[Row, Row]:
    """A row that λ = 1 evens out: a candidate at 0, n − 1 at −2, and Δ takes the lead away. Then an end, and others."""
    return row(0.0, *[-2.0] * (n - 1), end, *others), row(-2.0, *[0.0] * n, *[0.0] * len(others))


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("end", [-1e-7, -0.3, -0.5])
def test_greedy_decoding_ends_only_where_the_teacher_would(n: int, end: float) -> None:
    """One candidate goes to the next float32 above the end, the others pay for it in proportion. KL to 1e-9."""
    z, d = even(n, end)
    d[1] += row(0.01)[0]
    kept = shifted(z, d, 1.0, np.arange(n + 1) < n)
    assert np.max(kept[:n]) < end, "the case is none"
    result = adjust(z, d, lam=1.0, guard=0.05, ends=np.array([n]))
    above = np.nextafter(z[n], row(1.0)[0])
    share = softmax(kept)
    left = (share[:n].sum() - np.exp(float(above) - float(z[n])) * share[n]) / (share[:n].sum() - share[1])
    kept[:n] += np.log(left)
    kept[1] = above
    assert result.logits[1] == above
    assert result.logits.argmax() == 1
    assert result.logits[n] == z[n]
    np.testing.assert_allclose(result.logits, kept, atol=ROUNDING)
    np.testing.assert_allclose(softmax(result.logits)[n], softmax(z)[n], rtol=2e-6)
    assert result.kl == pytest.approx(kl(kept, z), abs=1e-9)


def test_of_ties_for_the_largest_one_goes_above_the_end() -> None:
    z, d = even(6, -0.3)
    result = adjust(z, d, lam=1.0, guard=0.05, ends=np.array([6]))
    assert (result.logits > z[6]).sum() == 1
    np.testing.assert_allclose(softmax(result.logits)[6], softmax(z)[6], rtol=2e-6)


def test_next_to_nothing_may_be_left_to_pay_with() -> None:
    """Guard 0, and a shift that evens out what was e^50 to 1: finite, and one token above the end."""
    end = np.nextafter(row(0.0), row(-1.0))[0]
    result = adjust(row(0.0, -50.0, end), row(-50.0, 0.0, 0.0), lam=1.0, guard=0.0, ends=np.array([2]))
    assert np.all(np.isfinite(result.logits))
    assert result.logits[:2].max() == 0


@pytest.mark.parametrize("lam", [1e-7, 1.0, 1e3, 1e9, 1e30])
def test_the_raise_is_exact_at_any_strength(lam: float) -> None:
    """Δ evens four tokens out, and one falls by as much as 10^32: to the next float32 all the same."""
    z, d = row(0.0, -0.5, -0.5, -0.5, -0.05), row(-0.5 / lam, 0.0, 0.0, -100.0, 0.0)
    result = adjust(z, d, lam=lam, guard=0.05, ends=np.array([4]))
    assert np.max(result.logits[:4]) == np.nextafter(z[4], row(1.0)[0])


@pytest.mark.parametrize(
    ("end", "others", "ends"),
    [
        (0.0, (), [5]),  # as large as the top: an end is the teacher's choice
        (0.1, (), [5]),
        (-1.5, (), [5]),  # still below the largest candidate
        (-0.3, (-0.2,), [5]),  # a token that is never lifted is above the end
        (-0.3, (), []),  # no end
    ],
)
def test_nothing_is_raised_where_the_end_does_not_take_over(end: float, others: Any, ends: list[int]) -> None:
    z, d = even(5, end, others)
    d = d[:6]
    c = np.arange(len(z)) < 5 + (not ends)
    result = adjust(z, d, lam=1.0, guard=0.05, ends=np.array(ends, dtype=np.intp))
    np.testing.assert_allclose(result.logits, shifted(z, d, 1.0, c), atol=ROUNDING)


def test_random_rows_never_end_before_the_teacher() -> None:
    for seed in range(300):
        z, d = random_row(seed)
        z *= row(0.2)[0]
        z[3] = np.sort(z)[-2] if z.argmax() != 3 else z[3]
        got = adjust(z, d, lam=0.4, guard=0.05, ends=np.array([3])).logits
        assert got.argmax() != 3 or z.argmax() == 3


# KL


@pytest.mark.parametrize("guard", [0.0, 0.05])
@pytest.mark.parametrize("lam", [0.01, 1.0, 30.0, 3000.0])
def test_kl_is_that_of_the_two_distributions(lam: float, guard: float) -> None:
    """Against Σ q log(q / p) of the exact adjusted row."""
    for seed in range(20):
        z, d = random_row(seed)
        c = plausible(z, guard)
        assert adjust(z, d, lam=lam, guard=guard).kl == pytest.approx(kl(shifted(z, d, lam, c), z), abs=1e-9)


@pytest.mark.parametrize("lam", [1e3, 1e6, 1e9])
def test_kl_of_a_huge_lambda_is_the_surprise_of_the_token_left(lam: float) -> None:
    """All the candidates' mass m on one token x: KL = m log(m / p(x)), to 1e-6."""
    z = row(1.0, 0.5, 0.2, -5.0)
    result = adjust(z, row(-1.0, 1.0, 0.5, 3.0), lam=lam, guard=0.05)
    p = softmax(z)
    mass = 1 - p[3]
    assert result.kl == pytest.approx(mass * np.log(mass / p[1]), abs=1e-6)


# What cannot be sampled from


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_delta_that_is_no_number_is_refused_at_a_candidate_only(bad: float) -> None:
    z = row(1.0, 1.0, 1.0, -20.0)
    with pytest.raises(ProxyError, match=r"token 1 .*nothing emitted"):
        adjust(z, row(0.0, bad, 1.0, 0.0), lam=1.0, guard=0.05)
    harmless = adjust(z, row(0.0, -1.0, 1.0, bad), lam=1.0, guard=0.05)
    top = 1 + np.log(3 / (1 + np.exp(-1) + np.exp(-2)))
    np.testing.assert_allclose(harmless.logits, [top - 1, top - 2, top, -20.0], atol=ROUNDING)


@pytest.mark.parametrize("z", [row(1.0, float("nan")), row(1.0, INF), row(-INF, -INF)])
def test_a_teacher_without_a_distribution_is_refused(z: Row) -> None:
    with pytest.raises(ProxyError, match="teacher's largest logit is"):
        adjust(z, row(0.0, 1.0), lam=1.0, guard=0.05)


@pytest.mark.parametrize("lam", [1e39, 1e308, INF])
def test_a_lambda_that_overflows_is_refused(lam: float) -> None:
    with pytest.raises(ProxyError, match="smaller strength"):
        adjust(row(1.0, 1.0, 1.0), row(10.0, 0.0, -10.0), lam=lam, guard=0.05)


# Δ and its expectation


def test_delta_is_the_central_difference() -> None:
    """float32: relative 1e-6 of the largest Δ; whole rows and stacks of them alike."""
    rng = np.random.default_rng(0)
    plus, minus = rng.normal(0, 3, (2, 5, N)).astype(np.float32)
    exact = (plus.astype(np.float64) - minus.astype(np.float64)) / (2 * 0.01)
    got = delta(plus, minus, 0.01)
    assert got.dtype == np.float32
    assert got.shape == (5, N)
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
    assert delta(plus[2], minus[2], 0.01).tobytes() == got[2].tobytes()


def line(epsilon: float) -> tuple[Callable[[float], Exact], Row, Row]:
    """A proxy whose logits move straight along ĝ: z(t), and z± = z(±ε)."""
    rng = np.random.default_rng(4)
    z, slope = rng.normal(0, 3, N), rng.normal(0, 1, N)

    def at(t: float) -> Exact:
        return np.asarray(z + t * slope, dtype=np.float64)

    return at, at(epsilon).astype(np.float32), at(-epsilon).astype(np.float32)


def test_expectation_is_the_mean_of_delta_under_the_middle_proxy() -> None:
    """Against float64 of the same float32 rows, to 1e-5."""
    _, plus, minus = line(0.05)
    d = delta(plus, minus, 0.05)
    p = softmax((plus.astype(np.float64) + minus.astype(np.float64)) / 2)
    assert expectation(plus, minus, d) == pytest.approx(float(p @ d.astype(np.float64)), abs=1e-5)


def test_expectation_does_not_overflow() -> None:
    z = row(900.0, 0.0)
    assert expectation(z, z, row(2.0, -1.0)) == pytest.approx(2.0)


def test_dose_of_a_token_is_the_derivative_of_its_log_probability() -> None:
    """d/dt log p_x(t) = Δ_x − E[Δ], by central differences in float64.

    To 1e-4: differences err by h² = 1e-8, Δ by the rounding of z± to float32, 5e-7 / (2ε) each.
    """
    epsilon, h = 0.05, 1e-4
    at, plus, minus = line(epsilon)
    d = delta(plus, minus, epsilon)
    derivative = (log_softmax(at(h)) - log_softmax(at(-h))) / (2 * h)
    np.testing.assert_allclose(d - expectation(plus, minus, d), derivative, atol=1e-4)


# Knobs


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, 1000.0, np.float64(0.5)])
def test_strengths_from_0_up_pass(value: float) -> None:
    assert check_strength(value) == value
    assert type(check_strength(value)) is float


@pytest.mark.parametrize("value", [0, 1, 0.05, np.float64(0.5)])
def test_guards_from_0_to_1_pass(value: float) -> None:
    assert check_guard(value) == value
    assert type(check_guard(value)) is float


@pytest.mark.parametrize("value", [None, "1", [1.0], float("nan"), INF, -INF, -0.5, 10**400])
def test_other_strengths_are_named_and_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"^strength={re.escape(repr(value))}: give nats from 0"):
        check_strength(value)


@pytest.mark.parametrize("value", [None, "0.05", [0.1], float("nan"), INF, -0.01, 1.01])
def test_other_guards_are_named_and_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"^guard={re.escape(repr(value))}: give a share"):
        check_guard(value)


def test_a_result_cannot_be_changed_by_mistake() -> None:
    result = adjust(*random_row(5), lam=1.0, guard=0.05)
    with pytest.raises(AttributeError):
        result.kl = 0.0  # type: ignore[misc]
    assert isinstance(result, Adjusted)
