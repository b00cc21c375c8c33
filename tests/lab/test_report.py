"""The laboratory's report on made-up results: its figures against arithmetic, its verdicts against the data."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adlocal.errors import AdlocalError, InputError
from examples.lab.report import document as report
from examples.lab.report import plots, results
from examples.lab.report.intervals import Interval, over_seeds, paired, paired_with_mean, wilson
from support.json_lines import write_lines

N = 400


def row(defence: str, student: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """One line of results; the first problems are the right ones, whatever the student."""
    return {
        "seed": seed,
        "scale": "full",
        "defence": defence,
        "attack": "naive",
        "variant": "",
        "cost": None if defence in ("clean", "guard alone") else 0.1,
        "teacher": 0.9 if defence in ("clean", "guard alone") else 0.8,
        "teacher_n": 2000,
        "clean": 0.9,
        "base": 0.25,
        "unsaid": 0.5,
        "student": student,
        "right": [i < round(student * N) for i in range(N)],
        "strength": 2.0,
        "guard": 0.05,
        "temperature": 0.5,
        "words": 28.0,
        "hidden": 0.17 + 0.1 * seed,
        "n_examples": 2000,
        "losses": [1.0 / (1 + i) for i in range(60)],
        "cosine": None,
        "fidelity": 0.99,
        "traces": f"stages/{defence}/traces.jsonl",
        "of": "no interest to the report",
        **changes,
    }


METHOD = {0: 0.30, 1: 0.34, 2: 0.29}
ROWS = [
    r
    for seed, student in METHOD.items()
    for r in (
        row("clean", 0.60 + 0.01 * seed, seed),
        row("temperature", 0.50, seed, strength=0.0, guard=0.0, temperature=0.8),
        row("antidistillation, guarded", student, seed),
        row("permuted, guarded", 0.31, seed),
        row("random 1, guarded", 0.45, seed),
        row("random 2, guarded", 0.35, seed),
        row("antidistillation, guarded", student + 0.1, seed, attack="right answers"),
    )
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "full.jsonl"


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_lines(path, *rows)
    return path


def table_row(text: str, *cells: str) -> str:
    """The table's line that has these cells."""
    (line,) = [x for x in text.splitlines() if all(f"| {cell} |" in x for cell in cells)]
    return line


def test_wilson_is_the_known_interval() -> None:
    """8 of 10: 0.490 to 0.943, as in the tables."""
    found = wilson([True] * 8 + [False] * 2)
    assert (found.value, round(found.low, 3), round(found.high, 3)) == (0.8, 0.490, 0.943)
    none = wilson([False] * 20)
    assert none.low == pytest.approx(0, abs=1e-12)
    assert none.high > 0.1


def test_three_seeds_take_students_t() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="one seed"):
        over_seeds([1.0])


@pytest.mark.parametrize(("n", "t"), [(4, 3.182), (11, 2.228), (31, 2.042)])
def test_students_t_holds_for_more_seeds(n: int, t: float) -> None:
    values = [float(i) for i in range(n)]
    assert over_seeds(values).high - np.mean(values) == pytest.approx(t * np.std(values, ddof=1) / n**0.5)


def test_the_mean_of_random_draws_is_as_uncertain_as_the_draws() -> None:
    """Two students far apart say little about the mean of all such students, over however many problems."""
    ours, low, high = ([i < k for i in range(N)] for k in (120, 140, 180))
    found = paired_with_mean(ours, [low, high])
    assert found.value == pytest.approx(-0.10)
    draws = 12.706 * np.std([0.35, 0.45], ddof=1) / math.sqrt(2)
    problems = 1.96 * np.std([(i < 120) - ((i < 140) + (i < 180)) / 2 for i in range(N)], ddof=1) / math.sqrt(N)
    assert found.high - found.value == pytest.approx(math.hypot(draws, problems), rel=1e-3)
    assert not found.excludes_zero
    assert paired_with_mean(ours, [high]) == paired(ours, high)


