"""The laboratory's task: prompts and solutions are read anew by their words, and tokenized anew by llama.cpp."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import pytest

from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import Trace, TraceEncoder
from examples.lab.models.training import Example
from examples.lab.task import vocabulary, word_problems

SEEDS = ("0 teacher all", "1 proxy easy", "2 prompts", "test")
N = 1000

# One regular expression an instruction; what it does to the value follows from its word alone.
STEPS: dict[str, Callable[[int, int], int]] = {
    r"gets (\d+) more|finds (\d+)": lambda value, n: value + n,
    r"loses (\d+)|sells (\d+)": lambda value, n: value - n,
    r"doubles them": lambda value, n: 2 * value,
    r"triples them": lambda value, n: 3 * value,
}
# What a solution may say: a reason, told as an expression of its numbers and of v, the value before, and its result
# "=", which is also the value after. Without a result: a remark on the value there is.
SAYINGS = {
    r"(\d+) plus (\d+) is (?P<c>\d+)": "{0} + {1}",
    r"(\d+) minus (\d+) is (?P<c>\d+)": "{0} - {1}",
    r"(\d+) times (\d+) is (?P<c>\d+)": "{0} * {1}",
    r"(\d+) and (\d+) make (?P<c>\d+)": "{0} + {1}",
    r"(\d+) and (\d+) and (\d+) make (?P<c>\d+)": "{0} + {1} + {2}",
    r"(\d+) without (\d+) make (?P<c>\d+)": "{0} - {1}",
    r"adding (\d+) to (\d+) gives (?P<c>\d+)": "{1} + {0}",
    r"taking (\d+) from (\d+) leaves (?P<c>\d+)": "{1} - {0}",
    r"doubling (\d+) gives (?P<c>\d+)": "2 * {0}",
    r"tripling (\d+) gives (?P<c>\d+)": "3 * {0}",
    r"now (?P<c>\d+) , from (\d+) plus (\d+)(?! plus)": "{0} + {1}",
    r"now (?P<c>\d+) , from (\d+) plus (\d+) plus (\d+)": "{0} + {1} + {2}",
    r"now (?P<c>\d+) , from (\d+) minus (\d+)": "{0} - {1}",
    r"(\d+) more leads to (?P<c>\d+)": "v + {0}",
    r"(\d+) less leads to (?P<c>\d+)": "v - {0}",
    r"twice that leads to (?P<c>\d+)": "2 * v",
    r"thrice that leads to (?P<c>\d+)": "3 * v",
    r"that leads to (?P<c>\d+)": "",  # the prompt has the reason
}
# What may be said beside those where wording is free.
SAYINGS_FREELY = {
    r"(?P<c>\d+) is (\d+) plus (\d+)": "{0} + {1}",
    r"(?P<c>\d+) is (\d+) minus (\d+)": "{0} - {1}",
    r"(?P<c>\d+) is (\d+) times (\d+)": "{0} * {1}",
    r"(\d+) plus (\d+) plus (\d+) is (?P<c>\d+)": "{0} + {1} + {2}",
    r"(\d+) with (\d+) more is (?P<c>\d+)": "{0} + {1}",
    r"(\d+) with (\d+) less is (?P<c>\d+)": "{0} - {1}",
    r"with (\d+) more , (?P<c>\d+)": "v + {0}",
    r"with (\d+) less , (?P<c>\d+)": "v - {0}",
    r"with twice that , (?P<c>\d+)": "2 * v",
    r"with thrice that , (?P<c>\d+)": "3 * v",
    r"from (\d+) to (?P<c>\d+) by (\d+) more": "{0} + {1}",
    r"from (\d+) to (?P<c>\d+) by (\d+) less": "{0} - {1}",
    r"from (\d+) to (?P<c>\d+) by doubling": "2 * {0}",
    r"from (\d+) to (?P<c>\d+) by tripling": "3 * {0}",
    r"adding (\d+) leads to (?P<c>\d+)": "v + {0}",
    r"taking (\d+) leads to (?P<c>\d+)": "v - {0}",
    r"doubling leads to (?P<c>\d+)": "2 * v",
    r"tripling leads to (?P<c>\d+)": "3 * v",
    r"twice (\d+) is (?P<c>\d+)": "2 * {0}",
    r"thrice (\d+) is (?P<c>\d+)": "3 * {0}",
    r"(\d+) minus (\d+) leaves (?P<c>\d+)": "{0} - {1}",
}
REMARKS = (
    r"let us see",
    r"well ,",
    r"step by step :",
    r"we start with (?P<v>\d+) (?P<thing>\w+)",
    r"check : (?P<v>\d+)",
    r"yes , (?P<v>\d+)",
    r"the answer is (?P<v>\d+)",
    r"answer : (?P<v>\d+)",
    r"that is (?P<v>\d+) (?P<thing>\w+)",
    r"(?:so )?(?P<name>\w+) (?:has|ends with) (?P<v>\d+)",
    r", then",
    r"; next",
    r"\.(?: so(?! \w+ has))?",
)
REMARKS_FREELY = (r"yes ,(?! \d+ (?:\.|,|;|$))", r"next", r"now(?! \d+ , from)")


def some(n: int = N) -> Iterator[word_problems.Problem]:
    """Of both sides, of every seed, of all kinds and of easy ones."""
    for seed in SEEDS:
        for kinds, split in itertools.product(
            (word_problems.KINDS, word_problems.KINDS[:2]), get_args(word_problems.Split)
        ):
            yield from itertools.islice(word_problems.problems(seed, split, kinds), n // len(SEEDS) // 4)


def values_read(prompt: str) -> tuple[str, str, list[int]]:
    """Name, thing and the values of a prompt, from its words."""
    first, *asked, last = prompt.strip().split(" . ")
    name, has, start, things = first.split()
    assert (has, last) == ("has", "how many ?")
    values = [int(start)]
    for words in asked:
        ((step, match),) = [(s, m) for pattern, s in STEPS.items() if (m := re.fullmatch(pattern, words))]
        values.append(step(values[-1], int(next((g for g in match.groups() if g), 0))))
    return name, things, values


def arithmetic(prompt: str) -> str:
    """The prompt without name and thing; words for the same operation count as the same."""
    _, *words = re.sub(r"finds (\d+)", r"gets \1 more", prompt.replace("sells", "loses")).split()
    return " ".join(word for word in words if word not in word_problems.THINGS)


def results_said(solution: str, name: str, things: str, start: int, *, freely: bool = False) -> list[int]:
    """The results that a solution states, each checked against its own reason; nothing in it is left unread."""
    rest, value, found = solution.strip(), start, list[int]()
    sayings: dict[str, str] = SAYINGS
    remarks: tuple[str, ...] = REMARKS
    if freely:
        sayings, remarks = {**SAYINGS, **SAYINGS_FREELY}, (*REMARKS_FREELY, *REMARKS)
    while rest:
        readings = [(m, reason) for pattern, reason in sayings.items() if (m := re.match(pattern + r"(?: |$)", rest))]
        if readings:
            ((match, reason),) = readings
            numbers = [int(g) for i, g in enumerate(match.groups(), 1) if i != match.re.groupindex["c"]]
            before, value = value, int(match["c"])
            found.append(value)
            if reason:
                assert eval(reason.format(*numbers), {"v": before}) == value, rest
        else:
            match = next(m for pattern in remarks if (m := re.match(pattern + r"(?: |$)", rest)))
            said = match.groupdict()
            assert int(said.get("v") or value) == value, rest
            assert said.get("thing") in (None, things)
            assert said.get("name") in (None, name)
        rest = rest[match.end() :]
    return found


def test_answers_are_those_of_the_prompts_words() -> None:
    for problem in some():
        name, things, values = values_read(problem.prompt)
        assert (name, things, values) == (problem.name, problem.things, problem.values)
        assert problem.answer == values[-1]
        assert all(1 <= value <= 40 for value in values)
        assert 2 <= len(values) - 1 <= 4


@pytest.mark.parametrize("freely", [False, True], ids=["as usual", "freely"])
def test_solutions_say_the_prompts_values_and_give_right_reasons(freely: bool) -> None:
    rng, heard = random.Random(0), ""
    for problem in some(4 * N if freely else N):
        solution = problem.solution(rng, freely=freely)
        name, things, (start, *after) = values_read(problem.prompt)
        assert results_said(solution, name, things, start, freely=freely) == after
        assert int(re.findall(r"\d+", solution)[-1]) == after[-1]
        assert word_problems.is_right(problem, solution)
        assert not word_problems.is_right(problem, solution + f" {after[-1] % 40 + 1}")
        heard += solution
    wanted = (*SAYINGS, *REMARKS, *(SAYINGS_FREELY if freely else ()), *(REMARKS_FREELY if freely else ()))
    assert all(re.search(pattern, heard) for pattern in wanted), "some phrasing was never heard"


def test_steps_and_those_told_by_their_result_alone_are_counted() -> None:
    rng = random.Random(3)
    shares = []
    for problem in itertools.islice(word_problems.problems("counting", "train"), 300):
        assert word_problems.n_steps(problem.prompt) == len(problem.steps)
        words = problem.solution(rng).split()
        at = [i for i in range(len(words)) if words[i : i + 3] == ["that", "leads", "to"]]
        bare = sum(i == 0 or words[i - 1] not in ("twice", "thrice") for i in at)
        assert word_problems.n_hidden(" " + " ".join(words)) == bare
        shares.append(bare / len(problem.steps))
    assert 0.1 < sum(shares) / len(shares) < 0.25, "one wording in six"


def test_train_and_test_share_no_arithmetic() -> None:
    """Whatever the seed, the names and the things; one arithmetic in ten is for tests, to 5 standard errors of N."""
    sides: dict[str, set[str]] = {"train": set(), "test": set()}
    for problem in some(4 * N):
        sides[problem.split].add(arithmetic(problem.prompt))
        other = dataclasses.replace(problem, name=word_problems.NAMES[0], things=word_problems.THINGS[0])
        assert other.split == problem.split
    assert len(sides["test"]) > N / 2
    assert not sides["train"] & sides["test"]
    rng = random.Random(0)
    n_tests = sum(word_problems._problem(rng, word_problems.KINDS).split == "test" for _ in range(N))
    assert n_tests == pytest.approx(N / 10, abs=5 * (N * 0.1 * 0.9) ** 0.5)


def test_easy_problems_have_the_kinds_asked_for() -> None:
    easy = itertools.islice(word_problems.problems("easy", "train", ("+", "-")), 300)
    assert {step.kind for problem in easy for step in problem.steps} == {"+", "-"}
    every = itertools.islice(word_problems.problems("all", "train"), 300)
    assert {step.kind for problem in every for step in problem.steps} == set(word_problems.KINDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_distinct_problems_have_different_arithmetic(split: word_problems.Split) -> None:
    found = word_problems.distinct("0 prompts", split, N)
    assert len({arithmetic(problem.prompt) for problem in found}) == len(found) == N
    assert {problem.split for problem in found} == {split}
    assert found == word_problems.distinct("0 prompts", split, N)
    assert found != word_problems.distinct("1 prompts", split, N)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 plus 4 is 7 . the answer is 7", 7),
        (" so tom has 12 cups", 12),
        (" 9", 9),
        (" 9 . check : 10 . that is 0 figs", 0),
        (" well , let us see", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_number(text: str, answer: int | None) -> None:
    assert word_problems.answer_of(text) == answer


# Tokens


def texts(n: int) -> list[tuple[str, str]]:
    """Half of them worded freely."""
    rng = random.Random(1)
    return [(problem.prompt, problem.solution(rng, freely=i % 2 == 0)) for i, problem in enumerate(some(n))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TraceEncoder:
    """llama.cpp's tokenizer and the product's rendering, from the vocabulary's file."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    vocabulary.write_vocabulary(path)
    return TraceEncoder(open_vocabulary(path))


