"""`adlocal bench`: what its figures are made of, on tiny models; no times are asserted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch

from adlocal import AntidistillationLlama
from adlocal.commands.bench import bare, many, prompts, recorder, rounds, shape
from adlocal.commands.bench import command as bench
from adlocal.commands.bench.gaps import Gaps, predicted, shares
from adlocal.commands.bench.report import describe
from adlocal.commands.bench.single import Single
from adlocal.commands.parser import make_parser
from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.sequences import Request, Sampling
from adlocal.errors import InputError
from examples.lab.models import pretrained
from support import tiny
from support.cli import Cli, only_line, refused
from support.lab_models import random_model

N = 12
PROMPT = [tiny.BOS, *b"3 + 4 ="]


def arguments(teacher: Path, bundle: Path, *argv: object) -> list[str]:
    own = ["bench", "-m", teacher, "--bundle", bundle, "-c", 256, "-n", N, "-t", 1, "--rounds", 1]
    return [str(part) for part in (*own, *argv)]


Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def measure(tiny_llama: Path, tiny_bundle: Path) -> Measure:
    def call(*argv: object, bundle: Path = tiny_bundle) -> dict[str, Any]:
        return bench.measure(make_parser().parse_args(arguments(tiny_llama, bundle, *argv))).report()

    return call


@pytest.fixture(scope="module")
def report(measure: Measure) -> dict[str, Any]:
    """At a guard that leaves the tiny teacher a choice in some rows."""
    return measure("--guard", 0.9, "--parallel", 3, 1, 3)


# What is computed


def stats(**values: int) -> dict[str, int]:
    return {"n_rows": 0, "n_choices": 0, "n_evaluated": 0, "n_pair_decodes": 0, "n_pair_tokens": 0, **values}


def test_batches_and_their_costs_predict_the_time() -> None:
    """Two batches of 1 token and one of 3, over 5 tokens: 10 + (2 · 20 + 30) / 5 ms."""
    assert predicted(0.010, {1: 2, 3: 1}, {1: 0.020, 3: 0.030}, 5) == pytest.approx(0.024)
    assert predicted(0.010, {}, {}, 5) == 0.010


def test_gaps_are_read_from_the_stats() -> None:
    """The prompt has no choice, nor has the first token; the second has, so 7 + 2 tokens are read; and so on."""
    start = stats(n_rows=4, n_choices=2, n_pair_decodes=5, n_pair_tokens=50)
    decodes = [(5, 50), (5, 50), (6, 59), (6, 59), (6, 59), (8, 64)]
    choices = [2, 2, 3, 3, 3, 4]
    after = [
        stats(n_rows=5 + i, n_choices=c, n_pair_decodes=d, n_pair_tokens=t)
        for i, (c, (d, t)) in enumerate(zip(choices, decodes, strict=True))
    ]
    gaps = Gaps.of([start, *after], n_last=4)
    assert (gaps.rows_before_choice, gaps.decodes_before_choice) == (2, 0)
    assert gaps.sizes == [9, 3, 2]
    assert gaps.counts == {2: 1, 3: 1, 9: 1}
    assert Gaps.of([start, *after], n_last=3).sizes == [3, 2]


def test_a_pair_that_is_evaluated_for_nothing_is_told() -> None:
    found = Gaps.of([stats(), stats(n_rows=1, n_pair_decodes=2), stats(n_rows=2, n_choices=1)], n_last=1)
    assert (found.rows_before_choice, found.decodes_before_choice) == (1, 2)


def test_no_choice_at_all_is_none_before_the_first() -> None:
    found = Gaps.of([stats(), stats(n_rows=1), stats(n_rows=2)], n_last=1)
    assert found == Gaps([], 2, 0)


def test_shares_are_of_rows_and_of_tokens() -> None:
    counted = stats(n_rows=8, n_choices=2, n_pair_decodes=3, n_pair_tokens=20)
    assert shares(counted, 4) == {"share_of_choices": 0.25, "passes_per_token": 0.75, "proxy_tokens_per_token": 5.0}


def test_contestants_take_turns_and_the_first_round_warms_up() -> None:
    turns: list[str] = []
    figures = iter([100.0, 1.0, 7.0, 3.0])

    def first() -> dict[str, float]:
        turns.append("first")
        return {"a": next(figures), "b": 2.0}

    def second() -> dict[str, float]:
        turns.append("second")
        return {"c": float(len(turns))}

    assert rounds.medians([first, second], 3, "test") == {"a": 3.0, "b": 2.0, "c": 6.0}
    assert turns == ["first", "second"] * 4


def test_batch_shapes_are_compared_at_plausible_tokens() -> None:
    """Only the second row has two plausible tokens: there Δ turned by 45 degrees once it is centred."""
    one = np.zeros((3, 4), np.float32)
    whole = np.array([[0.5, 9, 9, 9], [0.1, -0.3, 0.2, 9], [9, 9, 9, 9]], np.float32)
    delta = np.array([[1, 2, 3, 4], [1, 0, -1, 9], [0, 0, 0, 0]], np.float32)
    turned = np.array([[4, 3, 2, 1], [8, 6, 7, -9], [1, 1, 1, 1]], np.float32)
    plausible = [np.array([0]), np.array([0, 1, 2]), np.array([], np.intp)]
    found = shape.compare(one, whole, delta, turned, plausible)
    assert found.logits == pytest.approx(0.4)  # the median of 0.5 and 0.3
    assert [found.cosine, found.cosine_p10] == pytest.approx([0.5, 0.5])
    assert found.n_positions == 1


# What is reported


def test_ratios_are_those_of_the_figures(report: dict[str, Any]) -> None:
    single = report["single"]
    for name in ("protected", "full", "strength_0"):
        assert single[f"{name}_of_plain"] == pytest.approx(single["plain"] / single[name])
    assert single["plain_of_bare"] == pytest.approx(single["bare"] / single["plain"])
    assert single["predicted_of_plain"] == pytest.approx(single["bare"] / single["predicted"])
    assert single["of_predicted"] == pytest.approx(single["protected_of_plain"] / single["predicted_of_plain"])
    for each in report["sequences"]:
        assert each["protected_of_plain"] == pytest.approx(each["plain"] / each["protected"])
        assert each["time_of_bare_plain"] == pytest.approx(each["plain"] / each["bare_plain"])
        assert each["time_of_bare_protected"] == pytest.approx(each["protected"] / each["bare_protected"])
    assert report["native_of_numpy"] == pytest.approx(report["adjustment"] / report["adjustment_numpy"])


def test_the_pairs_batches_add_up(report: dict[str, Any]) -> None:
    """The timed run's own stats are those of the batches that the prediction is made from."""
    single = report["single"]
    assert 0 < single["share_of_choices"] < 1
    assert sum(each["n"] for each in single["batches"]) == pytest.approx(single["passes_per_token"] * N)
    in_them = sum(each["n"] * each["size"] for each in single["batches"])
    assert in_them == pytest.approx(single["proxy_tokens_per_token"] * N)
    assert single["passes_per_token"] == single["share_of_choices"]
    cost = sum(each["n"] * each["seconds"] for each in single["batches"]) / N
    assert single["predicted"] == pytest.approx(single["bare"] + cost)
    assert single["pair_decodes_before_choice"] == 0