def test_a_paired_interval_knows_which_problems_both_solve() -> None:
    """Two students that differ on few problems are told apart where their own intervals overlap."""
    ours = [i < 200 for i in range(N)]
    theirs = [i < 216 for i in range(N)]
    found = paired(ours, theirs)
    assert found.value == pytest.approx(-0.04)
    p = 0.04
    assert found.high - found.value == pytest.approx(1.96 * math.sqrt(p * (1 - p) / (N - 1)), rel=1e-3)
    assert found.excludes_zero
    assert wilson(ours).high > wilson(theirs).low
    assert not Interval(0.1, -0.1, 0.3).excludes_zero


def test_a_variant_has_a_table_of_its_own_and_is_in_no_other(source: Path) -> None:
    other = [
        row("clean", 0.95, variant="a larger student"),
        row("antidistillation, guarded", 0.77, variant="a larger student"),
    ]
    plain = report.markdown(results.read(save(source, ROWS)), source.parent)
    text = report.markdown(results.read(save(source, [*ROWS, *other])), source.parent)
    usual, _, rest = text.partition("## Defences, naive student, a larger student\n\n")
    own, _, after = rest.partition("## Whom it protects against")
    assert usual + after[after.index("## The best found") :] == plain
    assert "| 18.0 [" in table_row(own, "10", "antidistillation, guarded"), "18 points under the variant's own clean"


def test_bases_are_told_apart_by_what_they_can_do(source: Path) -> None:
    """Two that need operands said lose 40 and 20 points, two that do not 2 and 6."""
    rows = []
    for seed, unsaid, lost in ((0, 0.20, 0.40), (1, 0.97, 0.02), (2, 0.66, 0.20), (3, 0.67, 0.06)):
        rows += [
            row("clean", 0.70, seed, unsaid=unsaid),
            row("best of 8", 0.70 - lost, seed, cost=None, unsaid=unsaid),
            row("best of 8", 0.10, seed, cost=None, unsaid=unsaid, attack="right answers"),
            row("temperature", 0.70 - lost / 2, seed, unsaid=unsaid),
            row("temperature", 0.60, seed, unsaid=unsaid, cost=0.02),
            row("temperature", 0.10, seed, unsaid=unsaid, cost=0.05),
        ]
    report.write(save(source, rows), source.parent / "full")
    assert (source.parent / "full" / "learners.png").stat().st_size > 10_000
    text = (source.parent / "full" / "report.md").read_text()
    of_bases = text[text.index("## Whom it protects against") :].partition("\n## ")[0]
    assert "| 20.0 | 10.0 | 40.0 |" in table_row(of_bases, "seed 0", "70.0"), "what nobody was taught has no column"
    assert of_bases.index("| seed 0 |") < of_bases.index("| seed 2 |") < of_bases.index("| seed 1 |"), (
        "the least able first"
    )
    half = 12.706 * np.std([0.40, 0.20], ddof=1) / math.sqrt(2)
    weak = f"30.0 [{100 * (0.30 - half):.1f}, {100 * (0.30 + half):.1f}]"
    assert weak in table_row(of_bases, "under two thirds", "2")
    assert "| 4.0 [" in table_row(of_bases, "at least two thirds", "2")
    few = report.markdown(results.read(save(source, rows[:18])), source.parent)
    assert "## Whom it protects against" not in few


def test_the_tables_hold_means_and_intervals_over_seeds(source: Path) -> None:
    text = report.markdown(results.read(save(source, ROWS)), source.parent)
    values = list(METHOD.values())
    mean, half = np.mean(values), 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    shown = f"{100 * mean:.1f} [{100 * (mean - half):.1f}, {100 * (mean + half):.1f}]"
    assert shown in table_row(text, "10", "antidistillation, guarded", "17 to 37%", "3")
    differences = [s - 0.50 for s in values]
    half = 4.303 * np.std(differences, ddof=1) / math.sqrt(3)
    decisive = f"{100 * np.mean(differences):.1f} [{100 * (np.mean(differences) - half):.1f}"
    assert decisive in table_row(text, "10", "temperature", "worse")


def test_the_random_directions_are_compared_by_their_mean_and_their_best(source: Path) -> None:
    text = report.markdown(results.read(save(source, ROWS)), source.parent)
    mean = 100 * (np.mean(list(METHOD.values())) - 0.40)
    best = 100 * (np.mean(list(METHOD.values())) - 0.35)
    assert f"| {mean:.1f} [" in table_row(text, "random directions, same guard: their mean")
    assert f"| {best:.1f} [" in table_row(text, "random directions, same guard: the best of 2 (random 2)")


