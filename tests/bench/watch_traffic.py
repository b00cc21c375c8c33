"""Traffic for `make watch-table`: prompts from published sources, times and lengths drawn from stated distributions.

No log of real users is free to use, so nothing here is one. Texts are real, of the sources that docs/evidence/watch.md
names; who asks what and when is made up, to the shape of people (sessions, bursts, some much and most little), of
programs (steady), and of harvests.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adlocal.serve.watch import Observation, Outcome

DAY = 86_400.0
Rng = np.random.Generator


@dataclass(frozen=True)
class Texts:
    """Prompts of one half of the sources: what is calibrated on, or what is measured on.

    Attributes:
        chat: what people ask an assistant.
        follow: short turns that follow.
        letters: what customers write to a shop or an airline. Few, so the app is fed with what is asked in chats, too.
        problems: word problems.
        app, batch: templates with a hole.
    """

    chat: Sequence[str]
    follow: Sequence[str]
    letters: Sequence[str]
    problems: Sequence[str]
    app: str
    batch: str


@dataclass(frozen=True)
class Asked:
    """A request of the traffic: what the watch is told, and whether it is a harvester's."""

    observation: Observation
    outcome: Outcome
    harvest: bool = False


def read_texts(evals: Path, dialogue: Path, problems: Path) -> tuple[Texts, Texts]:
    """Two disjoint halves, from the wheels of inspect-evals and chatterbot-corpus and GSM8K as JSON lines."""
    rng = np.random.default_rng(0)
    asked, written = _evals(evals)
    said = _dialogue(dialogue)
    solved = [str(json.loads(line)["prompt"]) for line in problems.read_text(encoding="utf-8").splitlines()]
    chat, follow, letters, math = (_halves(rng, each) for each in (asked, said, written, solved))
    templates = (
        (
            "You work for our help desk. Write a polite and short answer to this message of a customer:\n{}",
            "Sum up the following request in one sentence for our archive, please:\n{}",
        ),
        (
            "Please suggest a friendly reply that our support team can send to the customer who wrote this:\n\n{}\n\n"
            "Do not promise anything that is against our terms.",
            "Which department should take care of the text below? Answer with one word only.\n\n{}",
        ),
    )
    first, second = (
        Texts(chat[i], follow[i], letters[i], math[i], app, batch) for i, (app, batch) in enumerate(templates)
    )
    return first, second


def people(rng: Rng, name: str, texts: Texts, n: int, app: bool = False, day: float = DAY) -> Iterator[list[Asked]]:
    """A day of `n` people, each with a key: chat, or the app's template only.

    Sessions: 1 + Poisson(2) within ten hours, requests of each geometric around 5 times the person's own activity
    (lognormal, σ 0.8), gaps lognormal around 90 s (σ 1).
    """
    for i in range(n):
        ask = _App(rng, texts) if app else _Chat(rng, texts)
        activity, start = float(rng.lognormal(0, 0.8)), rng.uniform(0, DAY - 36_000)
        times: list[float] = []
        for begin in start + rng.uniform(0, 36_000, 1 + rng.poisson(2)):
            n_turns = int(rng.geometric(1 / max(1.0, 5 * activity)))
            times += list(begin + np.cumsum(rng.lognormal(np.log(90), 1.0, n_turns)))
        yield [_asked(rng, f"{name}{i}", day + time, *ask()) for time in sorted(times)]


def class_room(rng: Rng, name: str, texts: Texts, n: int, day: float = DAY) -> Iterator[list[Asked]]:
    """`n` people who work with the app for the same 90 minutes, some 20 requests each, at their own paces (σ 0.4)."""
    for i in range(n):
        ask = _App(rng, texts)
        gaps = rng.lognormal(np.log(200) + rng.normal(0, 0.4), 0.8, 60)
        times = day + rng.uniform(0, 600) + np.cumsum(gaps)
        yield [_asked(rng, f"{name}{i}", time, *ask()) for time in times[times < day + 5400]]


def program(rng: Rng, key: str, prompts: Sequence[str], template: str, reasoning: bool, long: float) -> list[Asked]:
    """A batch job or an evaluation loop: one prompt after the other, temperature 0."""
    times = DAY + rng.uniform(0, 3600) + np.cumsum(rng.lognormal(np.log(15), 0.3, len(prompts)))
    return [
        _asked(rng, key, time, template.format(prompt), reasoning, 0.0, long)
        for time, prompt in zip(times, prompts, strict=True)
    ]


def harvest(
    rng: Rng,
    keys: Sequence[str],
    texts: Texts,
    style: str,
    share: float,
    n: int,
    gap: float = 15.0,
    filler: str = "chat",
) -> list[Asked]:
    """`n` requests, one each `gap` seconds (σ 0.3), each by a key at random: problems at `share`, else filler."""
    word = STYLES[style]
    fill = {key: _App(rng, texts) if filler == "app" else _Chat(rng, texts) for key in keys}
    problems = rng.permutation(np.array(texts.problems, object))
    times = DAY + np.cumsum(rng.lognormal(np.log(gap), 0.3, n))
    found, taken = [], 0
    for time in times:
        key = str(rng.choice(keys))
        if rng.random() < share:
            prompt = word(rng, str(problems[taken % len(problems)]))
            taken += 1
            found.append(replace(_asked(rng, key, time, prompt, True, 0.7, 450.0), harvest=True))
        else:
            found.append(_asked(rng, key, time, *fill[key]()))
    return found


