"""Which types batch on a CPU, and what most of a file's weights are."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest

from adlocal.llamacpp.batching import Batching, cpu_features, has_batched_kernel
from adlocal.llamacpp.gguf import GGUFHeader, TensorInfo
from adlocal_convert.source.quantize import quantize
from support.paths import ROOT

X86 = frozenset({"AVX", "AVX2", "F16C", "LLAMAFILE", "REPACK"})
ARM = frozenset({"NEON", "DOTPROD", "LLAMAFILE", "REPACK"})


@pytest.mark.parametrize(
    ("features", "batched", "not_batched"),
    [
        (X86, "F32 F16 BF16 Q8_0 Q4_0 Q5_0 IQ4_NL Q4_K MXFP4", "Q4_1 Q5_1 Q2_K Q3_K Q5_K Q6_K IQ4_XS"),
        (X86 | {"AVX512"}, "Q2_K Q4_K", "Q4_1 Q5_1 Q5_K Q6_K"),
        (X86 | {"AVX512", "AVX512_VNNI", "AMX_INT8"}, "Q4_1 Q5_K Q6_K IQ4_XS", "Q5_1 Q3_K"),
        (X86 - {"REPACK"}, "Q4_0 Q8_0", "Q4_K"),
        (X86 - {"LLAMAFILE"}, "Q4_0 Q4_K", "Q5_0 Q8_0 F16"),
        (ARM, "F32 F16 Q8_0 Q4_0 Q4_K Q5_K Q6_K", "Q4_1 Q5_0 Q5_1 BF16"),
        (ARM | {"MATMUL_INT8"}, "Q4_1", "Q5_0 Q5_1"),
    ],
)
def test_kernels_follow_from_cpu_and_build(features: frozenset[str], batched: str, not_batched: str) -> None:
    assert [t for t in batched.split() if not has_batched_kernel(t, features)] == []
    assert [t for t in not_batched.split() if has_batched_kernel(t, features) is not False] == []


def test_the_documents_have_the_same_table() -> None:
    text, _, _ = (ROOT / "docs" / "types.md").read_text(encoding="utf-8").partition("## What it is worth")
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", text, re.M)
    ]
    columns = {
        "x86, AVX2": X86,
        "x86, AVX-512": X86 | {"AVX512"},
        "x86, AMX": X86 | {"AVX512", "AVX512_VNNI", "AMX_INT8"},
        "Arm, dot product": ARM,
        "Arm, i8mm": ARM | {"MATMUL_INT8"},
    }
    assert head == ["type", *columns]
    told = {
        (name, column): cell
        for types, *cells in rows
        for name in types.strip("*").split(", ")
        for column, cell in zip(columns, cells, strict=True)
    }
    assert len(told) == 16 * len(columns)
    for (name, column), cell in told.items():
        assert cell == ("yes" if has_batched_kernel(name, frozenset(columns[column])) else "no"), (name, column)


def test_of_another_cpu_nothing_is_said(tiny_llama: Path) -> None:
    features = frozenset({"RISCV_V", "REPACK", "LLAMAFILE"})
    found = Batching.of(GGUFHeader(tiny_llama).tensors, features)
    assert found == Batching("F32", None, None)
    assert found.note is None


def test_features_are_those_that_llamacpp_has(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b"CUDA : ARCHS = 900 | CPU : AVX = 1 | AVX2 = 0 | SVE_CNT = 16 | AVX512_VNNI = 1 | REPACK = 1 | "
    monkeypatch.setattr("llama_cpp.llama_print_system_info", lambda: said)
    assert cpu_features() == {"AVX", "AVX512_VNNI", "REPACK"}


@pytest.mark.parametrize(
    ("quant", "remedy"),
    [("Q4_0", None), ("Q4_1", "Q4_0"), ("Q5_0", None), ("Q5_1", "Q5_0"), ("Q8_0", None), ("F16", None), ("F32", None)],
)
def test_a_type_without_a_kernel_has_a_remedy_of_its_size(
    quant: str, remedy: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(tiny_llama, tmp_path / "q.gguf", quant, 1)
    found = Batching.of(GGUFHeader(tmp_path / "q.gguf").tensors, X86)
    assert found == Batching(quant, remedy is None, remedy)
    assert (found.note is None) == (remedy is None)
    if found.note:
        assert f"most weights are {quant}," in found.note
        assert found.note.endswith(f"--quant {remedy} has one")


def test_a_remedy_is_one_that_this_cpu_has() -> None:
    tensors = made_up({"blk.0.ffn_up.weight": ("Q5_1", 1)})
    assert Batching.of(tensors, ARM).remedy == "Q4_0"
    found = Batching.of(tensors, frozenset({"AVX"}))
    assert found.remedy is None
    assert found.note is not None
    assert "--quant" not in found.note


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": ("Q4_1", 3), "b": ("F16", 2)}, "Q4_1"),  # fewer bytes, more weights
        ({"a": ("Q4_1", 3), "b": ("F16", 2), "c": ("F16", 2)}, "F16"),
        ({"token_embd.weight": ("Q6_K", 3), "a": ("Q4_1", 2)}, "Q6_K"),  # tied: the head, too
        ({"token_embd.weight": ("Q6_K", 3), "output.weight": ("Q8_0", 1), "a": ("Q4_1", 2)}, "Q4_1"),
    ],
)
def test_most_weights_are_those_that_a_token_is_multiplied_with(
    tensors: dict[str, tuple[str, int]], expected: str
) -> None:
    assert Batching.of(made_up(tensors), X86).type == expected


def test_weights_are_counted_as_gguf_counts_them(tiny_llama: Path, tmp_path: Path) -> None:
    for quant in ("Q4_1", "Q8_0"):
        quantize(tiny_llama, tmp_path / "q.gguf", quant, 1)
        n_weights: Counter[str] = Counter()
        for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors:
            if t.name != "token_embd.weight":
                n_weights[t.tensor_type.name] += int(np.prod(t.shape))
        assert Batching.of(GGUFHeader(tmp_path / "q.gguf").tensors, X86).type == n_weights.most_common(1)[0][0]


def made_up(tensors: dict[str, tuple[str, int]]) -> list[TensorInfo]:
    """Tensors by name, of a type and thousands of blocks of 256 weights."""
    described = [(name, gguf.GGMLQuantizationType[kind], n) for name, (kind, n) in tensors.items()]
    sizes = {
        name: n * 256_000 // block * size for name, k, n in described for block, size in [gguf.GGML_QUANT_SIZES[k]]
    }
    return [TensorInfo(name, int(kind), 0, sizes[name]) for name, kind, _ in described]
