"""Calibration on tiny models: what the budget buys is measured again from plain llama.cpp, a second pair and numpy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest

from adlocal import AntidistillationLlama, Calibration, ConversionError, Dose, InputError, ProxyPair, adjust
from adlocal.bundle.calibration import CALIBRATION_NAME, teacher_identity
from adlocal.calibrate import search
from adlocal.calibrate.curve import Curve
from adlocal.cli import main
from adlocal.commands.calibrate import Budget, calibrate
from adlocal.llamacpp.gguf import GGUFHeader, write_metadata
from adlocal.traces import final_answer, join_answers, read_prompts
from support import tiny
from support.reference import Reference, Samples, log_softmax, sampling

KL = 0.1
N_PREDICT = 40
CopyBundle = Callable[[str], Path]
KWARGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions with answers that no random model knows."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"question": f"{i} + {i + 3} =", "answer": f"sum\n#### {2 * i + 1003}"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(teacher: Path, bundle: Path, prompts: Path) -> list[str]:
    files = ["-m", str(teacher), "--bundle", str(bundle), "--prompts", str(prompts)]
    return ["calibrate", *files, "-n", str(N_PREDICT), "-c", "256", "-t", "1"]


@pytest.fixture(scope="session")
def calibrated(
    tiny_llama: Path, tiny_bundle: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A calibrated copy of the tiny bundle, and what the command printed as JSON."""
    bundle = tmp_path_factory.mktemp("calibrated") / "bundle"
    bundle.mkdir()
    for path in tiny_bundle.iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    argv = [*arguments(tiny_llama, bundle, prompts), "--kl", str(KL), "--json"]
    done = subprocess.run([sys.executable, "-m", "adlocal", *argv], capture_output=True, text=True, check=True)
    return bundle, json.loads(done.stdout)


@pytest.fixture
def llm(tiny_llama: Path, tiny_bundle: Path) -> Iterator[AntidistillationLlama]:
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=0.5, full=True, **KWARGS)) as llm:
        yield llm


def writer(llm: AntidistillationLlama, prompts: Path, temperature: float = 0.8) -> search.ProtectedWriter:
    return search.ProtectedWriter(llm, read_prompts(prompts), n_predict=N_PREDICT, temperature=temperature)


# The budget


def test_protected_text_spends_the_budget_measured_independently(
    calibrated: tuple[Path, dict[str, Any]], tiny_llama: Path, prompts: Path
) -> None:
    """KL at temperature 1 from two full softmaxes in float64, on fresh text at the settings that were stored."""
    bundle, printed = calibrated
    kls: list[float] = []
    with (
        closing(AntidistillationLlama(str(tiny_llama), bundle=bundle, **KWARGS)) as protected,
        closing(llama_cpp.Llama(str(tiny_llama), logits_all=True, **KWARGS)) as plain,
        ProxyPair.open(bundle, n_ctx=256, n_threads=1) as pair,
    ):
        reference = Reference(plain, pair)
        for i, line in enumerate(prompts.read_text().splitlines()):
            question = json.loads(line)["question"]
            protected.reset()
            before = protected.tokenize(f"<s>user\n{question}</s>\n<s>assistant\n".encode(), False, True)
            protected.set_seed(i)
            text = [token for token, _ in zip(protected.generate(before, temp=0.8), range(N_PREDICT), strict=False)]
            tokens = before + text[: text.index(tiny.EOS) + 1 if tiny.EOS in text else None]
            rows = slice(len(before) - 1, len(tokens) - 1)
            log_q = log_softmax(reference.adjusted(tokens, printed["strength"], printed["guard"])[rows])
            log_p = log_softmax(reference.plain(tokens)[rows])
            kls += np.sum(np.exp(log_q) * (log_q - log_p), axis=-1).tolist()
    assert len(kls) == printed["n_tokens"]
    # Batches of other sizes sum in another order: 1e-3 of a KL. The search itself stops at 5 % of the budget.
    assert np.mean(kls) == pytest.approx(printed["reached"], rel=1e-3)
    assert printed["reached"] == pytest.approx(KL, rel=0.05)


