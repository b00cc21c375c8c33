"""Text written at many strengths, and the search for the strength that spends a budget."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import llama_cpp
import numpy as np
from tqdm import tqdm

from ..errors import ConversionError, InputError
from ..llama import AntidistillationLlama
from ..llamacpp.tokens import end_tokens
from ..settings import Settings
from ..statistics import ratio_error
from ..traces import Prompt, TraceEncoder, final_answer, remarks
from .curve import MOST_STRENGTH, Curve, Point

KL, ACCURACY_DROP = "kl", "accuracy-drop"
GUARDS = (0.02, 0.05, 0.1, 0.2)
_N_ROUNDS = 8
_TOLERANCE = 0.05
#: Only the top token passes guard 1, so nothing is shifted; a strength above 0 has the pair evaluated all the same.
UNPROTECTED = Settings(strength=1e-6, guard=1.0)


@dataclass(frozen=True)
class Measurement:
    """Text of every prompt at one strength.

    Attributes:
        kl, dose: a token, over all tokens.
        kl_error: one standard error of `kl`, over the prompts; 0 for a single prompt.
        right: whether the final number of each completion is the answer, in the prompts' order; None without answers.
        n_cut: completions that ended by the limit of tokens.
    """

    strength: float
    n_tokens: int
    kl: float
    kl_error: float
    dose: float
    right: tuple[bool, ...] | None
    n_cut: int

    @property
    def accuracy(self) -> float | None:
        """The share of completions that are right; None without answers."""
        return None if self.right is None else sum(self.right) / len(self.right)


#: All measurements of a search, and the chosen one.
Found = tuple[list[Measurement], Measurement]


class ProtectedWriter:
    """A teacher, its pair and the prompts, ready to write text at any strength.

    The seed of a prompt is the same in every round, so that rounds differ by what the strength does. Top-k, top-p and
    min-p are the defaults of `llama_cpp.Llama.generate`.
    """

    def __init__(
        self,
        llm: AntidistillationLlama,
        prompts: Sequence[Prompt],
        *,
        n_predict: int,
        temperature: float,
        seed: int = 0,
        raw: bool = False,
    ) -> None:
        """Encodes the prompts; `llm` was opened with `full`, and the other arguments are those of `adlocal calibrate`.

        Raises:
            InputError: a prompt cannot be rendered, or leaves no room for `n_predict` tokens.
        """
        self.llm = llm
        self.temperature = temperature
        self._seed, self._n_predict, n_ctx = seed, n_predict, len(llm.input_ids)
        encoder = TraceEncoder(llm._model, raw=raw)
        self.prompts = [encoder.encode_prompt(each.where, each.prompt, each.tools) for each in prompts]
        self.notes = remarks(prompts, encoder)
        for prompt, tokens in zip(prompts, self.prompts, strict=True):
            if len(tokens) + self._n_predict > n_ctx:
                raise InputError(
                    f"{prompt.where}: {len(tokens)} tokens and {self._n_predict} to generate exceed --ctx-size "
                    f"{n_ctx}; give a larger one, or a smaller -n"
                )
        answers = [None if prompt.answer is None else final_answer(prompt.answer) for prompt in prompts]
        self._answers = None if None in answers else answers

    def plain(self, guard: float) -> tuple[Curve, Measurement]:
        """The plain teacher's own text: its rows, for guards from `guard` up, and the text as a round."""
        llm, pair = self.llm, self.llm.pair
        n_rows = len(self.prompts) * self._n_predict
        ends = end_tokens(llm._model.vocab)
        curve = Curve(pair.bundle.delta_scale, self.temperature, guard, llm.n_vocab(), n_rows, ends)

        def watch() -> None:
            row: Any = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            (plus,), (minus,) = pair.rows()
            curve.add(np.ctypeslib.as_array(row, (llm.n_vocab(),)), plus, minus, pair.epsilon)

        return curve, self._write(0.0, "plain teacher", UNPROTECTED, watch)

    def round(self, strength: float, guard: float) -> Measurement:
        """Protected text."""
        return self._write(strength, f"strength {strength:.3g}", Settings(strength, guard))

    def _write(
        self, strength: float, title: str, settings: Settings, watch: Callable[[], None] = lambda: None
    ) -> Measurement:
        sums, right, n_cut = [], [], 0
        total = len(self.prompts) * self._n_predict
        with tqdm(total=total, desc=title, unit="token", file=sys.stderr, leave=False) as bar:
            for i, prompt in enumerate(self.prompts):
                self.llm.reset()
                self.llm.set_seed(self._seed + i)
                text, ended = self._complete(prompt, settings, watch, bar)
                dose = self.llm.last_dose
                sums.append((dose.n_tokens, dose.kl, dose.total or 0.0))
                if self._answers is not None:
                    right.append(final_answer(text) == self._answers[i])
                n_cut += not ended
        n, kl, dose_sum = np.sum(sums, axis=0).tolist()
        known = None if self._answers is None else tuple(right)
        kl_error = ratio_error([each[1] for each in sums], [each[0] for each in sums])
        return Measurement(strength, int(n), kl / n, kl_error, dose_sum / n, known, n_cut)

    def _complete(
        self, prompt: list[int], settings: Settings, watch: Callable[[], None], bar: tqdm[Any]
    ) -> tuple[str, bool]:
        """The completion's text, and whether the model ended it."""
        tokens: list[int] = []
        with closing(self.llm.generate(prompt, temp=self.temperature, **asdict(settings))) as stream:
            for token in itertools.islice(stream, self._n_predict):
                watch()
                bar.update()
                if llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, token):
                    break
                tokens.append(token)
        text = self.llm.detokenize(tokens).decode("utf-8", errors="replace")
        return text, len(tokens) < self._n_predict