def declared(asked: list[Asked]) -> list[Asked]:
    """The same of a key that policy declares as an evaluation loop."""
    return [replace(each, observation=replace(each.observation, declared="evaluation")) for each in asked]


# How a harvest words a problem.


def _fixed(rng: Rng, problem: str) -> str:
    return f"Solve the following problem. Think step by step and explain all of your reasoning.\n\n{problem}"


_OPENINGS = (
    "Work this out for me and write down each step.",
    "I need to understand how you get the result here:",
    "Can you take me through the solution of this one?",
    "Here is something to solve; show your thoughts in full.",
    "Let us reason about this carefully, one thing after another.",
    "What is the answer, and why? Give all intermediate results.",
    "My teacher wants the complete derivation for this.",
    "Explain as to a child how to arrive at the answer.",
)
_CLOSINGS = (
    "",
    "Start from what is known, and don't skip anything.",
    "Be as thorough as you can before you give a final number.",
    "Write your thinking first and the result last.",
    "Check each step before you go on to the next.",
    "I would like to see the whole chain of thought, please.",
)


def _paraphrased(rng: Rng, problem: str) -> str:
    opening, closing = str(rng.choice(_OPENINGS)), str(rng.choice(_CLOSINGS))
    return f"{problem}\n\n{opening} {closing}" if rng.random() < 0.5 else f"{opening}\n\n{problem}\n\n{closing}"


def _bare(rng: Rng, problem: str) -> str:
    return problem


STYLES: dict[str, Callable[[Rng, str], str]] = {"template": _fixed, "paraphrased": _paraphrased, "bare": _bare}


class _Chat:
    """One person's questions: some always let the model think, some never, some now and then."""

    def __init__(self, rng: Rng, texts: Texts) -> None:
        self._rng, self._texts = rng, texts
        self._reasoning = float(rng.choice([0.0, 0.3, 1.0], p=[0.4, 0.35, 0.25]))

    def __call__(self) -> tuple[str, bool, float | None, float]:
        rng, follow = self._rng, self._rng.random() < 0.3
        prompt = str(rng.choice(np.array(self._texts.follow if follow else self._texts.chat, object)))
        reasoning = bool(rng.random() < self._reasoning)
        return prompt, reasoning, None, 350.0 if reasoning else 90.0 if follow else 220.0


class _App:
    """A customer's message in the app's template; the app has the model think, as its maker set it."""

    def __init__(self, rng: Rng, texts: Texts) -> None:
        self._rng, self._texts = rng, texts

    def __call__(self) -> tuple[str, bool, float | None, float]:
        letter = str(self._rng.choice(np.array([*self._texts.letters, *self._texts.chat], object)))
        return self._texts.app.format(letter), True, 0.3, 250.0


def _asked(
    rng: Rng, key: str, time: float, prompt: str, reasoning: bool, temperature: float | None, length: float
) -> Asked:
    n = int(np.clip(rng.lognormal(np.log(length), 0.6), 5, 2000))
    choices = int(n * np.clip(rng.normal(0.35, 0.08), 0, 1))
    observation = Observation(
        time=float(time),
        key=key,
        owner=key,
        reasoning=reasoning,
        temperature=temperature,
        prompt=prompt,
        prompt_tokens=len(prompt) // 4,
    )
    return Asked(observation, Outcome(float(time) + n / 20, key, key, None, n, n, choices, 0.2 * choices))


def _halves(rng: Rng, many: Sequence[str]) -> tuple[list[str], list[str]]:
    order = [many[i] for i in rng.permutation(len(many))]
    return order[: len(order) // 2], order[len(order) // 2 :]


def _evals(wheel: Path) -> tuple[list[str], list[str]]:
    """English requests to an assistant (PersistBench, WritingBench, FreshQA, AgentBench), and letters (tau2-bench)."""
    with zipfile.ZipFile(wheel) as file:

        def text(name: str) -> str:
            return file.read(f"inspect_evals/{name}").decode("utf-8-sig")

        chat: list[str] = []
        for name in ("cross_domain", "beneficial_samples", "sycophancy"):
            chat += [
                json.loads(line)["query"] for line in text(f"persistbench/benchmark_samples/{name}.jsonl").splitlines()
            ]
        writing = [json.loads(line)["query"] for line in text("writingbench/benchmark_all.jsonl").split("\n") if line]
        chat += [query for query in writing if query[:200].isascii()]
        table = text("abstention_bench/data/freshqa/FreshQA_v12182024.csv").split("\n", 2)[2]
        chat += [row["question"] for row in csv.DictReader(io.StringIO(table)) if row["question"]]
        chat += [each["description"] for each in json.loads(text("agent_bench/data/agent_bench_os_test.json"))]
        tasks = [json.loads(text(f"tau2/data/domains/{name}/tasks.json")) for name in ("airline", "retail")]
    letters = [task["user_scenario"]["instructions"]["reason_for_call"] for group in tasks for task in group]
    return sorted(set(chat)), sorted(set(letters))


def _dialogue(wheel: Path) -> list[str]:
    """First turns of English conversations (chatterbot-corpus), read without a YAML parser."""
    found: set[str] = set()
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            if "/english/" in name and name.endswith(".yml"):
                lines = file.read(name).decode().splitlines()
                found |= {m[1].strip("'\" ") for line in lines if (m := re.match(r"- - (.+)", line))}
    return sorted(found)
