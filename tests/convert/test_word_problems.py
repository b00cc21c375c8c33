"""The demo's word problems: arithmetic recomputed from the text alone, one sequence a seed, no repeats."""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction
from random import Random

import pytest

from adlocal_convert.demo.word_problems import MAX_PROBLEMS, SCENARIOS, word_problems

EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")
PROBLEMS = word_problems(500, seed=7)


def evaluate(expression: str) -> list[Fraction]:
    """Every running value of a chain such as "9 - 4 - 2", left to right; the last is its value."""
    first, *rest = expression.split()
    assert len(rest) == 2 or not {"*", "/"} & set(rest), "a longer chain must not depend on precedence"
    values = [Fraction(first)]
    for operator, operand in zip(rest[::2], map(Fraction, rest[1::2]), strict=True):
        value = values[-1]
        results = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value / operand}
        values.append(results[operator])
    return values


def test_every_expression_is_right_and_stays_in_the_natural_numbers() -> None:
    operators: set[str] = set()
    for problem in PROBLEMS:
        for expression, result in EQUATION.findall(problem["completion"]):
            values = evaluate(expression)
            assert values[-1] == int(result), expression
            assert all(value >= 0 and value.denominator == 1 for value in values), expression
            operators |= set(expression.split()[1::2])
    assert operators == set("+-*/")


def test_a_solution_is_two_to_four_steps_and_the_last_value() -> None:
    for problem in PROBLEMS:
        *steps, final = problem["completion"].split("\n")
        equations = [EQUATION.findall(step) for step in steps]
        assert 2 <= len(steps) <= 4
        assert all(len(found) == 1 for found in equations), problem["completion"]
        assert final == f"#### {equations[-1][0][1]}"


def test_a_step_uses_only_numbers_of_the_question_or_of_earlier_steps() -> None:
    words = {"three times": 3, "four times": 4, "five times": 5, "Monday to Friday": 5, "five weekdays": 5}
    for problem in PROBLEMS:
        known = {2}  # twice as many, two days in a weekend, two sides of a kind in a rectangle
        known |= set(map(int, re.findall(r"\d+", problem["prompt"])))
        known |= {number for word, number in words.items() if word in problem["prompt"]}
        for expression, result in EQUATION.findall(problem["completion"]):
            assert set(map(int, expression.split()[::2])) <= known, problem
            known.add(int(result))


def test_nothing_is_counted_in_ones_and_sentences_are_whole() -> None:
    for problem in PROBLEMS:
        text = problem["prompt"] + "\n" + problem["completion"].rsplit("\n", 1)[0]
        assert not re.search(r"\b[01]\b|  |\ba [aeio]", text), text
        assert problem["prompt"].endswith("?")
        assert all(line[0].isupper() and line[-1] in ".?" for line in text.split("\n")), text


def test_completions_are_short() -> None:
    for problem in PROBLEMS:  # words, numbers, marks and line ends: near enough to a tokenizer's count
        assert 40 <= len(re.findall(r"\w+|[^\w ]", problem["completion"])) <= 110


def test_prompts_are_distinct() -> None:
    assert len(PROBLEMS) == len({problem["prompt"] for problem in PROBLEMS}) == 500


def test_every_scenario_appears_in_its_turn() -> None:
    rng = Random(7)
    turns = [scenario(rng).question for scenario in SCENARIOS]
    assert [problem["prompt"] for problem in PROBLEMS[: len(SCENARIOS)]] == turns


def test_one_seed_is_one_sequence_and_n_only_extends_it() -> None:
    assert word_problems(500, seed=7) == PROBLEMS
    assert word_problems(20, seed=7) == PROBLEMS[:20]
    assert word_problems(20, seed=8) != PROBLEMS[:20]


def test_the_sequence_is_the_same_on_every_python() -> None:
    assert hashlib.sha256(repr(PROBLEMS).encode()).hexdigest()[:16] == "01072565d0e2e232"


@pytest.mark.parametrize("n", [0, -3, MAX_PROBLEMS + 1, 10**12])
def test_a_number_that_cannot_be_served_is_refused_by_value(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}:"):
        word_problems(n)


def test_the_largest_number_is_served() -> None:
    assert len({problem["prompt"] for problem in word_problems(MAX_PROBLEMS)}) == MAX_PROBLEMS
