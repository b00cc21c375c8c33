"""The laboratory's stages, killed and resumed; its students and its directions against plain loops and autograd."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch

from adlocal import Bundle as Metadata
from adlocal import ProxyPair
from examples.lab import stages
from examples.lab.models.training import Batch, Example, epochs, row_losses, train
from examples.lab.run import students
from examples.lab.run.students import Student, agreement, majority
from examples.lab.stages import execute, ordered
from examples.lab.task import word_problems
from examples.lab.task.vocabulary import BOS, EOS, IDS
from examples.lab.traces.bundles import BundleStage
from examples.lab.traces.exact import Exact
from support.lab_models import RandomModel, Written, random_model, rows
from support.paths import ROOT
from support.toy_stages import Sum, chain, light_worker, said

Row = dict[str, Any]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stages"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_prepare_worker", light_worker)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the laboratory's workers have it: models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Stages


def names(root: Path) -> list[str]:
    """Everything in the directory of results, hidden or not."""
    return sorted(path.name for path in root.iterdir())


def test_needs_come_first_and_each_stage_once(log: Path) -> None:
    a, b = Sum("a", str(log)), Sum("b", str(log))
    middle = Sum("middle", str(log), parts=(a, b), first=b)
    last = Sum("last", str(log), parts=(middle, a), first=Sum("b", str(log)))
    assert middle.needs == [a, b, b]
    assert ordered([last, middle, a]) == [a, b, middle, last]


def test_a_key_follows_from_all_settings(log: Path) -> None:
    """Of what it needs too; equal settings have one key, in this process and in any other."""
    found = chain(log)
    assert found.key == chain(log).key
    changed = [
        dataclasses.replace(found, terms=(101,)),
        dataclasses.replace(found, first=None),
        dataclasses.replace(found, first=dataclasses.replace(cast(Sum, found.first), terms=(11,))),
    ]
    assert len({found.key, *(stage.key for stage in changed)}) == 4
    code = f"from pathlib import Path; from support import toy_stages; print(toy_stages.chain(Path({str(log)!r})).key)"
    other = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert other.stdout.strip() == found.key


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.usefixtures("light")
def test_stages_run_once_after_what_they_need_and_are_kept(jobs: int, log: Path, root: Path) -> None:
    leaves = tuple(Sum(f"leaf {i}", str(log), terms=(i,)) for i in range(4))
    middle = Sum("middle", str(log), parts=leaves[:3], terms=(10,))
    last = Sum("last", str(log), parts=(middle, *leaves), terms=(100,))
    execute([last, middle], root, jobs)
    lines = said(log)
    assert sorted(lines) == sorted(f"{how} {s.name}" for s in (*leaves, middle, last) for how in ("begun", "ended"))
    for stage in (middle, last):
        assert all(lines.index(f"ended {cast(Sum, s).name}") < lines.index(f"begun {stage.name}") for s in stage.needs)
    assert last.read(root, "sum.json") == 100 + 10 + (0 + 1 + 2) + (0 + 1 + 2 + 3)
    assert names(root) == sorted(stage.key for stage in (*leaves, middle, last))
    described = last.read(root, "stage.json")
    assert (described["stage"], described["seconds"] > 0) == (repr(last), True)

    again = dataclasses.replace(last, terms=(200,))
    execute([again, last], root, jobs)
    assert said(log)[len(lines) :] == ["begun last", "ended last"], "only what has other settings"
    assert again.read(root, "sum.json") == 219


@pytest.mark.usefixtures("light")
def test_a_stage_that_raises_leaves_nothing_and_the_others_stay(log: Path, root: Path) -> None:
    good = Sum("good", str(log), terms=(1,))
    bad = Sum("bad", str(log), first=good, fails=True)
    after = Sum("after", str(log), first=bad)
    with pytest.raises(ValueError, match="bad cannot be had"):
        execute([after], root, 1)
    assert said(log) == ["begun good", "ended good", "begun bad"]
    assert names(root) == [good.key]
    assert not bad.is_done(root)


def environment() -> dict[str, str]:
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_in_the_middle(root: Path, log: Path) -> subprocess.Popen[str]:
    """`execute` in a session of its own, at the gate of the second stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from support import toy_stages; toy_stages.main()", root, log, "2"],
        env=environment(),
        stdout=subprocess.PIPE,  # the workers hold it too: it ends when the last of them has
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background hand down that Ctrl-C is to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    deadline = time.monotonic() + 60
    while "begun b" not in said(log) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert said(log) == ["begun a", "ended a", "begun b"]
    return process


