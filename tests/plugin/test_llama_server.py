"""llama-server itself under `adlocal run`: that of llama-cpp-python's own llama.cpp, which `make test-server` builds.

The oracle is the drop-in on a tiny model in F32, where one build and another, one batch and another round alike to the
token; at strength 0 it is the plain server.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_grammar import LlamaGrammar

from adlocal import AntidistillationLlama, Settings
from adlocal.bundle import ADAPTER_NAME
from adlocal.plugin import Control, Think, control_directory
from adlocal.plugin.build import declared
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from adlocal_convert.source.export import export_directory
from llama_server import server, source
from support import families, tiny
from support.barrage import control_of
from support.client import Refused
from support.llama_server import N_CTX, Server
from support.paths import ROOT
from support.recurrent import write_mamba

STRENGTH, N = 3.0, 16
LORA_SCALE = 20.0
LETTERS = "root ::= [a-z ]+"
#: After these the best token is ahead of the next by more than what batches and caches round.
PROMPTS = [
    [tiny.BOS, *text]
    for text in (
        b"tick tock tick tock tick tock",
        b"Why is the sky blue?",
        b"x",
        b"7",
        b"yes and yes and yes and",
        b"Once upon a time",
        b"1 2 3 1 2 3 1 2 3",
        b"12 apples and 7 pears",
    )
]
#: Starts a server, protected at STRENGTH unless options say otherwise, that ends with the test.
Start = Callable[..., Server]

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
    pytest.mark.skipif(not server().exists(), reason="needs llama-server; run `make test-server`"),
]


@pytest.fixture(scope="module")
def drop_in(tiny_llama: Path, tiny_bundle: Path) -> Iterator[AntidistillationLlama]:
    """What the server is compared with."""
    kwargs: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=STRENGTH, **kwargs)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(drop_in: AntidistillationLlama) -> dict[float, list[list[int]]]:
    """What the drop-in says to each prompt, by strength."""
    said = {
        strength: [generated(drop_in, prompt, strength=strength) for prompt in PROMPTS] for strength in (0.0, STRENGTH)
    }
    assert all(plain != steered for plain, steered in zip(said[0.0], said[STRENGTH], strict=True))
    assert not any(tiny.EOS in tokens for each in said.values() for tokens in each), "the server would stop there"
    return said


def generated(llm: AntidistillationLlama, prompt: list[int], n: int = N, **parameters: Any) -> list[int]:
    """What it says greedily."""
    return ended(itertools.islice(llm.generate(prompt, temp=0.0, **parameters), n))


def ended(tokens: Iterable[int]) -> list[int]:
    """Up to the end of generation, and that too, as llama-server reports them."""
    found = []
    for token in tokens:
        found.append(token)
        if token == tiny.EOS:
            break
    return found


@pytest.fixture
def start(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers."""
    with ExitStack() as stack:
        logs = itertools.count()

        def call(
            *arguments: object, model: Path | None = tiny_llama, options: Any = ("--strength", STRENGTH), **kwargs: Any
        ) -> Server:
            kwargs = {"bundle": tiny_bundle, "log": tmp_path / f"server-{next(logs)}.log", **kwargs}
            own = ["-m", model] if model else []
            return stack.enter_context(Server([*own, *arguments], options=options, **kwargs))

        yield call


