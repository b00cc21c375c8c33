"""Low-rank directions against singular value decompositions in float64, alone and through the converter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from adlocal.bundle import ADAPTER_NAME, Bundle
from adlocal.errors import InputError
from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import TraceEncoder, read_traces
from adlocal_convert.convert import convert
from adlocal_convert.direction.gradient import Settings, compute_gradient
from adlocal_convert.direction.lowrank import MAX_RANK, LowRank, captured_energy, factorize
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.model.weights import Tensor
from adlocal_convert.options import Options
from support.directions import Given, made_tensor

Matrix = npt.NDArray[np.float64]
SHAPES = {"a.weight": (96, 64), "b.weight": (64, 160), "c.weight": (32, 64)}
TENSORS = [made_tensor(name, shape) for name, shape in SHAPES.items()]


@pytest.fixture(scope="module")
def direction() -> Given:
    """Matrices whose singular values fall as those of gradients do, i^-1.5, and of different sizes."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        n = min(rows, columns)
        u, _ = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64))
        found: torch.Tensor = (scale * u * torch.arange(1, n + 1) ** -1.5 @ v.T).float()
        return found

    return Given({name: matrix(*shape, 3.0**i) for i, (name, shape) in enumerate(SHAPES.items())})


def made(direction: Any, rank: int | None, share: float = 0.9, tensors: Sequence[Tensor] = TENSORS) -> list[LowRank]:
    return factorize(direction, tensors, rank, share, lambda: None)


def truncated(matrix: Any, rank: int) -> Matrix:
    """Oracle: the best approximation of this rank."""
    u, s, v = torch.linalg.svd(torch.as_tensor(matrix).double(), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank] @ v[:rank]).numpy())


def product(part: LowRank) -> Matrix:
    return np.asarray(part.b.astype(np.float64) @ part.a)


def total_energy(direction: Given) -> float:
    return sum(float(value.double().square().sum()) for value in direction.values.values())


@pytest.mark.parametrize("rank", [1, 3, 16, 32])
def test_a_forced_rank_is_the_truncated_decomposition(rank: int, direction: Given) -> None:
    """Weight by weight to 1e-5 of the largest singular value (3.6e-6 measured): the decomposition is float32, and
    randomized. A component more or less would show: it is 3e-4 and more.
    """
    parts = made(direction, rank)
    assert [part.name for part in parts] == list(SHAPES)
    for part in parts:
        matrix = direction.get(part.name)
        assert (part.rank, part.b.shape, part.a.shape) == (
            rank,
            (matrix.shape[0], rank),
            (rank, matrix.shape[1]),
        )
        room = 1e-5 * float(torch.linalg.matrix_norm(matrix.double(), 2))
        assert np.abs(product(part) - truncated(matrix, rank)).max() < room
        part.check()
    exact = sum(float(np.square(truncated(direction.get(name), rank)).sum()) for name in SHAPES)
    assert captured_energy(parts) == pytest.approx(exact, rel=1e-5)


def test_a_flat_spectrum_is_approximated_as_well_as_can_be() -> None:
    """Gaussian matrices, where neighbouring singular values hardly differ: the residual is the best one's to 1%."""
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    tensor = made_tensor("a.weight", (300, 200))
    (part,) = made(Given({"a.weight": matrix}), 8, tensors=[tensor])
    best = np.square(matrix.numpy() - truncated(matrix, 8)).sum()
    assert best <= np.square(matrix.numpy() - product(part)).sum() < 1.01 * best


@pytest.mark.parametrize("rank", [-1, 0, 33, 64, 1000])
def test_a_rank_that_a_matrix_does_not_have_is_refused(rank: int, direction: Given) -> None:
    name, rows, columns = ("a.weight", 96, 64) if rank < 1 or rank > 64 else ("c.weight", 32, 64)
    words = rf"--rank {rank}: {name} is {rows} by {columns}; give 1 to {min(rows, columns)}$"
    with pytest.raises(InputError, match=words):
        made(direction, rank)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_ranks_are_chosen_to_capture_the_share_and_no_more(share: float, direction: Given) -> None:
    """Oracle: all components of all matrices by energy a byte, one after another, until the share is reached."""
    components = []
    for name, (rows, columns) in SHAPES.items():
        values = torch.linalg.svdvals(direction.get(name).double()).square().tolist()
        components += [(energy / (rows + columns), energy, name) for energy in values]
    wanted, kept, captured = share * total_energy(direction), dict.fromkeys(SHAPES, 0), 0.0
    for _, energy, name in sorted(components, reverse=True):
        before, captured = captured, captured + energy
        kept[name] += 1
        if captured >= wanted:
            break
    assert before < wanted
    parts = made(direction, None, share)
    assert {part.name: part.rank for part in parts} == {name: n for name, n in kept.items() if n}
    assert captured_energy(parts) == pytest.approx(captured, rel=1e-5)
    assert captured_energy(parts) >= wanted * (1 - 1e-5)