@pytest.mark.usefixtures("light")
def test_a_killed_run_goes_on_where_it_was(root: Path, log: Path) -> None:
    process = run_in_the_middle(root, log)
    process.kill()
    process.communicate(timeout=20)  # workers find out within a second
    a, b, c = cast(list[Sum], ordered([chain(log)]))
    (stray,) = {*names(root)} - {a.key}
    assert stray.endswith(".partial")
    assert (root / stray / "half.txt").exists(), "it was killed in the middle"
    assert [stage.is_done(root) for stage in (a, b, c)] == [True, False, False]

    Path(b.gate).touch()
    kept = (a.path(root) / "sum.json").stat()
    execute([c], root, 2)
    assert said(log)[3:] == ["begun b", "ended b", "begun c", "ended c"]
    assert (a.path(root) / "sum.json").stat() == kept
    assert names(root) == sorted(stage.key for stage in (a, b, c))
    assert c.read(root, "sum.json") == 111


def test_ctrl_c_leaves_no_half_result(root: Path, log: Path) -> None:
    """At a terminal all processes of the run get it."""
    process = run_in_the_middle(root, log)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert names(root) == [ordered([chain(log)])[0].key]
    assert said(log)[3:] == []


# Training


def plain_losses(model: Any, example: Example) -> float:
    """Mean of −log p over the completion, a token at a time."""
    ids = torch.tensor([list(example.ids)])
    log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    found = [-log_p[i - 1, ids[0, i]] for i in range(example.n_prompt, ids.shape[1])]
    return float(sum(found) / len(found))


def examples(n: int = 9) -> list[Example]:
    return [students._example(row) for row in rows("examples", n)]


def test_an_example_is_bos_prompt_completion_eos() -> None:
    found = Example.of(" tom has", " 7 cups")
    assert list(found.ids) == [BOS, IDS[" tom"], IDS[" has"], IDS[" 7"], IDS[" cups"], EOS]
    assert (found.n_prompt, found.weight) == (3, 1.0)
    assert list(Example.of(" tom has", " 7 cups", ended=False).ids) == list(found.ids)[:-1]


@torch.no_grad()
def test_row_losses_are_those_of_each_row_alone() -> None:
    """Lengths differ: nothing of the padding counts. To 1e-5 of float32."""
    model, found = random_model("losses"), examples()
    assert len({len(e.ids) for e in found}) > 3
    expected = [plain_losses(model, e) for e in found]
    np.testing.assert_allclose(row_losses(model, Batch.of(found)), expected, rtol=1e-5)
    alone = [float(row_losses(model, Batch.of([e]))) for e in found]
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
    spoiled = Batch.of(found)
    spoiled.ids[spoiled.ids == 0] = 5
    np.testing.assert_allclose(row_losses(model, spoiled), expected, rtol=1e-5)


def test_epochs_show_every_example_once() -> None:
    found = [dataclasses.replace(e, weight=float(i)) for i, e in enumerate(examples(10))]
    batches = list(itertools.islice(epochs(found, 4, seed=0), 6))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(w for batch in epoch for w in batch.weights.tolist()) == list(range(10))
    orders = [[batch.weights.tolist() for batch in epoch] for epoch in (batches[:3], batches[3:])]
    assert orders[0] != orders[1]