def test_the_table_only_rises(calibrated: tuple[Path, dict[str, Any]]) -> None:
    _, printed = calibrated
    assert printed["curve_strength"][0] == 0
    assert printed["curve_kl"][0] == pytest.approx(0, abs=1e-12)
    for name in ("curve_strength", "curve_kl", "curve_dose", "measured_strength", "measured_kl", "measured_dose"):
        assert np.all(np.diff(printed[name]) > 0), name
    assert printed["strength"] in printed["measured_strength"]
    best = max(printed["guards"], key=lambda row: row["dose"])
    assert printed["guard"] == best["guard"]


@pytest.mark.parametrize("guard", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("ends", [[], [3, 30, 49]])
@pytest.mark.parametrize("strength", [0.0, 0.3, 3.0, 60.0])
def test_the_curve_is_the_oracles(strength: float, ends: list[int], guard: float) -> None:
    """Against adjust.py row by row. The oracle shifts in float32: 1e-4 of a KL at most."""
    rng = np.random.default_rng(3)
    z, plus, minus = 2 * rng.normal(size=(3, 60, 50)).astype(np.float32)
    z[:30] /= 4  # at 0.3 some ends would take over
    z[:30, 3] = z[:30].max(axis=1) - 0.01
    z[40, :3], z[40, 3:] = 12, 0  # an end alone is plausible, or two of its like beside it
    z[41, 30], z[42, 30], z[42, 1] = 30, 30, 29
    ids = np.array(ends, dtype=np.intp)
    curve = Curve(0.7, 1.0, guard, n_vocab=50, n_rows=60, ends=ids)
    kls, doses = [], []
    for teacher, p, m in zip(z, plus, minus, strict=True):
        curve.add(teacher, p, m, 0.5)
        delta = adjust.delta(p, m, 0.5)
        adjusted = adjust.adjust(teacher, delta, lam=strength / 0.7, guard=guard, ends=ids)
        kls.append(adjusted.kl)
        q = np.exp(log_softmax(adjusted.logits))
        q[teacher < teacher.max() + np.log(min(guard, 1e-3) or 1e-300)] = 0  # tokens that no sampler takes
        doses.append(q @ delta / q.sum() - adjust.expectation(p, m, delta))
    point = curve.at(strength, guard)
    assert point.kl == pytest.approx(np.mean(kls), rel=1e-4, abs=1e-6)
    assert point.dose == pytest.approx(np.mean(doses), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_curve_leads_a_candidate_above_an_end_as_the_oracle_does(temperature: float) -> None:
    """Two rows that a strength of 1 evens out, of which one has an end that would take over; KL and dose to 1e-6."""
    z = np.array([[0.0, *[-2.0] * 11, end] for end in (-0.3, -4.0)], np.float32)
    plus, minus = np.array([-2.0, 0.01, *[0.0] * 11], np.float32), np.zeros(13, np.float32)
    curve, ends = Curve(1.0, temperature, 0.05, n_vocab=13, n_rows=2, ends=np.array([12])), np.array([12])
    kls, doses = [], []
    for row in z:
        curve.add(row, plus, minus, 0.5)
        adjusted = adjust.adjust(row, plus, lam=1.0, guard=0.05, ends=ends)
        kls.append(adjusted.kl)
        q = np.exp(log_softmax(adjusted.logits / temperature))
        doses.append(q @ plus - adjust.expectation(plus, minus, plus))
    assert adjusted.logits.argmax() == 1
    point = curve.at(1.0, 0.05)
    assert point.kl == pytest.approx(np.mean(kls), abs=1e-6)
    assert point.dose == pytest.approx(np.mean(doses), abs=1e-6)


def test_the_greedy_curve_takes_the_best_candidate() -> None:
    z = np.array([2.0, 1.9, -9.0], np.float32)
    plus, minus = np.array([0.0, 1.0, 5.0], np.float32), np.zeros(3, np.float32)
    curve = Curve(1.0, 0.0, 0.05, n_vocab=3, n_rows=1)
    curve.add(z, plus, minus, epsilon=0.5)
    expected = adjust.expectation(plus, minus, plus - minus)
    assert curve.at(0.05, 0.05).dose == pytest.approx(0 - expected)  # Δ's lead of 1 lifts the second by 0.05
    assert curve.at(0.15, 0.05).dose == pytest.approx(1 - expected)


def test_the_curve_solves_for_a_budget() -> None:
    rng = np.random.default_rng(4)
    curve = Curve(1.0, 0.8, 0.02, n_vocab=50, n_rows=10)
    for row in 2 * rng.normal(size=(10, 3, 50)).astype(np.float32):
        curve.add(row[0], row[1], row[2], 0.5)
    strength = curve.solve(0.3, 0.05)
    assert strength is not None
    assert curve.at(strength, 0.05).kl == pytest.approx(0.3, rel=1e-5)
    assert curve.solve(100.0, 0.05) is None


class FakeWriter:
    """Text whose KL or accuracy is a function of strength."""

    def __init__(self, kl: Callable[[float], float], accuracy: Callable[[float], float]) -> None:
        self.prompts = [[0]] * 20
        self._kl, self._accuracy = kl, accuracy

    def _right(self, strength: float) -> tuple[bool, ...]:
        n = round(self._accuracy(strength) * len(self.prompts))
        return tuple(i < n for i in range(len(self.prompts)))

    def round(self, strength: float, guard: float) -> search.Measurement:
        return search.Measurement(strength, 100, self._kl(strength), 0.0, 1.0, self._right(strength), 0)

    def plain(self, guard: float) -> tuple[Curve, search.Measurement]:
        return a_curve(), self.round(0.0, guard)


def a_curve() -> Curve:
    curve = Curve(1.0, 1.0, 0.05, n_vocab=2, n_rows=1)
    curve.add(np.zeros(2, np.float32), np.array([1, 0], np.float32), np.zeros(2, np.float32), 0.5)
    return curve


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_the_search_corrects_what_the_curve_foretells(factor: float) -> None:
    curve = a_curve()
    writer: Any = FakeWriter(lambda s: factor * curve.at(s, 0.05).kl, lambda s: 1.0)
    rounds, chosen = search.spend_kl(writer, curve, 0.1, 0.05)
    assert chosen.kl == pytest.approx(0.1, rel=0.05)
    assert len(rounds) <= 3


def test_a_text_that_jumps_over_the_budget_gives_the_nearest_round() -> None:
    writer: Any = FakeWriter(lambda s: 0.04 if s < 0.77 else 0.12, lambda s: 1.0)
    rounds, chosen = search.spend_kl(writer, a_curve(), 0.1, 0.05)
    assert len(rounds) == 8
    assert chosen.kl == 0.12


def test_the_greatest_strength_that_keeps_the_accuracy_is_found() -> None:
    writer: Any = FakeWriter(lambda s: s, lambda s: 0.9 if s < 3 else 0.8 if s < 7 else 0.3)
    plain = writer.round(0.0, 0.05)
    _, chosen = search.spend_accuracy(writer, plain, 10.0, 0.05)
    assert 6 < chosen.strength < 7
    with pytest.raises(ConversionError, match=r"none of 20 prompts right"):
        search.spend_accuracy(writer, dataclasses.replace(plain, right=(False,) * 20), 10.0, 0.05)
    broken: Any = FakeWriter(lambda s: s, lambda s: 0.5)
    with pytest.raises(ConversionError, match=r"cannot be kept: the least was 40 at strength 4"):
        search.spend_accuracy(broken, plain, 10.0, 0.05)


def test_the_error_of_a_drop_is_that_of_pairs(tiny_llama: Path) -> None:
    """18 and 16 of 20 prompts right, the 16 among the 18: two differences of one, and not 11.2 points."""
    writer: Any = FakeWriter(lambda s: s, lambda s: 0.9 if s < 3 else 0.8 if s < 7 else 0.3)
    writer.temperature = 0.0
    writer.llm = SimpleNamespace(pair=SimpleNamespace(bundle=SimpleNamespace(id="0" * 64)))
    found, _ = calibrate(writer, Budget(search.ACCURACY_DROP, 10.0), 0.05, str(tiny_llama), "0" * 64)
    assert found.reached == pytest.approx(10.0)
    assert found.standard_error == pytest.approx(100 * math.sqrt((2 * 0.9**2 + 18 * 0.1**2) / 19 / 20))


def test_accuracy_is_that_of_the_final_number(
    llm: AntidistillationLlama, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["so 1003", "1,005.", "#### 1007", "1009 or 5", "nothing", "1013.0"])
    monkeypatch.setattr(search.ProtectedWriter, "_complete", lambda *_: (next(texts), True))
    llm.last_dose = Dose(0.5, 0.05, n_tokens=1)
    assert writer(llm, prompts).round(0.5, 0.05).accuracy == pytest.approx(4 / 6)


def test_the_plain_round_is_the_plain_teachers_text(
    llm: AntidistillationLlama, tiny_llama: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token what plain llama.cpp samples, with the pair evaluated and nothing shifted.

    The last token of a prompt is evaluated by itself, as it is in the rounds that are measured against this one.
    """
    own = writer(llm, prompts)
    with sampling(monkeypatch, llm) as watched:
        _, plain = own.plain(0.05)
    with (
        closing(llama_cpp.Llama(str(tiny_llama), **KWARGS)) as teacher,
        sampling(monkeypatch, teacher) as unprotected,
    ):
        for seed, prompt in enumerate(own.prompts):
            teacher.reset()
            teacher.set_seed(seed)
            teacher.eval(prompt[:-1])
            stream = teacher.generate(prompt[-1:], temp=own.temperature, reset=False)
            list(itertools.takewhile(lambda token: token != tiny.EOS, itertools.islice(stream, N_PREDICT)))
    assert_same(watched, unprotected)
    assert plain.kl == 0
    assert plain.dose != 0


def assert_same(a: Samples, b: Samples) -> None:
    assert a.tokens == b.tokens
    assert np.array_equal(a.rows, b.rows)


def test_an_unreachable_budget_tells_the_best_and_writes_nothing(
    tiny_llama: Path, copy_bundle: CopyBundle, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy_bundle("unreachable")
    before = sorted(bundle.iterdir())
    assert main([*arguments(tiny_llama, bundle, prompts), "--kl", "50", "-n", "8"]) == 1
    message = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert "adlocal calibrate: a budget of 50 nats a token cannot be reached at guard 0.02: the most was" in message
    assert message.endswith("at strength 64; give a smaller budget, or a --guard under 0.02")
    assert sorted(bundle.iterdir()) == before


# The file


def test_what_is_written_is_read_back(calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    bundle, printed = calibrated
    guards = printed.pop("guards")
    stored = Calibration.open(bundle)
    printed["guards"] = guards
    assert stored is not None
    assert dataclasses.asdict(stored) == {key: value for key, value in printed.items() if key != "guards"}
    assert os.stat(bundle / CALIBRATION_NAME).st_mode & 0o777 == 0o600
    moved = tmp_path / "moved"
    moved.symlink_to(bundle, target_is_directory=True)
    assert Calibration.open(moved) == stored
    assert GGUFHeader(bundle / CALIBRATION_NAME).type_of("adlocal.calibration.strength") == "FLOAT64"


def test_every_type_of_key_is_stored_to_the_bit(tmp_path: Path) -> None:
    values: list[tuple[str, Any, str]] = [
        ("a", 2**32 - 1, "UINT32"),
        ("b", 0.1 + 0.2, "FLOAT64"),
        ("c", True, "BOOL"),
        ("d", "Δ ☃", "STRING"),
        ("e", [1e-300, -0.0, 0.1], "FLOAT64"),
        ("f", ["x", "", "ü"], "STRING"),
        ("g", [], "FLOAT64"),
        ("h", -1, "INT32"),
    ]
    write_metadata(tmp_path / "m.gguf", values)
    header = GGUFHeader(tmp_path / "m.gguf")
    for key, value, kind in values:
        assert header.get(key) == value
        assert header.type_of(key) == (f"ARRAY of {kind}" if isinstance(value, list) else kind)
    with pytest.raises(OSError, match="cannot be written"):
        write_metadata(tmp_path / "nowhere" / "m.gguf", values)


def a_calibration(calibrated: tuple[Path, dict[str, Any]], **changes: Any) -> Calibration:
    stored = Calibration.open(calibrated[0])
    assert stored is not None
    return dataclasses.replace(stored, **changes)


def test_another_bundles_calibration_is_refused(
    calibrated: tuple[Path, dict[str, Any]],
    copy_bundle: CopyBundle,
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = copy_bundle("other")
    a_calibration(calibrated, bundle_id="another").write(bundle)
    argv = ["-m", str(tiny_llama), "--bundle", str(bundle), "-c", "256", "-t", "1", "-n", "4", "-p", "1"]
    assert main(["generate", *argv]) == 2
    assert f"{CALIBRATION_NAME} is of bundle another" in capsys.readouterr().err
    assert main(["generate", *argv, "--strength", "1", "--guard", "0.1"]) == 0  # asks for nothing from it
    assert main(["inspect", str(bundle)]) == 2


@pytest.mark.parametrize("broken", ["noise", "half"])
def test_a_damaged_calibration_is_refused(
    broken: str, calibrated: tuple[Path, dict[str, Any]], copy_bundle: CopyBundle
) -> None:
    bundle = copy_bundle(broken)
    whole = (calibrated[0] / CALIBRATION_NAME).read_bytes()
    (bundle / CALIBRATION_NAME).write_bytes(b"noise" if broken == "noise" else whole[: len(whole) // 2])
    with pytest.raises(InputError, match="calibration unusable"):
        Calibration.open(bundle)
    write_metadata(bundle / CALIBRATION_NAME, [("adlocal.calibration.version", 1, "UINT32")])
    with pytest.raises(InputError, match="calibrate again"):
        Calibration.open(bundle)


@pytest.mark.parametrize("failure", ["write", "lost", "rename"])
def test_a_failure_in_the_middle_leaves_the_old_one(
    failure: str, calibrated: tuple[Path, dict[str, Any]], copy_bundle: CopyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp cannot write, a block is lost on a full disk, or the rename fails."""
    bundle = copy_bundle("atomic")
    old = a_calibration(calibrated, strength=3.0)
    old.write(bundle)
    files = sorted(bundle.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def lose(path: Path, values: Any) -> None:
        write_metadata(path, values)
        path.write_bytes(path.read_bytes()[:-64])

    target = {"write": "adlocal.bundle.calibration.write_metadata", "lost": "adlocal.bundle.calibration.write_metadata"}
    monkeypatch.setattr(target.get(failure, "os.replace"), lose if failure == "lost" else fail)
    with pytest.raises(ConversionError, match="nothing was changed"):
        a_calibration(calibrated, strength=4.0).write(bundle)
    assert Calibration.open(bundle) == old
    assert sorted(bundle.iterdir()) == files


# What it is used for


@pytest.mark.parametrize(
    ("strength", "guard", "used"),
    [
        (None, None, (2.5, 0.125)),
        ("calibrated", None, (2.5, 0.125)),
        ("calibrated", 0.3, (2.5, 0.3)),
        (0.0, None, (0.0, 0.125)),
        (1.5, 0.0, (1.5, 0.0)),
    ],
)
def test_the_calibration_is_the_default(
    strength: Any,
    guard: float | None,
    used: tuple[float, float],
    calibrated: tuple[Path, dict[str, Any]],
    copy_bundle: CopyBundle,
    tiny_llama: Path,
) -> None:
    bundle = copy_bundle("default")
    a_calibration(calibrated, strength=2.5, guard=0.125).write(bundle)
    with closing(
        AntidistillationLlama(str(tiny_llama), bundle=bundle, strength=strength, guard=guard, **KWARGS)
    ) as llm:
        assert (llm.strength, llm.guard) == used
        llm.create_completion("1 +", max_tokens=2)
        assert (llm.last_dose.strength, llm.last_dose.guard) == used
        data = pickle.dumps(llm)
    (bundle / CALIBRATION_NAME).unlink()
    with closing(pickle.loads(data)) as copy:  # of the settings, wherever they came from
        assert (copy.strength, copy.guard) == used


def test_without_a_calibration_the_defaults_are_as_ever(tiny_llama: Path, tiny_bundle: Path) -> None:
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **KWARGS)) as llm:
        assert (llm.strength, llm.guard) == (1.0, 0.05)
    with pytest.raises(InputError, match=r"has no calibration; run `adlocal calibrate -m TEACHER.gguf --bundle"):
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength="calibrated", **KWARGS)
    with pytest.raises(InputError, match="strength='strong'"):
        AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength="strong", **KWARGS)