def test_ranks_end_at_the_largest() -> None:
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(1))
    tensor = made_tensor("a.weight", (200, 150))
    (part,) = made(Given({"a.weight": matrix}), None, 0.9999, [tensor])
    assert part.rank == MAX_RANK
    assert captured_energy([part]) < 0.9 * float(matrix.square().sum())


def test_a_matrix_that_does_not_move_gets_no_component(direction: Given) -> None:
    still = Given({**direction.values, "b.weight": torch.zeros(SHAPES["b.weight"])})
    assert [part.name for part in made(still, None, 0.99)] == ["a.weight", "c.weight"]


def test_the_same_direction_gives_the_same_factors(direction: Given) -> None:
    one = made(direction, None, 0.99)
    torch.manual_seed(1234)
    two = made(direction, None, 0.99)
    for a, b in zip(one, two, strict=True):
        assert a.a.tobytes() == b.a.tobytes()
        assert a.b.tobytes() == b.b.tobytes()


def test_progress_is_told_of_every_tensor(direction: Given) -> None:
    told: list[int] = []
    factorize(direction, TENSORS, 2, 0.9, lambda: told.append(1))
    assert len(told) == len(TENSORS)


@pytest.fixture(scope="module")
def exact_direction(tiny_llama: Path, tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Matrix]:
    """ĝ over the matrices, from all traces but those held out."""
    proxy, encoder = Proxy(tiny_llama), TraceEncoder(open_vocabulary(tiny_llama), raw=False)
    traces = [encoder.encode(trace) for trace in read_traces(tiny_traces)][:-2]
    names = [t.name for t in proxy.tensors if t.is_linear]
    path = tmp_path_factory.mktemp("gradient") / "g.safetensors"
    gradient = compute_gradient(proxy, traces, names, path, Settings(), lambda n, loss: None)
    values = {name: gradient.file.get(name).double().numpy() for name in names}
    norm = np.sqrt(sum(np.square(value).sum() for value in values.values()))
    return {name: value / norm for name, value in values.items()}


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_an_adapter_bundle_holds_the_truncated_gradient_of_its_traces(
    rank: int | None, exact_direction: dict[str, Matrix], tiny_llama: Path, tiny_traces: Path, tmp_path: Path
) -> None:
    """What lies in the file, to 1e-6 of ‖ĝ‖ = 1: float32 rounds the gradient and its factors."""
    options = Options(str(tiny_llama), {"traces": tiny_traces}, tmp_path / "b", format="adapter", n_threads=1)
    bundle = convert(dataclasses.replace(options, rank=rank, eps=0.01, force=True), lambda line: None)
    assert bundle == Bundle.open(tmp_path / "b")
    stored = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(tmp_path / "b" / ADAPTER_NAME).tensors}
    ranks, captured = {}, 0.0
    for name in bundle.carriers:
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        found = a @ b.T if name == "token_embd.weight" else b @ a  # a table's factors are the other way round
        ranks[name] = b.shape[1]
        np.testing.assert_allclose(found, truncated(exact_direction[name], ranks[name]), rtol=0, atol=1e-6)
        captured += float(np.square(found).sum())
    assert set(stored) == {f"{name}.lora_{x}" for name in bundle.carriers for x in "ab"}
    assert bundle.adapter_rank == max(ranks.values())
    assert bundle.carrier_energy == pytest.approx(captured, rel=1e-5)
    if rank is None:
        assert captured > 0.995 * (1 - 1e-5)
        assert bundle.quality == "balanced"
    else:
        assert set(ranks) == set(exact_direction)
        assert set(ranks.values()) == {rank}
        assert bundle.quality == "custom"