@pytest.fixture(scope="module")
def one(tiny_llama: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of one slot at STRENGTH, which requests of all kinds are sent to."""
    log = tmp_path_factory.mktemp("one") / "server.log"
    with Server(["-m", tiny_llama], tiny_bundle, ["--strength", STRENGTH], log=log) as running:
        yield running


# Slots


@pytest.mark.parametrize("n_parallel", [1, 4, 8])
def test_a_server_that_nobody_changed_is_protected(
    n_parallel: int, start: Start, expected: dict[float, list[list[int]]]
) -> None:
    """One request after the other, or as many at a time as there are slots."""

    def said(**kwargs: Any) -> list[list[int]]:
        running = start(n_parallel=n_parallel, **kwargs)
        rounds = [PROMPTS[i : i + n_parallel] for i in range(0, len(PROMPTS), n_parallel)]
        return [tokens for prompts in rounds for tokens in running.complete_at_once(prompts, N)]

    assert said(bundle=None) == expected[0.0]
    assert said(options=("--strength", 0)) == expected[0.0]
    assert said() == expected[STRENGTH]


def test_slots_that_share_one_memory(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """As llama-server has them where nobody says how many."""
    running = start("--kv-unified", n_parallel=4)
    assert running.complete_at_once(PROMPTS[:4], N) == expected[STRENGTH][:4]
    assert running.complete_at_once(PROMPTS[4:], N) == expected[STRENGTH][4:]


def test_several_answers_to_one_prompt(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """The prompt is evaluated once and its memory copied to the other slots."""
    for arguments in ((), ("--kv-unified",)):
        running = start(*arguments, n_parallel=4)
        for prompt, tokens in zip(PROMPTS[:2], expected[STRENGTH], strict=False):
            answers = running.answer(prompt, N, n_cmpl=3)
            assert [answer["tokens"] for answer in answers] == [tokens] * 3


# What a server keeps


def test_a_prompt_comes_back_from_the_cache_in_memory(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """Others have taken the only slot meanwhile."""
    running = start("--cache-ram", 64)
    for i in (1, 7, 5, 1, 7):
        answer = running.answer(PROMPTS[i], N)
        assert answer["tokens"] == expected[STRENGTH][i]
    assert answer["timings"]["cache_n"] == len(PROMPTS[7]) - 1
    assert answer["timings"]["prompt_n"] == 1


def test_idle_slots_go_to_the_cache_and_come_back(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """In a memory that slots share, idle ones are put away."""
    running = start("--kv-unified", "--cache-ram", 64, n_parallel=2)
    for i, slot in ((1, 0), (7, 1), (1, 1), (7, 0), (1, 0)):
        assert running.complete(PROMPTS[i], N, id_slot=slot) == expected[STRENGTH][i]


def test_a_slot_is_saved_and_restored_even_after_a_kill(
    start: Start, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    saves = tmp_path / "slots"
    saves.mkdir()
    running = start("--slot-save-path", f"{saves}/", n_parallel=2)
    for i in (1, 7):
        assert running.complete(PROMPTS[i], N, id_slot=0) == expected[STRENGTH][i]
        saved = running.ask("/slots/0?action=save", {"filename": f"{i}.bin"})
        assert saved["n_written"] == (saves / f"{i}.bin").stat().st_size
    for slot in (0, 1):
        assert_it_goes_on(running, slot, 1, expected[STRENGTH])
    running.kill()
    again = start("--slot-save-path", f"{saves}/", n_parallel=2)
    assert_it_goes_on(again, 1, 7, expected[STRENGTH])
    assert sorted(path.name for path in saves.iterdir()) == ["1.bin", "7.bin"]


def assert_it_goes_on(running: Server, slot: int, i: int, expected: list[list[int]]) -> None:
    """A restored slot answers its prompt from memory."""
    restored = running.ask(f"/slots/{slot}?action=restore", {"filename": f"{i}.bin"})
    assert restored["n_restored"] == len(PROMPTS[i]) + N - 1
    answer = running.answer(PROMPTS[i], N, id_slot=slot)
    assert answer["tokens"] == expected[i]
    assert answer["timings"]["cache_n"] == len(PROMPTS[i]) - 1


def test_a_slot_that_was_saved_without_protection_is_refused(
    start: Start, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    """And the slot goes on."""
    plain = start("--slot-save-path", f"{tmp_path}/", bundle=None)
    plain.complete(PROMPTS[1], N)
    plain.ask("/slots/0?action=save", {"filename": "plain.bin"})
    running = start("--slot-save-path", f"{tmp_path}/")
    with pytest.raises(Refused, match="Unable to restore slot"):
        running.ask("/slots/0?action=restore", {"filename": "plain.bin"})
    assert "says nothing of its tokens" in running.said()
    assert running.complete(PROMPTS[1], N) == expected[STRENGTH][1]


def test_a_context_that_is_full_is_not_shifted(start: Start, drop_in: AntidistillationLlama) -> None:
    """Whatever the server is asked for: it says so, and the answer ends."""
    running = start("--context-shift", "--cache-reuse", 4)
    answer = running.answer(PROMPTS[1], 2 * N_CTX, ignore_eos=True)
    assert (answer["truncated"], answer["stop_type"]) == (True, "limit")
    assert len(answer["tokens"]) == N_CTX - len(PROMPTS[1])
    assert answer["tokens"][:N] == generated(drop_in, PROMPTS[1])
    moved = [tiny.BOS, *b"!!", *PROMPTS[1][1:]]
    assert running.complete(moved, N) == generated(drop_in, moved)


# Teachers that llama-server keeps checkpoints of

#: Several begin alike, and another one comes between.
BEGINNING = [tiny.BOS, *b"the first sixty tokens of a prompt that several requests begin with, and then"]
ENDINGS = [list(b" one goes on like this for a while"), list(b" another one like that")]
ALIKE = [BEGINNING + ENDINGS[0], BEGINNING + ENDINGS[1], BEGINNING + ENDINGS[0], PROMPTS[2], BEGINNING + ENDINGS[1]]


def assert_it_follows(teacher: Path, bundle: Path, start: Start, *arguments: object) -> list[int]:
    """At strength 0 and at STRENGTH, for prompts that begin alike. Gives how much of each came from the cache."""
    kwargs: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(teacher), bundle=bundle, **kwargs)) as llm:
        for strength in (0.0, STRENGTH):
            running = start(*arguments, model=teacher, bundle=bundle, options=("--strength", strength))
            answers = [running.answer(prompt, N) for prompt in ALIKE]
            for prompt, answer in zip(ALIKE, answers, strict=True):
                llm.reset()
                assert answer["tokens"] == generated(llm, prompt, strength=strength)
    return [answer["timings"]["cache_n"] for answer in answers]


def test_a_teacher_with_a_sliding_window(start: Start, tiny_llama: Path, tiny_traces: Path, tmp_path: Path) -> None:
    """Its memory has forgotten what a cached prompt needs; the server restores a part of a state."""
    teacher = tmp_path / "gemma3.gguf"
    saved = families.save(families.family_model("gemma3"), tmp_path / "gemma3")
    export_directory(saved, tiny_llama, teacher)
    options = Options(str(teacher), {"traces": tiny_traces}, tmp_path / "bundle", carriers=1.0, n_threads=1, force=True)
    convert(options, lambda line: None)
    cached = assert_it_follows(teacher, tmp_path / "bundle", start, "--checkpoint-min-step", 16)
    assert cached[1] > len(BEGINNING) // 2
    assert cached[4] > len(BEGINNING) // 2


def test_a_recurrent_teacher(start: Start, tiny_bundle: Path, tmp_path: Path) -> None:
    """It cannot forget a draft that was wrong: the server goes back to a checkpoint."""
    teacher = write_mamba(tmp_path / "mamba.gguf")
    assert_it_follows(teacher, tiny_bundle, start)
    assert_it_follows(teacher, tiny_bundle, start, *drafting(tiny_bundle / "proxy-plus.gguf"))


def test_a_teacher_with_an_adapter(start: Start, tiny_llama: Path, tiny_bundle: Path, adapter_bundle: Path) -> None:
    """Put on when the server starts, and taken off for a request."""
    adapter = adapter_bundle / ADAPTER_NAME
    running = start("--lora-scaled", f"{adapter}:{LORA_SCALE}")
    kwargs: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    said = []
    for scale in (LORA_SCALE, 0.0, LORA_SCALE):
        own = {**kwargs, "lora_path": str(adapter), "lora_scale": scale} if scale else kwargs
        with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=STRENGTH, **own)) as llm:
            said.append(generated(llm, PROMPTS[1]))
        assert running.complete(PROMPTS[1], N, lora=[{"id": 0, "scale": scale}]) == said[-1]
    assert said[0] == said[2] != said[1]


# Drafts


def drafting(draft: Path) -> list[object]:
    """llama-server's flags for a draft model, however unsure it is."""
    on_one_core = ("-ngld", 0, "-td", 1, "-tbd", 1)
    return ["--spec-type", "draft-simple", "-md", draft, *on_one_core, "--spec-draft-p-min", 0]


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_the_proxy_drafts_for_its_teacher(
    n_parallel: int, start: Start, tiny_bundle: Path, expected: dict[float, list[list[int]]]
) -> None:
    """It lies in the bundle, so it is left alone. Drafts are verified against adjusted rows."""
    drafts = drafting(tiny_bundle / "proxy-plus.gguf")
    for options, strength in ((("--strength", 0), 0.0), (("--strength", STRENGTH), STRENGTH)):
        running = start(*drafts, options=options, n_parallel=n_parallel)
        assert running.complete_at_once(PROMPTS[:n_parallel], N) == expected[strength][:n_parallel]
        answer = running.answer(PROMPTS[4], N)
        assert answer["tokens"] == expected[strength][4]
        assert answer["timings"]["draft_n"] > 0


def test_drafts_of_more_rows_than_the_pair_gives_at_once(
    start: Start, tiny_bundle: Path, expected: dict[float, list[list[int]]]
) -> None:
    """Four slots of 25 rows."""
    running = start(*drafting(tiny_bundle / "proxy-plus.gguf"), "--spec-draft-n-max", 24, n_parallel=4)
    assert running.complete_at_once(PROMPTS[:4], N) == expected[STRENGTH][:4]


def test_a_draft_of_the_same_vocabulary_is_protected_too(
    start: Start, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    draft = tiny.write_gguf(tiny.tiny_model(seed=5), tmp_path / "draft.gguf")
    running = start(*drafting(draft))
    answer = running.answer(PROMPTS[4], N)
    assert answer["tokens"] == expected[STRENGTH][4]
    assert answer["timings"]["draft_n"] > 0


def test_drafts_from_what_was_said(start: Start, drop_in: AntidistillationLlama) -> None:
    """A grammar makes the text repeat itself, so that there is something to look up."""
    grammar = 'root ::= "abcdefgh" root'
    running = start("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 4, "--spec-ngram-simple-size-m", 8)
    answer = running.answer(PROMPTS[4], 3 * N, grammar=grammar)
    assert answer["tokens"] == list(b"abcdefgh" * N)[: 3 * N]
    assert answer["timings"]["draft_n"] > 0
    free = running.answer(PROMPTS[4], 6 * N)
    assert free["tokens"] == generated(drop_in, PROMPTS[4], 6 * N)


# Requests


@pytest.mark.parametrize(
    "parameters",
    [
        {"backend_sampling": True},
        {"n_probs": 3},
        {"n_probs": 3, "post_sampling_probs": True},
        {"cache_prompt": False},
        {"samplers": ["temperature", "top_k", "min_p"]},
        {"top_k": 1, "temperature": 2.0},
        {"min_keep": 5, "top_p": 0.0, "temperature": 0},
        {"seed": 7, "n_keep": -1},
    ],
    ids=lambda parameters: "-".join(parameters),
)
def test_no_parameter_turns_protection_off(
    parameters: dict[str, Any], one: Server, expected: dict[float, list[list[int]]]
) -> None:
    for prompt, tokens in zip(PROMPTS, expected[STRENGTH], strict=True):
        assert one.complete(prompt, N, **parameters) == tokens


def test_a_server_that_is_to_sample_on_the_device_is_protected(
    start: Start, expected: dict[float, list[list[int]]]
) -> None:
    running = start("--backend-sampling", n_parallel=4)
    assert running.complete_at_once(PROMPTS[:4], N) == expected[STRENGTH][:4]


def test_a_bias_is_added_to_adjusted_rows(one: Server, drop_in: AntidistillationLlama) -> None:
    bias = dict.fromkeys(generated(drop_in, PROMPTS[1])[:3], -100.0)

    def biased(_: Any, scores: Any) -> Any:
        scores[list(bias)] += -100.0
        return scores

    processors = llama_cpp.LogitsProcessorList([biased])
    said = generated(drop_in, PROMPTS[1], logits_processor=processors)
    assert not set(said) & set(bias)
    assert one.complete(PROMPTS[1], N, logit_bias=[[token, value] for token, value in bias.items()]) == said


@pytest.mark.parametrize(
    "constraint",
    [
        {"grammar": LETTERS},
        {"grammar": 'root ::= "yes" | "no"'},
        {"json_schema": {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}},
    ],
    ids=["letters", "words", "json_schema"],
)
def test_a_grammar_chooses_among_adjusted_rows(
    constraint: dict[str, Any], one: Server, drop_in: AntidistillationLlama
) -> None:
    """It refuses the first choice now and then, and the chain runs twice for one token."""
    answer = one.answer(PROMPTS[1], N, **constraint)
    text = answer["generation_settings"]["grammar"]
    grammar = LlamaGrammar.from_string(text, verbose=False)
    said = generated(drop_in, PROMPTS[1], grammar=grammar)
    assert answer["tokens"] == said
    assert said != generated(drop_in, PROMPTS[1])


# What a server reports


def logarithms(row: Any) -> Any:
    """Of the probabilities that a row of logits gives."""
    row = np.asarray(row, dtype=np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def rows(llm: AntidistillationLlama, prompt: list[int], n: int, strength: float, **parameters: Any) -> Any:
    """The row that each of the next tokens is chosen from."""
    llm.strength = strength
    said = llm.generate(prompt, temp=0.0, **parameters)
    found = [np.array(llm._ctx.get_logits()[: tiny.N_VOCAB]) for _ in itertools.islice(said, n)]
    llm.strength = STRENGTH
    return np.array(found)


def letters() -> LlamaGrammar:
    """Whole characters: of others the server reports no text before they are complete, and no probabilities."""
    return LlamaGrammar.from_string(LETTERS, verbose=False)


def test_reported_probabilities_are_those_of_adjusted_rows(one: Server, drop_in: AntidistillationLlama) -> None:
    """All of them, to 0.05 of shifts of some nats: the server evaluates its prompt in one batch."""
    answer = one.answer(PROMPTS[1], N, n_probs=tiny.N_VOCAB, grammar=LETTERS)
    adjusted = rows(drop_in, PROMPTS[1], N, STRENGTH, grammar=letters())
    plain = rows(drop_in, PROMPTS[1], 1, 0.0)
    assert np.abs(logarithms(adjusted[0]) - logarithms(plain[0])).max() > 0.5
    assert len(answer["completion_probabilities"]) == N
    for row, reported in zip(adjusted, answer["completion_probabilities"], strict=True):
        said = {each["id"]: each["logprob"] for each in reported["top_logprobs"]}
        assert len(said) == tiny.N_VOCAB
        ours = logarithms(row)
        assert max(abs(ours[token] - value) for token, value in said.items()) < 0.05


def test_probabilities_after_sampling_are_those_of_adjusted_rows(one: Server, drop_in: AntidistillationLlama) -> None:
    how = {"temperature": 1.0, "samplers": ["temperature"], "grammar": LETTERS}
    answer = one.answer(PROMPTS[1], 1, n_probs=tiny.N_VOCAB, post_sampling_probs=True, **how)
    (reported,) = answer["completion_probabilities"]
    (row,) = rows(drop_in, PROMPTS[1], 1, STRENGTH)
    ours = np.exp(logarithms(row))
    said = {each["id"]: each["prob"] for each in reported["top_probs"]}
    assert len(said) > 20
    share = sum(ours[token] for token in said)
    for token, probability in said.items():
        assert probability == pytest.approx(ours[token] / share, rel=0.05)


def test_chat_and_completions_and_streams_say_the_same(one: Server, drop_in: AntidistillationLlama) -> None:
    """Over llama-server's own routes and OpenAI's."""
    messages = [{"role": "user", "content": "3 + 4 ="}]
    prompt = one.ask("/apply-template", {"messages": messages})["prompt"]
    tokens = one.ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
    said = generated(drop_in, tokens, grammar=letters())
    text = bytes(said).decode()
    how = {"max_tokens": N, "temperature": 0, "grammar": LETTERS}
    chat = one.ask("/v1/chat/completions", {"messages": messages, **how})
    assert chat["choices"][0]["message"]["content"] == text
    completion = one.ask("/v1/completions", {"prompt": tokens, **how})
    assert completion["choices"][0]["text"] == text
    parts = list(one.stream("/completion", {"prompt": tokens, **how}))
    assert [token for part in parts for token in part["tokens"]] == said
    streamed = one.stream("/v1/completions", {"prompt": tokens, **how})
    pieces = [choice["text"] for part in streamed for choice in part["choices"]]
    assert len(pieces) > 2
    assert "".join(pieces) == text
    deltas = one.stream("/v1/chat/completions", {"messages": messages, **how})
    assert "".join(c["delta"].get("content") or "" for part in deltas for c in part["choices"]) == text


# Embeddings


def test_completions_stay_protected_between_embeddings(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """Both come from one context."""
    running = start("--embeddings", "--pooling", "mean", n_parallel=2)
    plain = start("--embeddings", "--pooling", "mean", n_parallel=2, bundle=None)
    for i in (1, 4):
        assert running.complete(PROMPTS[i], N) == expected[STRENGTH][i]
        ours, theirs = (each.ask("/v1/embeddings", {"input": "some text"}) for each in (running, plain))
        assert ours["data"][0]["embedding"] == pytest.approx(theirs["data"][0]["embedding"], abs=1e-5)


def test_embeddings_of_single_tokens_show_nothing(start: Start, expected: dict[float, list[list[int]]]) -> None:
    """Logits follow from them; the server puts zeros where it is given none."""
    running = start("--embeddings", "--pooling", "none")
    (answer,) = running.ask("/embeddings", {"content": "some text"})
    values = np.array(answer["embedding"])
    assert values.shape[1] == 64
    assert not values.any()
    assert running.complete(PROMPTS[1], N) == expected[STRENGTH][1]


# The control file


@pytest.fixture
def controlled(start: Start, tmp_path: Path) -> Callable[..., tuple[Server, Control]]:
    """Starts a server at strength 0 and opens its control file."""
    directory = control_directory(tmp_path / "control")

    def call(*arguments: object, **kwargs: Any) -> tuple[Server, Control]:
        running = start(*arguments, options=("--strength", 0, "--control", directory), **kwargs)
        return running, control_of(running, directory)

    return call


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_reasoning_tokens_are_banned_in_what_it_samples(
    drafts: bool, controlled: Callable[..., tuple[Server, Control]], tiny_bundle: Path
) -> None:
    """Of a text that has both: from the start, or once the first close was sampled."""
    running, control = controlled(*(drafting(tiny_bundle / "proxy-plus.gguf") if drafts else ()))
    free = running.complete(PROMPTS[1], N)
    close = next(token for token in free[1:] if token != free[0])
    opened = next(token for token in free[free.index(close) + 1 :] if token != close)
    end = free.index(close) + 1
    for think, n_free in ((Think(opened, close), end), (Think(opened, close, from_start=True), 0)):
        control.ask(0, Settings(0.0), think=think)
        said = running.complete(PROMPTS[1], N)
        assert said[:n_free] == free[:n_free]
        assert len(said) == N
        assert not {opened, close} & set(said[n_free:])
        assert control.in_force(0).think == think
    control.ask(0, Settings(0.0))
    assert running.complete(PROMPTS[1], N) == free


@pytest.mark.parametrize("kind", ["plain", "drafts", "recurrent", "recurrent drafts"])
def test_every_request_begins_once(
    kind: str, controlled: Callable[..., tuple[Server, Control]], tiny_bundle: Path, tmp_path: Path
) -> None:
    """One that adds the token that was sampled last, one that repeats what was said, and drafts that are taken back."""
    model = {"model": write_mamba(tmp_path / "mamba.gguf")} if "recurrent" in kind else {}
    drafts = drafting(tiny_bundle / "proxy-plus.gguf") if "drafts" in kind else []
    running, control = controlled(*drafts, **model)
    prompt, before = PROMPTS[4], control.counters(0)
    for n in (N, N, 1, 3):
        epoch = control.ask(0, Settings(0.0))
        answer = running.answer(prompt, n, ignore_eos=True)
        assert control.in_force(0).epoch == epoch
        prompt = prompt + answer["tokens"]
    epoch = control.ask(0, Settings(0.0))
    running.complete(prompt[:-1], 1)
    assert control.in_force(0).epoch == epoch
    found = control.counters(0) - before
    assert found.n_begun == 5
    assert found.n_decoded >= len(prompt) - 1
    assert control.decodes().begun == control.decodes().ended > 0


# Programs


def test_a_client_that_leaves_costs_the_next_one_nothing(one: Server, expected: dict[float, list[list[int]]]) -> None:
    body = json.dumps({"prompt": PROMPTS[1], "n_predict": 200, "ignore_eos": True, "stream": True}).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", one.port), timeout=60) as client:
            head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert client.recv(64).startswith(b"HTTP/1.1 200")
    assert one.complete(PROMPTS[1], N) == expected[STRENGTH][1]


def write_stranger(path: Path) -> Path:
    """A model of another vocabulary."""
    pieces = list(tiny.BYTES)
    pieces[65], pieces[66] = pieces[66], pieces[65]
    return tiny.write_gguf(tiny.tiny_model(), path, pieces=pieces)


def test_a_teacher_of_another_vocabulary_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    stranger = write_stranger(tmp_path / "stranger.gguf")
    refused = Server(["-m", stranger], tiny_bundle, log=tmp_path / "log")
    done = subprocess.run(list(map(str, refused.command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"adlocal: {stranger} has another vocabulary than the bundle" in done.stderr
    assert "--allow-model" in done.stderr


def test_a_router_starts_servers_that_are_protected(
    start: Start, tiny_llama: Path, tmp_path: Path, expected: dict[float, list[list[int]]]
) -> None:
    """It makes no context itself. Each of the models that it starts is a process of its own."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny_llama, folder / "teacher.gguf")
    other = tiny.write_gguf(tiny.tiny_model(seed=1), folder / "other.gguf")
    write_stranger(folder / "stranger.gguf")
    router = start("--models-dir", folder, model=None)
    plain = start("--models-dir", folder, model=None, bundle=None)
    for model in ("teacher", "other"):
        ours, theirs = (each.complete(PROMPTS[1], N, model=model) for each in (router, plain))
        assert ours != theirs, other
        if model == "teacher":
            assert (ours, theirs) == (expected[STRENGTH][1], expected[0.0][1])
    assert plain.complete(PROMPTS[1], N, model="stranger")
    with pytest.raises(Refused):
        router.complete(PROMPTS[1], N, model="stranger")
    assert "has another vocabulary than the bundle" in router.said()


# The list


def test_every_function_of_llama_ext_h_has_its_fate() -> None:
    """Programs of llama.cpp's own import its C++ functions. One is of a later llama.cpp."""
    _, _, extensions = (ROOT / "native" / "plugin" / "fates.hpp").read_text().partition("ADL_EXTENSIONS")
    listed = set(re.findall(r"X\((llama_\w+)", extensions)) - {"llama_batch_ext_set_decision_order"}
    assert listed == declared((source() / "src" / "llama-ext.h").read_text())