def choose_guard(curve: Curve, kl: float) -> tuple[float, list[tuple[float, Point]]]:
    """The guard with the largest dose for `kl` along the plain text, and what each that can spend it gives."""
    solved = [(guard, curve.solve(kl, guard)) for guard in GUARDS]
    table = [(guard, curve.at(strength, guard)) for guard, strength in solved if strength is not None]
    if not table:
        return GUARDS[0], []  # the least guarded spends the most
    return max(table, key=lambda row: row[1].dose)[0], table


def spend_kl(
    writer: ProtectedWriter, curve: Curve, budget: float, guard: float
) -> tuple[list[Measurement], Measurement]:
    """Writes protected text until it spends `budget` nats a token, to 5 % or for 8 rounds.

    Each next strength is where the plain text's curve, scaled to the last round, meets the budget: the text that
    protection writes spends another KL than the plain text, but bends with strength as it does.

    Raises:
        ConversionError: not even the greatest strength spends the budget.
    """
    rounds: list[Measurement] = []
    low, high = 0.0, math.inf
    strength = _round(curve.solve(budget, guard) or MOST_STRENGTH)
    for _ in range(_N_ROUNDS):
        last = writer.round(strength, guard)
        rounds.append(last)
        if abs(last.kl - budget) <= _TOLERANCE * budget:
            break
        if last.kl >= budget:
            high = strength
        elif strength < MOST_STRENGTH:
            low = strength
        else:
            _unreachable(rounds, budget, guard)
        aim = curve.at(strength, guard).kl * budget / max(last.kl, 1e-9)
        strength = _round(curve.solve(aim, guard) or MOST_STRENGTH)
        if not low < strength < high:
            strength = _round((low + high) / 2) if high < math.inf else MOST_STRENGTH
    return rounds, min(rounds, key=lambda r: abs(r.kl - budget))


def _round(strength: float) -> float:
    """To four digits, so that what is measured and stored can be typed."""
    return float(f"{strength:.4g}")


def _unreachable(rounds: Sequence[Measurement], budget: float, guard: float) -> None:
    best = max(rounds, key=lambda r: r.kl)
    remedy = f"a smaller budget, or a --guard under {guard:g}" if guard > 0 else "a smaller budget"
    raise ConversionError(
        f"a budget of {budget:g} nats a token cannot be reached at guard {guard:g}: the most was {best.kl:.4g} at "
        f"strength {best.strength:.4g}; give {remedy}"
    )


def spend_accuracy(
    writer: ProtectedWriter, plain: Measurement, budget: float, guard: float
) -> tuple[list[Measurement], Measurement]:
    """Bisects for the greatest strength whose accuracy is at most `budget` points under the plain teacher's.

    Raises:
        ConversionError: no strength that was tried keeps to the budget, or the plain teacher has nothing to lose.
    """
    if not plain.accuracy:
        raise ConversionError(
            f"the plain teacher answers none of {len(writer.prompts)} prompts right ({plain.n_cut} were cut by -n): no "
            "accuracy can drop; give easier prompts, or a larger -n"
        )
    rounds: list[Measurement] = []
    low: Measurement | None = None
    high: float | None = None
    strength = 4.0
    for _ in range(_N_ROUNDS):
        last = writer.round(strength, guard)
        rounds.append(last)
        if accuracy_drop(plain, last) <= budget + 1e-9:
            low = last
        else:
            high = strength
        if high is None and low is not None:
            if strength >= MOST_STRENGTH:
                break
            strength = min(4 * strength, MOST_STRENGTH)
        elif low is None:
            strength /= 4
        elif high is not None:
            if high <= low.strength * (1 + _TOLERANCE):
                break
            strength = _round(math.sqrt(low.strength * high))
    if low is None:
        best = min(rounds, key=lambda r: accuracy_drop(plain, r))
        raise ConversionError(
            f"an accuracy drop of {budget:g} points cannot be kept: the least was {accuracy_drop(plain, best):.3g} at "
            f"strength {best.strength:.3g}; give a larger budget, a larger --guard, or more prompts"
        )
    return rounds, low


def accuracy_drop(plain: Measurement, protected: Measurement) -> float:
    """In percentage points; negative where protected text is right more often."""
    return 100 * ((plain.accuracy or 0.0) - (protected.accuracy or 0.0))