def test_every_text_is_made_of_the_vocabularys_words() -> None:
    known, met = set(word_problems.words()), set[str]()
    for prompt, solution in texts(4 * N):
        for text in (prompt, solution):
            met.update(text.split())
            assert vocabulary.decode(vocabulary.encode(text)) == text
    assert met <= known
    # 0 is said by nobody but a model that errs.
    assert known - met == {"0"}
    assert len(known) == len(word_problems.words()) == vocabulary.N_VOCAB - 3


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
def test_llama_cpp_has_the_same_ids(ended: bool, encoder: TraceEncoder) -> None:
    """Through the chat template: BOS, the prompt, the completion, and EOS if it ended; the loss on the last two."""
    for prompt, solution in texts(N):
        encoded = encoder.encode(Trace("here", prompt=prompt, completion=solution, ended=ended))
        given, said = vocabulary.encode(prompt), [*vocabulary.encode(solution), vocabulary.EOS]
        counted: Sequence[int] = [t for t, counts in zip(encoded.tokens, encoded.targets, strict=True) if counts]
        assert counted == said[: len(said) if ended else -1]
        assert encoded.tokens[: -len(counted)] == [vocabulary.BOS, *given]
        assert not any(encoded.targets[: len(given) + 1])
        assert encoder.encode_prompt("here", prompt) == [vocabulary.BOS, *given]
        example = Example.of(prompt, solution, ended=ended)
        assert (list(example.ids), example.n_prompt) == (encoded.tokens, len(given) + 1)