@pytest.mark.parametrize(
    ("permuted", "verdict"), [(0.60, "worse"), (0.31, "not told apart"), (0.10, "better")], ids=str
)
def test_the_verdict_follows_the_data(permuted: float, verdict: str, source: Path) -> None:
    rows = [{**r, "student": permuted} if r["defence"] == "permuted, guarded" else r for r in ROWS]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert table_row(text, "10", "permuted, same guard", verdict)


def test_an_accuracy_over_seeds_stays_one(source: Path) -> None:
    """Around 0.6 the t interval of 0.2, 0.6 and 1.0 would reach from −0.39 to 1.59."""
    rows = [row("clean", student, seed) for seed, student in enumerate((0.2, 0.6, 1.0))]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "60.0 [0.0, 100.0]" in table_row(text, "clean", "3")


def test_a_choice_is_compared_with_clean_traces_and_a_choice_at_random(source: Path) -> None:
    """By hand: 0.50, 0.49 and 0.42 less 0.60, 0.61 and 0.62, half-width 4.303 of their standard error."""
    chosen = [
        row(name, student, seed, cost=None, teacher=0.9)
        for seed, (ours, random) in enumerate([(0.50, 0.6), (0.49, 0.48), (0.42, 0.41)])
        for name, student in (("best of 8", ours), ("best of 8, random 1", random))
    ]
    text = report.markdown(results.read(save(source, [*ROWS, *chosen])), source.parent)
    assert table_row(text, "clean traces", "worse", "-10.0, -12.0, -20.0").split("|")[2] == " -14.0 [-27.1, -0.9] "
    assert table_row(text, "a random direction's choice", "not told apart", "-10.0, +1.0, +1.0")
    assert "Choosing among" not in report.markdown(results.read(save(source, ROWS)), source.parent)


def test_a_claim_stands_on_fresh_seeds_too(source: Path) -> None:
    """By hand: seeds 3, 4, 5 are 20, 10 and 12 points under temperature, of which 4 and 5 are fresh."""
    half = [
        row(name, student, seed, cost=cost, variant="half", teacher=0.9 if cost is None else 0.88, **changes)
        for seed, lost in ((5, 0.12), (3, 0.20), (4, 0.10))
        for name, student, cost, changes in (
            ("clean", 0.50, None, {}),
            ("temperature", 0.45, 0.02, {}),
            ("temperature", 0.20, 0.10, {}),
            ("temperature", 0.44, 0.02, {"attack": "right answers"}),
            ("antidistillation of numbers, guarded", 0.45 - lost, 0.02, {}),
            ("antidistillation of numbers, guarded", 0.46, 0.02, {"attack": "right answers"}),
            ("numbers permuted, guarded", 0.40, 0.02, {}),
            ("best of 8", 0.30, None, {}),
            ("best of 8, consistent", 0.32, None, {}),
            ("best of 8, consistent, random 1", 0.48, None, {}),
        )
    ]
    text = report.markdown(results.read(save(source, [*ROWS, *half])), source.parent)
    claims = text[text.index("## What acts for 2 points or less, half") :].partition("\n## ")[0]
    ours = "antidistillation of numbers, guarded"
    cells = table_row(claims, ours, "naive", "temperature").split("|")
    spread = 4.303 * np.std([20, 10, 12], ddof=1) / math.sqrt(3)
    assert cells[4] == f" -14.0 [{-14 - spread:.1f}, {-14 + spread:.1f}] "
    assert cells[5] == f" -11.0 [{-11 - 12.706:.1f}, {-11 + 12.706:.1f}] "
    assert cells[6:8] == [" worse ", " -20.0, -10.0, -12.0 "], "by seed, the smallest first"
    assert table_row(claims, ours, "right answers", "temperature", "better"), "against those who filter as well"
    assert table_row(claims, ours, "right answers", "clean", "worse")
    assert table_row(claims, ours, "naive", "numbers permuted, guarded", "-15.0, -5.0, -7.0")
    assert table_row(claims, "best of 8", "naive", "temperature", "worse", "-15.0, -15.0, -15.0")
    assert table_row(claims, "best of 8, consistent", "naive", "best of 8", "+2.0, +2.0, +2.0")
    by_random = table_row(claims, "best of 8, consistent", "naive", "best of 8, consistent, random 1")
    assert "-16.0, -16.0, -16.0" in by_random
    old = [{**r, "seed": r["seed"] - 3} for r in half]
    assert "What acts" not in report.markdown(results.read(save(source, [*ROWS, *old])), source.parent)