def test_each_number_of_sequences_is_told_once(report: dict[str, Any]) -> None:
    assert [each["n_sequences"] for each in report["sequences"]] == [1, 3]
    for each in report["sequences"]:
        assert 0 < each["share_of_choices"] < 1
        assert 0 < each["passes_per_token"] <= 1
        assert each["passes_per_token"] <= each["proxy_tokens_per_token"]


def test_the_object_and_the_table_tell_all(
    report: dict[str, Any], cli: Cli, tiny_llama: Path, tiny_bundle: Path
) -> None:
    found = json.loads(json.dumps(report))
    assert set(found) == {
        *("settings", "single", "sequences", "batch_shape", "adjustment", "adjustment_numpy", "native_of_numpy"),
        "peak_bytes",
    }
    assert found["settings"]["guard"] == 0.9
    assert found["settings"]["n_prompt"] == 80
    assert found["batch_shape"]["cosine"] > 0.99, "F32"
    assert found["batch_shape"]["logits"] < 0.01
    table = describe(found)
    for words in (
        "AntidistillationLlama, strength 0",
        "of what was predicted",
        "protected/bare",
        "in one batch",
        "MiB",
    ):
        assert words in table
    done = cli(*arguments(tiny_llama, tiny_bundle, "--guard", 0.9, "--parallel"))
    assert done.status == 0
    assert "protected/bare" not in done.out
    assert "one sequence: 100%" in done.err


def test_json_is_one_object(cli: Cli, tiny_llama: Path, tiny_bundle: Path) -> None:
    done = cli(*arguments(tiny_llama, tiny_bundle, "--json", "--parallel", 2, "-p", "3 + 4 ="))
    assert done.status == 0
    assert json.loads(done.out)["settings"]["n_prompt"] == len(PROMPT)


def test_without_a_choice_plain_is_predicted(measure: Measure) -> None:
    found = measure("--guard", 1, "--parallel", 2)
    single = found["single"]
    assert single["share_of_choices"] == single["passes_per_token"] == single["proxy_tokens_per_token"] == 0
    assert single["batches"] == []
    assert single["predicted"] == single["bare"]
    assert single["predicted_of_plain"] == 1
    assert single["pair_decodes_before_choice"] == 0
    assert found["sequences"][0]["passes_per_token"] == 0
    assert "the pair was not evaluated" in describe(found)


