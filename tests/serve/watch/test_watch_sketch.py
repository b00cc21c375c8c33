"""Sketches: what is masked, and how near MinHash comes to the true similarity and to datasketch's."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from datasketch import MinHash  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from adlocal.serve.watch.sketch import PERMUTATIONS, SAME_TEMPLATE, Sketch, signature, similarities, skeleton, sketch


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Natalia sold 48 clips", ["natalia", "sold", "0", "clips"]),
        ("3.5 km, x2 and 7th", ["0", "0", "km", "0", "and", "0"]),
        ('Translate "the cat sat" and `f(x)` now', ["translate", "Q", "and", "Q", "now"]),
        ("an extraordinary identifier_of_mine", ["an", "W", "W"]),
        ("Ça va, Straße?", ["ça", "va", "straße"]),
        ("", []),
        ("  …!? ", []),
    ],
)
def test_numbers_quotes_and_long_words_are_masked(prompt: str, expected: list[str]) -> None:
    assert skeleton(prompt) == expected


@pytest.mark.parametrize(("shared", "own"), [(90, 5), (60, 20), (30, 60), (0, 100)])
def test_as_near_to_the_truth_as_datasketch(shared: int, own: int) -> None:
    """Means over 40 pairs of sets; one estimate from 64 entries has a standard error of 1/16 at most, the mean 0.01."""
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(40):
        numbers = rng.choice(2**32, shared + 2 * own, replace=False).astype(np.uint64)
        first, second = numbers[: shared + own], np.concatenate((numbers[:shared], numbers[shared + own :]))
        ours.append(float(similarities(signature(first), signature(second))))
        a, b = (MinHash(PERMUTATIONS, seed=7) for _ in range(2))
        a.update_batch([each.tobytes() for each in first])
        b.update_batch([each.tobytes() for each in second])
        theirs.append(a.jaccard(b))
    truth = shared / (shared + 2 * own)
    assert np.mean(ours) == pytest.approx(truth, abs=0.03)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.04)
    assert np.std(ours) < 1 / 16 + 0.02


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_has_a_sketch_that_is_equal_to_its_own(prompt: str) -> None:
    found = sketch(prompt)
    again = Sketch.from_bytes(found.to_bytes())
    for one, other in ((found.head, again.head), (found.tail, again.tail), (found.content, again.content)):
        assert (one == other).all()
    assert float(similarities(found.content, sketch(prompt).content)) == 1.0


def test_one_template_has_one_form_and_many_contents() -> None:
    first = sketch("Solve the following problem and show all steps: Ann has 3 apples and eats one of them")
    second = sketch("Solve the following problem and show all steps: a train leaves the town at noon with Bob")
    other = sketch("What is a good name for my dog? He is brown and likes to sleep all day long")
    assert float(similarities(first.head, second.head)) >= SAME_TEMPLATE
    assert float(similarities(first.head, other.head)) < 0.2
    assert float(similarities(first.content, second.content)) < 0.6


def test_a_template_at_the_end_counts_as_well() -> None:
    frame = "Now think step by step and tell the number at the end"
    first, second = sketch(f"Ann has 3 apples. {frame}"), sketch(f"The train leaves the town at 9. {frame}")
    assert float(similarities(first.tail, second.tail)) >= SAME_TEMPLATE


def test_other_processes_sketch_alike() -> None:
    """Nodes compare each other's sketches, so no hash may be salted."""
    prompt = "Write a poem about 7 cats and “the moon”"
    program = f"from adlocal.serve.watch.sketch import sketch; print(sketch({prompt!r}).to_bytes().hex())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == sketch(prompt).to_bytes().hex()


def test_nothing_of_the_text_can_be_read_from_a_sketch() -> None:
    assert len(sketch("secret " * 1000).to_bytes()) == 384
    assert b"secret" not in sketch("secret").to_bytes()
    assert "secret" not in json.dumps(sketch("secret").content.tolist())


def test_a_prompt_without_end_is_read_at_its_ends_only() -> None:
    long = "a b c " * 1_000_000
    assert len(skeleton(long)) <= 1024
    assert skeleton(long + "end")[-1] == "end"