def test_a_seed_that_goes_against_the_mean_is_named(source: Path) -> None:
    text = report.markdown(results.read(save(source, ROWS)), source.parent)
    assert "against permuted, same guard: seed 1 (+3.0)" in text
    assert "against temperature" not in text


@pytest.mark.parametrize(("teacher", "is_off"), [(0.80, False), (0.815, False), (0.825, True), (0.775, True)])
def test_a_teacher_that_is_not_matched_is_marked(teacher: float, is_off: bool, source: Path) -> None:
    rows = [{**r, "teacher": teacher} if r["defence"] == "temperature" else r for r in ROWS]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert ("(off)" in table_row(text, "10", "temperature", "temperature 0.8")) == is_off


def test_one_seed_compares_with_the_mean_of_all_its_random_directions(source: Path) -> None:
    rows = [r for r in ROWS if r["seed"] == 0]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    ours, *randoms = (r["right"] for r in (rows[2], rows[4], rows[5]))
    low, high = (100 * getattr(paired_with_mean(ours, randoms), side) for side in ("low", "high"))
    shown = f"-10.0 [{low:.1f}, {high:.1f}]"
    assert table_row(text, "random directions, same guard: their mean", shown, "not told apart")


def test_a_defence_stands_beside_temperature_at_its_cost(source: Path) -> None:
    rows = [{**r, "teacher": 0.8 + 0.01 * r["seed"]} if r["defence"] == "permuted, guarded" else r for r in ROWS]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    cells = table_row(text, "permuted, guarded", "3").split(" | ")
    assert cells[3] == "81.0 ± 1.0"
    assert cells[6] == "19.0 [19.0, 19.0]", "0.50 less 0.31 in every seed"
    assert table_row(text, "temperature", "temperature 0.8").split(" | ")[6] == "–"


def test_a_comparison_with_a_teacher_that_is_not_matched_is_marked(source: Path) -> None:
    rows = [{**r, "teacher": 0.85} if r["defence"] == "permuted, guarded" and r["seed"] == 2 else r for r in ROWS]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert table_row(text, "10", "permuted, same guard", "not told apart (off)")
    assert table_row(text, "10", "temperature", "worse", "3")
    assert "(off): a teacher" in text


def test_a_random_direction_that_lacks_a_seed_is_not_compared(source: Path) -> None:
    rows = [*ROWS, row("random 3, guarded", 0.01, 0)]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert table_row(text, "random directions, same guard: the best of 2 (random 2)")


def test_what_an_attacker_takes_back_is_a_share_of_what_was_lost(source: Path) -> None:
    """10 points of the 30 that clean students are ahead, and with half of the traces clean all of it."""
    half = [row("antidistillation, guarded", 0.62 - 0.01 * seed, seed, attack="50% clean") for seed in METHOD]
    text = report.markdown(results.read(save(source, [*ROWS, *half])), source.parent)
    share = 0.1 / (0.61 - np.mean(list(METHOD.values())))
    assert table_row(text, "right answers", "antidistillation, guarded, −10", f"{100 * share:.0f}%")
    told = "Undone by 1 of the 2 attackers tried: 50% clean."
    assert f"- antidistillation, guarded, −10: {told}" in text
    assert f"points under clean. {told}" in text


def test_no_share_of_a_loss_that_is_not_there(source: Path) -> None:
    rows = [{**r, "student": 0.6} if r["attack"] == "naive" and r["defence"] != "temperature" else r for r in ROWS]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "| – |" in table_row(text, "right answers", "antidistillation, guarded, −10")


def test_a_best_that_takes_nothing_is_called_so(source: Path) -> None:
    rows = [r for r in ROWS if r["defence"] == "clean"]
    rows += [{**r, "defence": "guard alone"} for r in rows]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "At most 2 points of teacher accuracy: **guard alone**" in text
    assert "not told apart from no protection" in text