def test_adapters_are_measured_too(measure: Measure, adapter_bundle: Path) -> None:
    found = measure("--guard", 0.9, "--parallel", 2, bundle=adapter_bundle)
    assert 0 < found["single"]["passes_per_token"] <= 1


# What is run


@pytest.fixture
def single(tiny_llama: Path, tiny_bundle: Path) -> Iterator[Callable[..., Single]]:
    kwargs: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with (
        closing(llama_cpp.Llama(str(tiny_llama), **kwargs)) as plain,
        closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **kwargs)) as llm,
    ):

        def call(guard: float, prompt: list[int] = PROMPT) -> Single:
            llm.guard = guard
            return Single(plain, llm, prompt, N)

        yield call


def test_full_evaluates_every_row(single: Callable[..., Single]) -> None:
    one = single(1.0)
    before = one._stats()
    one._protected()
    assert one._stats()["n_pair_decodes"] == before["n_pair_decodes"]
    one._full()
    after = one._stats()
    n_batches = after["n_pair_decodes"] - before["n_pair_decodes"]
    assert after["n_evaluated"] - before["n_evaluated"] == n_batches - 1 > N, "the prompt but for its last token, too"
    one._protected()
    assert one._stats()["n_pair_decodes"] == after["n_pair_decodes"], "only while it is asked for"


def test_the_clock_starts_where_the_pair_has_read_the_prompt(single: Callable[..., Single]) -> None:
    starts = (single(0.9, PROMPT[:n]) for n in range(8, 3, -1))
    one = next(one for one in starts if 0 < one.gaps.rows_before_choice < N and one.gaps.sizes)
    assert len(one.text) == len(one.prompt) + one.gaps.rows_before_choice + 1 + N
    assert sum(one.gaps.sizes) <= N, "the prompt is not among them"
    assert len(single(1.0).text) == len(PROMPT) + 2 * N, "where there is no choice it does not wait longer"