def test_the_commands_use_it(
    calibrated: tuple[Path, dict[str, Any]], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, printed = calibrated
    argv = ["-m", str(tiny_llama), "--bundle", str(bundle), "-c", "256", "-t", "1", "-n", "4", "-p", "1", "--json"]
    for more, strength in (
        ([], printed["strength"]),
        (["--strength", "calibrated"], printed["strength"]),
        (["--strength", "2"], 2.0),
    ):
        assert main(["generate", *argv, *more]) == 0
        assert json.loads(capsys.readouterr().out)["strength"] == strength
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["strength"] == printed["strength"]
    assert main(["inspect", str(bundle)]) == 0
    assert f"strength {printed['strength']:.4g}, guard" in capsys.readouterr().out


def test_another_teachers_calibration_is_refused(
    calibrated: tuple[Path, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    other = tiny.write_gguf(tiny.tiny_model("llama", seed=1), tmp_path / "other.gguf", tiny.CHAT_TEMPLATE)
    assert teacher_identity(other) != teacher_identity(tiny_llama)
    with pytest.raises(InputError, match=r"calibrated for another teacher than .*; give strength and guard"):
        AntidistillationLlama(str(other), bundle=calibrated[0], **KWARGS)
    AntidistillationLlama(str(other), bundle=calibrated[0], strength=1.0, guard=0.05, **KWARGS).close()


# Prompts and answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 42.", "42"),
        ("That makes $1,234,567.50.", "1234567.50"),
        ("3 apples, or 1,2,3", "3"),
        ("x = -5", "-5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("10-5", "5"),
        ("48/2 = 24 clips\n#### 72", "72"),
        ("#### 1 and then\n#### -3 degrees", "-3"),
        (r"\boxed{7}", "7"),
        ("half of it, 50%", "50"),
        ("= .5", "0.5"),
        ("5.00", "5"),
        ("none", None),
        ("", None),
        ("7 in all\n#### none", None),
    ],
)
def test_the_final_answer_is_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == (None if answer is None else Decimal(answer))


def lines_of(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_answers_are_matched_by_line_or_id(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2"}]
    path = lines_of(tmp_path / "p.jsonl", {"prompt": "1+1", "id": 7}, "", {"prompt": messages, "id": "b"})
    prompts = read_prompts(path)
    assert [p.prompt for p in prompts] == ["1+1", tuple(messages)]
    for rows in ([{"answer": 2}, {"answer": "4"}], [{"id": "b", "answer": "4"}, {"id": 7, "answer": "2"}]):
        joined = join_answers(prompts, lines_of(tmp_path / "a.jsonl", *rows))
        assert [p.answer for p in joined] == ["2", "4"]
    for bad, words in (([{"answer": 2}], "1 answers for 2 prompts"), ([{"id": 7, "answer": 2}], "id b has no answer")):
        with pytest.raises(InputError, match=words):
            join_answers(prompts, lines_of(tmp_path / "a.jsonl", *bad))


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ([], ["--kl", "1"], "no prompts; give lines like"),
        (["{"], ["--kl", "1"], "p.jsonl:1: broken JSON"),
        (["3"], ["--kl", "1"], "expected a JSON object, found int"),
        (
            [{"text": "a"}],
            ["--kl", "1"],
            "p.jsonl:1: has ['text'], expected \"prompt\", a string or a list",
        ),
        ([{"prompt": " "}], ["--kl", "1"], "the prompt is empty; remove the line"),
        ([{"prompt": [{"role": "user"}]}], ["--kl", "1"], 'a message needs "role" and "content"'),
        ([{"prompt": "a", "answer": "none"}], ["--kl", "1"], "the answer 'none' holds no number"),
        ([{"prompt": "a"}], ["--accuracy-drop", "5"], 'p.jsonl:1: --accuracy-drop needs an "answer" in each line'),
        ([{"prompt": "a"}], ["--kl", "0"], "--kl 0: give a positive number of nats a token, for example 0.1"),
        ([{"prompt": "a"}], ["--kl", "nan"], "--kl nan: give a positive number"),
        ([{"prompt": "a"}], ["--accuracy-drop", "100"], "--accuracy-drop 100: give a positive number of points"),
        ([{"prompt": "a"}], ["--kl", "1", "--guard", "2"], "guard=2.0: give a share"),
        ([{"prompt": "a" * 300}], ["--kl", "1"], "tokens and 40 to generate exceed --ctx-size 256"),
        ([{"prompt": "a"}], ["--kl", "1", "--accuracy-drop", "5"], "not allowed with argument"),
        ([{"prompt": "a"}], [], "one of the arguments --kl --accuracy-drop is required"),
        ([{"prompt": "a"}], ["--kl", "1", "--strength", "1"], "unrecognized arguments"),
    ],
)
def test_unusable_input_is_refused(
    rows: list[object],
    more: list[str],
    words: str,
    tiny_llama: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tiny_bundle.iterdir())
    argv = [*arguments(tiny_llama, tiny_bundle, lines_of(tmp_path / "p.jsonl", *rows)), *more]
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert words in captured.err.splitlines()[-1]
    assert sorted(tiny_bundle.iterdir()) == before


# The plot


def test_without_matplotlib_the_remedy_is_told_before_anything_is_measured(
    tiny_llama: Path,
    tiny_bundle: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*arguments(tiny_llama, tiny_bundle, prompts), "--kl", "1", "--plot", "plot.png"]) == 1
    assert capsys.readouterr().err == (
        "adlocal calibrate: --plot needs matplotlib, which is not installed; run: pip install 'adlocal[plot]'\n"
    )


def test_the_plot_shows_every_round(
    calibrated: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from adlocal.calibrate import plot as calibration_plot

    figures: list[Any] = []
    save = figure_module.Figure.savefig

    def spy(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", spy)
    calibration_plot.check(tmp_path / "plot.png")
    calibration_plot.draw(a_calibration(calibrated), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    printed = calibrated[1]
    shown = {tuple(np.asarray(line.get_ydata(), float)) for ax in figures[0].axes for line in ax.lines}
    for name in ("curve_kl", "curve_dose", "measured_kl", "measured_dose"):
        assert any(tuple(printed[name][: len(line)]) == line and len(line) > 1 for line in shown), name
    assert all(ax.get_xlabel() == "strength, nats" and ax.get_ylabel() for ax in figures[0].axes)
    for bad, words in (
        (tmp_path / "plot.gif", "ends in .png"),
        (tmp_path / "no" / "plot.png", "there is no directory .*no; make it"),
    ):
        with pytest.raises(InputError, match=words):
            calibration_plot.check(bad)