def test_training_weighs_rows_and_learns() -> None:
    """A row of weight 0 teaches nothing: training is as if it were not there. The last is learned by heart."""
    found = examples(4)
    batches = [
        Batch.of([*found[:3], dataclasses.replace(found[3], weight=0.0)]),
        Batch.of(found[:3]),
    ]
    models = [random_model("trained"), random_model("trained")]
    losses: list[list[float]] = [[], []]
    for model, batch, told in zip(models, batches, losses, strict=True):
        train(model, itertools.repeat(batch), 60, 3e-3, lambda step, loss, told=told: told.append(loss))  # type: ignore[misc]
    assert len(losses[0]) == 60
    np.testing.assert_allclose(losses[0][:5], losses[1][:5], rtol=1e-4)
    assert losses[0][-1] < 0.2 * losses[0][0]


# Attackers


def row(prompt: str, answer: int | None, number: int = 0) -> Row:
    completion = " well ," if answer is None else f" {number} plus 1 is 2 . the answer is {answer}"
    return {"prompt": prompt, "completion": completion, "right": answer == 7, "finish_reason": "stop"}


def test_the_majority_decides() -> None:
    """One row a prompt, the first that says what most say; prompts in their order."""
    given = [
        row("p", 6),
        row("p", 7, number=1),
        row("q", 3),
        row("p", 7, number=2),
        row("q", None),
        row("q", 3, number=5),
        row("r", 9),
    ]
    assert majority(given) == [given[1], given[2], given[6]]


def test_agreement_is_the_inner_product_with_the_clean_gradient() -> None:
    """Autograd on one row after another, in float64; central differences of 0.01 are off by their third derivative.

    Weights are the scores in standard deviations, plus 1, cut at 0 and with a mean of 1.
    """
    model, given, clean = random_model("agreement"), rows("given", 24), rows("clean", 8)
    before = [p.detach().clone() for p in model.parameters()]
    found = np.array(agreement(model, given, clean))
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, atol=1e-6, rtol=1e-6)
        assert p.grad is None

    exact = random_model("agreement").double()

    def gradient(row: Row) -> torch.Tensor:
        parts = torch.autograd.grad(row_losses(exact, Batch.of([students._example(row)]))[0], list(exact.parameters()))
        return torch.cat([part.flatten() for part in parts])

    direction = torch.stack([gradient(r) for r in clean]).mean(0)
    scores = np.array([float(gradient(r) @ direction / direction.norm()) for r in given])
    expected = np.maximum(0, 1 + (scores - scores.mean()) / scores.std(ddof=1))
    expected /= expected.mean()
    assert found.mean() == pytest.approx(1)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert np.corrcoef(found, expected)[0, 1] > 0.999


def selected(attack: str, given: Sequence[Row], clean: Sequence[Row] = (), share: float = 0.0) -> list[Example]:
    """What a student of this attack is trained on."""
    student = Student(RandomModel("selected"), (), cast(Any, attack), None, share)
    return student._examples(random_model("selected"), given, clean)


def of(given: Sequence[Row]) -> list[Example]:
    return [Example.of(r["prompt"], r["completion"], ended=r["finish_reason"] == "stop") for r in given]


def test_naive_attackers_take_all() -> None:
    given = rows("naive", 12)
    assert selected("naive", given) == of(given)
    assert {e.ids[-1] == EOS for e in selected("naive", given)} == {True, False}, "cut traces do not end"


def test_right_answers_alone() -> None:
    given = rows("right", 12)
    kept = [r for r in given if word_problems.answer_of(r["completion"]) == r["answer"]]
    assert 0 < len(kept) < len(given)
    assert selected("right answers", given) == of(kept)


@torch.no_grad()
def test_the_perplexity_filter_keeps_the_likeliest_three_quarters() -> None:
    """By the base's own loss, a plain loop's; in their order."""
    given, model = rows("perplexity", 12), random_model("selected")
    losses = [plain_losses(model, e) for e in of(given)]
    limit = sorted(losses)[8]
    assert selected("perplexity", given) == of([r for r, loss in zip(given, losses, strict=True) if loss <= limit])


def test_answers_alone() -> None:
    given = [row(" tom has 3 cups", 7), row(" tom has 4 cups", None)]
    assert selected("answer only", given) == [Example.of(" tom has 3 cups", " the answer is 7")]