@pytest.mark.parametrize("defences", [("clean",), ("antidistillation, guarded",), ("temperature", "random 1, guarded")])
def test_reports_on_what_there_is(defences: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    rows = [r for r in ROWS if r["defence"] in defences and r["seed"] == 0 and r["attack"] == "naive"]
    report.write(save(source, rows), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} |" in text for name in defences)


def test_reports_on_a_plan_that_leaves_the_usual_setting_out(source: Path, tmp_path: Path) -> None:
    """Its own setting is named and reported on as the usual one would be, another stays a variant."""
    half = [{**r, "variant": "half"} for r in ROWS]
    other = [row(name, 0.11, variant="other") for name in ("clean", "antidistillation, guarded")]
    report.write(save(source, [*half, *other]), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Laboratory, full, half\n")
    usual = report.markdown(results.read(save(source, ROWS)), source.parent)
    part = "## Defences, naive student\n"
    assert text[text.index(part) :].partition("\n## ")[0] == usual[usual.index(part) :].partition("\n## ")[0]
    assert "## Defences, naive student, other" in text


def test_no_two_defences_look_alike() -> None:
    for looks in zip(*plots.LOOKS.values(), strict=True):
        assert len(set(looks)) == len(plots.LOOKS)


def test_without_matplotlib_one_line_says_so(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AdlocalError, match="the report needs matplotlib"):
        report.write(save(source, ROWS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attackers_stand_beside_the_naive_one(source: Path) -> None:
    text = report.markdown(results.read(save(source, ROWS)), source.parent)
    line = table_row(text, "right answers", "antidistillation, guarded, −10")
    assert "| 10.0 [10.0, 10.0] |" in line, "the attack gives 10 points more in every seed"


def test_a_seed_counts_once_and_another_base_does_not_count(source: Path) -> None:
    """However many students a seed has, and though the last of them started elsewhere."""
    rows = [{**ROWS[0], "base": 0.2}, *[{**ROWS[7], "base": 0.3}] * 3, row("from elsewhere", 0.5, 1, base=0.9)]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "the student before fine-tuning in 25.0% of" in text


def test_one_seed_says_what_its_intervals_leave_out(source: Path) -> None:
    rows = [r for r in ROWS if r["seed"] == 0 and r["attack"] == "naive"]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "One seed" in text
    assert "## Attackers" not in text
    low, high = (100 * getattr(wilson(rows[2]["right"]), side) for side in ("low", "high"))
    assert f"30.0 [{low:.1f}, {high:.1f}]" in text


def test_the_best_is_among_those_who_kept_what_they_were_to_keep(source: Path) -> None:
    rows = [*ROWS, *(row("cheap", 0.5, seed, teacher=0.86, cost=0.05) for seed in range(3))]
    text = report.markdown(results.read(save(source, rows)), source.parent)
    assert "At most 5 points of teacher accuracy: **cheap, −5** (spent 4.0)" in text
    assert "At most 10 points of teacher accuracy: **antidistillation, guarded, −10**" in text


def test_the_same_prompts_are_shown_side_by_side(source: Path) -> None:
    for r in ROWS:
        file = source.parent / r["traces"]
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {"prompt": f"question {i}", "completion": f" {r['defence']} says {i}", "right": i != 1} for i in range(5)
        ]
        write_lines(file, *lines)
    text = report.markdown(results.read(save(source, ROWS)), source.parent)
    assert "**question 0**" in text
    assert "temperature, −10 (wrong): temperature says 1" in text


def test_written_with_pictures(source: Path, tmp_path: Path) -> None:
    report.write(save(source, ROWS), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "tradeoff.png", "defences.png", "losses.png", "attackers.png"}
    assert all((tmp_path / "out" / name).stat().st_size > 2000 for name in names if name.endswith(".png"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "run the laboratory first"),
        ("", "no results; run the laboratory first"),
        (json.dumps(ROWS[0]) + "\n{broken\n", "full.jsonl:2: no result"),
        (json.dumps({"seed": 1}) + "\n", "full.jsonl:1: no result"),
        ("\xff\xfe", "not a text file"),
    ],
    ids=["missing", "empty", "broken", "fields", "binary"],
)
def test_results_that_cannot_be_read(text: str | None, told: str, source: Path) -> None:
    if text is not None:
        source.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=told):
        results.read(source)
