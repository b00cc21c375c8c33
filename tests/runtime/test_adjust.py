"""The equation against float64, written here from the paper and not from the code."""

from __future__ import annotations

import re
from collections.abc import Callable

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
def test_candidates_move_by_centred_delta_and_nothing_else_moves(guard: float) -> None:
    for seed in range(50):
        z, d = random_row(seed)
        c = plausible(z, guard)
        got = adjust(z, d, lam=2.5, guard=guard).logits
        exact = d[c].astype(np.float64)
        np.testing.assert_allclose(got[c], z[c] + 2.5 * (exact - exact.mean()), atol=ROUNDING)
        assert got[~c].tobytes() == z[~c].tobytes()


def test_shifts_sum_to_zero_over_the_candidates() -> None:
    """To N roundings of float32."""
    for guard in (0.0, 0.05):
        z, d = random_row(2)
        shift = adjust(z, d, lam=3.0, guard=guard).logits.astype(np.float64) - z
        assert abs(shift.sum()) < N * 2e-6


def test_one_plausible_token_leaves_nothing_to_steer() -> None:
    z, d = row(9.0, 0.0, -1.0), row(-100.0, 5.0, 7.0)
    result = adjust(z, d, lam=10.0, guard=0.05)
    assert (result.logits.tolist(), result.kl, result.n_candidates) == (z.tolist(), 0.0, 1)


def test_guard_1_steers_among_ties_for_the_top() -> None:
    z, d = row(2.0, 2.0, 1.999, 2.0), row(1.0, 0.0, 50.0, -1.0)
    assert adjust(z, d, lam=1.0, guard=1.0).logits.tolist() == row(3.0, 2.0, 1.999, 1.0).tolist()


def test_ties_part_by_lambda_times_their_difference_in_delta() -> None:
    z, d = np.zeros(4, dtype=np.float32), row(0.5, -0.5, 1.5, 2.5)
    logits = adjust(z, d, lam=2.0, guard=0.05).logits
    assert np.diff(logits).tolist() == [-2.0, 4.0, 2.0]


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
        c = plausible(z, guard)[:-8]
        result = adjust(z, d[:-8], lam=2.0, guard=guard)
        exact = d[:-8][c].astype(np.float64)
        np.testing.assert_allclose(result.logits[:-8][c], z[:-8][c] + 2.0 * (exact - exact.mean()), atol=ROUNDING)
        assert result.logits[-8:].tobytes() == z[-8:].tobytes()
        assert result.kl == pytest.approx(kl(result.logits, z), abs=1e-5)


def test_nothing_moves_when_only_tokens_beyond_the_proxy_are_plausible() -> None:
    z = row(0.0, 0.0, 20.0)
    result = adjust(z, row(1.0, -1.0), lam=1.0, guard=0.05)
    assert (result.logits.tolist(), result.kl, result.n_candidates) == (z.tolist(), 0.0, 0)


def test_minus_infinity_stays_and_is_no_candidate() -> None:
    z, d = row(-INF, 1.0, 1.0, -INF), row(9.0, 1.0, 3.0, -9.0)
    result = adjust(z, d, lam=1.0, guard=0.0)
    assert result.logits.tolist() == [-INF, 0.0, 2.0, -INF]
    assert result.n_candidates == 2


# KL


@pytest.mark.parametrize("guard", [0.0, 0.05])
@pytest.mark.parametrize("lam", [0.01, 1.0, 30.0, 3000.0])
def test_kl_is_that_of_the_two_distributions(lam: float, guard: float) -> None:
    """Against Σ q log(q / p) of the exact adjusted row, to 1e-5: the teacher's share outside is summed in float32."""
    for seed in range(20):
        z, d = random_row(seed)
        c = plausible(z, guard)
        exact = z.astype(np.float64)
        exact[c] += lam * (d[c].astype(np.float64) - d[c].astype(np.float64).mean())
        assert adjust(z, d, lam=lam, guard=guard).kl == pytest.approx(kl(exact, z), abs=1e-5)


@pytest.mark.parametrize("lam", [1e3, 1e6, 1e9])
def test_kl_of_a_huge_lambda_is_the_surprise_of_the_token_left(lam: float) -> None:
    """All mass on one token x: KL = −log p(x), to 1e-6."""
    z = row(1.0, 0.5, 0.2, -5.0)
    result = adjust(z, row(-1.0, 1.0, 0.5, 3.0), lam=lam, guard=0.05)
    assert result.kl == pytest.approx(-log_softmax(z)[1], abs=1e-6)


# What cannot be sampled from


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_delta_that_is_no_number_is_refused_at_a_candidate_only(bad: float) -> None:
    z = row(1.0, 1.0, 1.0, -20.0)
    with pytest.raises(ProxyError, match=r"token 1 .*nothing emitted"):
        adjust(z, row(0.0, bad, 1.0, 0.0), lam=1.0, guard=0.05)
    harmless = adjust(z, row(0.0, -1.0, 1.0, bad), lam=1.0, guard=0.05)
    assert harmless.logits.tolist() == [1.0, 0.0, 2.0, -20.0]


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