def test_a_batch_of_every_size_is_timed(single: Callable[..., Single], monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as it says in both proxies, whatever the memories hold."""
    one = single(0.9)
    assert max(one.gaps.sizes) > 1
    decoded: list[tuple[Any, int]] = []
    decode = bare.decode

    def spied(context: Any, batch: Any) -> None:
        decoded.append((context, batch.n_tokens))
        decode(context, batch)

    for _ in range(2):
        decoded.clear()
        monkeypatch.setattr(bare, "decode", spied)
        assert set(one._batches()) == {f"batch of {size}" for size in one.gaps.sizes}
        monkeypatch.undo()
        for size in one.gaps.sizes:
            assert {(context, size) for context in one.llm.pair.contexts} < set(decoded)
        one._protected()


def test_a_memory_is_rewound_or_filled(single: Callable[..., Single]) -> None:
    one = single(0.9)
    context = one.plain.ctx
    memory = llama_cpp.llama_get_memory(context)
    bare.clear(context)
    for n in (5, 3, 8, 0, 2):
        bare.rewind(context, one.text, n)
        assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == n - 1


def test_the_shape_is_that_of_one_token_and_of_all(tiny_llama: Path, tiny_bundle: Path) -> None:
    watch = recorder.Recorder()
    kwargs: dict[str, Any] = {"n_ctx": 8, "n_batch": 8, "logits_all": True, "n_threads": 1, "verbose": False}
    with watch.installed():
        llm = AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **kwargs)
    with closing(llm):
        issued = watch.record(lambda: shape.measure(llm, PROMPT))
        for context in llm.pair.contexts:
            sizes = [each.batch.n_tokens for each in issued if each.context == context]
            assert sizes == [1] * len(PROMPT) + [len(PROMPT)]


@pytest.fixture
def recorded(tiny_llama: Path, tiny_bundle: Path) -> Iterator[tuple[ParallelLlama, recorder.Recorder, list[Request]]]:
    watch = recorder.Recorder()
    kwargs: dict[str, Any] = {"n_ctx": 64, "n_parallel": 3, "n_threads": 1, "bundle": tiny_bundle, "guard": 0.9}
    with watch.installed():
        llm = ParallelLlama(tiny_llama, **kwargs)
    with closing(llm):
        yield llm, watch, many.requests(PROMPT, 3, N)


def test_what_is_issued_is_recorded(recorded: Any) -> None:
    llm, watch, asked = recorded
    decodes = many.record(watch, llm, asked)
    counted = llm.stats()
    of_teacher, plus, minus = ([each.batch for role, each in decodes if role == i] for i in range(3))
    assert len(of_teacher) == 1 + N, "the last token of a prompt is decoded by itself"
    assert sum(batch.n_tokens for batch in of_teacher) == sum(len(each.tokens) for each in asked) + 3 * (N - 1)
    for batches in (plus, minus):
        assert len(batches) == counted["n_pair_decodes"]
        assert sum(batch.n_tokens for batch in batches) == counted["n_pair_tokens"]
        assert sum(sum(batch.logits[: batch.n_tokens]) for batch in batches) == counted["n_evaluated"]


def test_a_replay_decodes_the_same_and_leaves_nothing(recorded: Any) -> None:
    llm, watch, asked = recorded
    decodes, contexts = many.record(watch, llm, asked), many._contexts(llm)
    again = watch.record(lambda: many.replay([(role, each) for role, each in decodes if role], contexts))
    assert again == [], "bare: not through the core"
    assert many.replay(decodes, contexts) > 0
    memories = [llama_cpp.llama_get_memory(context) for context in contexts]
    assert [llama_cpp.llama_memory_seq_pos_max(memory, 0) for memory in memories] == [-1, -1, -1]
    before = llm.stats()
    assert len(many.record(watch, llm, asked)) == len(decodes), "as if nothing had been"
    assert llm.stats()["n_rows"] == before["n_rows"] + 3 * N


def test_an_interrupt_is_not_lost_in_a_callback(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, watch, asked = recorded

    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp, "llama_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        many.record(watch, llm, asked)


def test_no_sequence_begins_with_anothers_prompt() -> None:
    asked = many.requests(PROMPT, 4, N)
    assert [len(each.tokens) for each in asked] == [8, 7, 6, 5]


def test_ends_are_not_sampled(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():  # every other token has a logit of 0: the end is on top in half of the rows
        row = model.lm_head.weight[tiny.EOS].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[tiny.EOS] = row
    path = tiny.write_gguf(model, tmp_path / "ends.gguf")
    with closing(ParallelLlama(path, n_ctx=64, n_parallel=8, n_threads=1)) as llm:
        asked = [Request(i, [tiny.BOS, 40 + i], N) for i in range(8)]
        greedy = [len(done.tokens) for done in llm.generate(asked, Sampling())]
        assert min(greedy) < N
        endless = list(llm.generate(asked, many.Endless.of(llm.model.vocab)))
    assert [len(done.tokens) for done in endless] == [N] * 8


# What it goes on from


def test_a_vocabulary_of_words_goes_on_from_the_models_own(tmp_path: Path) -> None:
    """llama.cpp ends the process where it is asked to spell another word."""
    pretrained.save(random_model("bench"), tmp_path)
    with closing(llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, verbose=False)) as llm:
        found = prompts.prompt(llm, None)
        assert (found[0], len(found)) == (llm.token_bos(), 25)
        assert found == prompts.prompt(llm, None)
        with pytest.raises(InputError, match="--prompt: the teacher's vocabulary has no bytes"):
            prompts.prompt(llm, "Once upon a time")


# Refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-c", "32"], ["32 tokens of context", "bench needs 93", "-n", "--prompt"]),
        (["-n", "500"], ["256 tokens of context", "bench needs 581"]),
        (["-c", "4096", "-n", "500"], ["256 tokens of context", "what the models were trained for"]),
        (["-p", "1 + 2", "--parallel", "8"], ["--prompt has 6 tokens", "--parallel 8"]),
        (["-p", "\udcff"], ["--prompt is not valid UTF-8"]),
        (["--strength", "0"], ["--strength 0 is the plain teacher"]),
        (["--strength", "-2"], ["strength=-2.0"]),
        (["--guard", "3"], ["guard=3.0"]),
    ],
)
def test_wrong_options_are_refused(
    argv: list[str], words: list[str], cli: Cli, tiny_llama: Path, tiny_bundle: Path
) -> None:
    done = cli(*arguments(tiny_llama, tiny_bundle, *argv))
    refused(done, "bench", *words)
    only_line(done)


@pytest.mark.parametrize("argv", [["--parallel", "0"], ["--parallel", "two"], ["--rounds", "0"], ["-n", "0"]])
def test_counts_are_counts(argv: list[str], cli: Cli, tiny_llama: Path, tiny_bundle: Path) -> None:
    done = cli(*arguments(tiny_llama, tiny_bundle, *argv))
    assert done.status == 2
    assert "give a whole number from 1 up" in done.message()


def test_ctrl_c_ends_it_in_one_line(tiny_llama: Path, tiny_bundle: Path) -> None:
    argv = arguments(tiny_llama, tiny_bundle, "--rounds", 100_000, "--parallel")
    process = subprocess.Popen(
        [sys.executable, "-m", "adlocal", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    assert process.stderr is not None
    seen, deadline = "", time.monotonic() + 60
    while "turn/s" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.rstrip("\n").splitlines()[-1] == "adlocal bench: interrupted; nothing half-written is left"
    assert "Traceback" not in err