@pytest.mark.parametrize(("share", "n_clean"), [(0.0, 0), (0.1, 1), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_clean_traces_take_the_place_of_protected_ones(share: float, n_clean: int) -> None:
    """Of the same problems: as many traces in all, each problem once."""
    given = rows("shared", 12)
    clean = [{**r, "completion": " the answer is 1"} for r in given]
    assert selected("naive", given, clean, share) == of([*clean[:n_clean], *given[n_clean:]])
    assert selected("naive", [], clean, share) == of(clean[:n_clean]), "the control without protected traces"


def test_reweighted_traces_have_their_agreement_as_weight() -> None:
    given, clean = rows("weighed", 12), rows("weighed", 12)
    found = selected("reweighted", given, clean, 0.25)
    weights = agreement(random_model("selected"), given[3:], clean[:3])
    assert [e.weight for e in found[:3]] == [1.0] * 3
    assert [e.weight for e in found[3:]] == pytest.approx(weights)
    assert [dataclasses.replace(e, weight=1.0) for e in found] == of([*clean[:3], *given[3:]])


# Directions

PROXY, HOLDOUT, N = RandomModel("proxy"), Written("holdout", 20), 20
N_LEARNED = N - 4  # the last few are held out, at most four


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[stages.Stage], Path]:
    """Runs what is missing of a stage, and tells where it lies."""
    root = tmp_path_factory.mktemp("stages")

    def make(stage: stages.Stage) -> Path:
        for each in ordered([stage]):
            if not each.is_done(root):
                stages.run(each, root)
        return stage.path(root)

    return make


def unit_gradient(seed: str) -> list[torch.Tensor]:
    """Of the mean over the learned traces of each trace's mean loss, one trace after another in float64."""
    model = random_model(seed).double()
    for example in of(rows(HOLDOUT.seed, HOLDOUT.n)[:N_LEARNED]):
        (row_losses(model, Batch.of([example]))[0] / N_LEARNED).backward()
    gradients = [cast(torch.Tensor, p.grad) for p in model.parameters()]
    norm = sum((g**2).sum() for g in gradients) ** 0.5
    return [g / norm for g in gradients]


@torch.no_grad()
def derivatives(directions: Sequence[torch.Tensor], ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Of the proxy's logits along a direction, by central differences of 1e-4 in float64; centred rows."""
    found = []
    norm = sum((d**2).sum() for d in directions) ** 0.5
    for step in (1e-4, -1e-4):
        model = random_model(PROXY.seed).double()
        for p, direction in zip(model.parameters(), directions, strict=True):
            p += step * direction / norm
        found.append(model(input_ids=torch.tensor([list(ids)])).logits[0].numpy())
    rows = (found[0] - found[1]) / 2e-4
    return np.asarray(rows - rows.mean(axis=1, keepdims=True))


def product_deltas(bundle: Path, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """The product's Δ after each prefix, centred rows."""
    with closing(ProxyPair.open(bundle / "bundle", n_threads=1)) as pair:
        delta = pair.delta(list(ids)).astype(np.float64)
    return np.asarray(delta - delta.mean(axis=1, keepdims=True))


def cosines(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))


@pytest.mark.parametrize("along", [(), ("one", "two")], ids=["gradient", "mean along a path"])
def test_the_products_delta_is_the_derivative_along_the_gradient(
    along: tuple[str, ...], made: Callable[[stages.Stage], Path]
) -> None:
    """Through a bundle and llama.cpp, against PyTorch in float64; on a text that gave no gradient. Median
    of the positions, and none far off; its size too, to 2%: the step ε is a finite one."""
    bundle = made(BundleStage(PROXY, HOLDOUT, along=tuple(RandomModel(seed) for seed in along)))
    parts = [unit_gradient(seed) for seed in (PROXY.seed, *along)]
    direction = [cast(torch.Tensor, sum(tensors) / len(parts)) for tensors in zip(*parts, strict=True)]
    for example in of(rows("fresh", 3)):
        found, exact = product_deltas(bundle, example.ids), derivatives(direction, example.ids)
        assert np.median(cosines(found, exact)) > 0.999
        assert cosines(found, exact).min() > 0.98
        assert np.median(np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)) == pytest.approx(1, abs=0.02)
    if along:
        alone = derivatives(parts[0], example.ids)
        assert np.median(cosines(found, alone)) < 0.99, "the gradients differ, so that the mean shows"


def test_the_laboratory_measures_that_cosine(made: Callable[[stages.Stage], Path]) -> None:
    stage = Exact(BundleStage(PROXY, HOLDOUT), cast(Any, PROXY), cast(Any, Written("fresh", 3)))
    found = json.loads((made(stage) / "exact.json").read_text())
    assert found["n"] == sum(len(e.ids) - e.n_prompt for e in of(rows("fresh", 3)))
    assert 0.999 < found["median"] <= 1
    assert 0.99 < found["p10"] <= found["median"]
    other = Exact(BundleStage(PROXY, HOLDOUT, random=0), cast(Any, PROXY), cast(Any, Written("fresh", 3)))
    assert abs(json.loads((made(other) / "exact.json").read_text())["median"]) < 0.5


def step_along(bundle: Path) -> np.ndarray[Any, Any]:
    """What the halves are apart by, in units of 2ε: all weights in the file's order."""
    plus, minus = (gguf.GGUFReader(bundle / "bundle" / f"proxy-{name}.gguf").tensors for name in ("plus", "minus"))
    parts = [np.array(p.data - m.data, dtype=np.float64).ravel() for p, m in zip(plus, minus, strict=True)]
    return np.concatenate(parts) / (2 * Metadata.open(bundle / "bundle").epsilon)


def test_random_directions_are_unit_directions_of_their_own(made: Callable[[stages.Stage], Path]) -> None:
    """In F32: a norm of 1 to 1e-3. Directions in n dimensions have a cosine of 0, to 5 / √n."""
    bundles = [made(BundleStage(PROXY, HOLDOUT, random=i)) for i in (None, 0, 1)]
    steps = [step_along(bundle) for bundle in bundles]
    for bundle, step in zip(bundles, steps, strict=True):
        metadata = Metadata.open(bundle / "bundle")
        assert metadata.fidelity_median > 0.99
        assert not metadata.forced
        assert np.linalg.norm(step) == pytest.approx(1, abs=1e-3)
    for a, b in itertools.combinations(steps, 2):
        assert abs(a @ b) < 5 / len(a) ** 0.5
    kurtosis = (steps[1] ** 4).mean() / (steps[1] ** 2).mean() ** 2
    assert kurtosis == pytest.approx(3, abs=0.2), "every weight has an equal part, as of a normal distribution"
    ids = of(rows("fresh", 1))[0].ids
    gradient, first, second = (product_deltas(bundle, ids) for bundle in bundles)
    assert np.abs(np.median(cosines(first, gradient))) < 0.5
    assert np.abs(np.median(cosines(first, second))) < 0.5


def test_gradients_of_a_stage_are_its_own(made: Callable[[stages.Stage], Path]) -> None:
    """What a stage computes, no other finds."""
    before = os.environ["ADLOCAL_CACHE"]
    cached = set(Path(before).rglob("*.safetensors"))
    bundle = made(BundleStage(PROXY, HOLDOUT))
    assert list((bundle / "cache").rglob("*.safetensors"))
    assert not (made(BundleStage(PROXY, HOLDOUT, random=3)) / "cache").exists()
    assert os.environ["ADLOCAL_CACHE"] == before
    assert set(Path(before).rglob("*.safetensors")) == cached


def test_traces_of_the_tests_are_as_the_task_has_them() -> None:
    """The made-up rows: right, wrong, whole and cut ones."""
    kinds = {(r["right"], r["finish_reason"]) for r in rows("made up", 12)}
    assert {right for right, _ in kinds} == {True, False}
    assert {reason for _, reason in kinds} == {"stop", "length"}
