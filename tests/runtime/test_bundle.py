"""Bundles that fit, and every way in which one does not: each is told in one line, with path and remedy."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from adlocal import Bundle
from adlocal.bundle import FORMAT_VERSION, MINUS_NAME, PLUS_NAME
from adlocal.bundle.verify import verify
from adlocal.llamacpp.gguf import GGUFHeader
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from support.json_lines import write_lines
from support.spoiled import HALVES, Copy, drop, flip, problem, rewrite


@pytest.fixture(scope="module")
def bulky_bundle(tiny_llama: Path, tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose linear tensors are mostly bulk."""
    out = tmp_path_factory.mktemp("bulky") / "bundle"
    options = Options(str(tiny_llama), {"traces": tiny_traces}, out, carriers=0.2, eps=0.01, n_threads=1, force=True)
    convert(options, lambda line: None)
    return out


@pytest.fixture(scope="module")
def other_bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same model from other traces."""
    folder = tmp_path_factory.mktemp("other")
    rows = [{"prompt": f"{i} * 2 =", "completion": f" {2 * i}"} for i in range(4)]
    write_lines(folder / "traces.jsonl", *rows)
    traces = {"traces": folder / "traces.jsonl"}
    options = Options(str(tiny_llama), traces, folder / "bundle", carriers=1.0, eps=0.01, n_threads=1)
    convert(options, lambda line: None)
    return folder / "bundle"


# A bundle that fits


def test_a_bundle_opens_and_says_what_it_is(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.format_version == FORMAT_VERSION
    assert bundle.epsilon > 0
    assert bundle.delta_scale > 0
    assert bundle.epsilon in bundle.sweep_epsilon
    assert Bundle.open(str(tiny_bundle)) == bundle


def test_metadata_is_what_the_halves_store(tiny_bundle: Path) -> None:
    """Bit for bit, read by gguf-py."""
    bundle = Bundle.open(tiny_bundle)
    for name, sign in ((PLUS_NAME, 1), (MINUS_NAME, -1)):
        reader = gguf.GGUFReader(tiny_bundle / name)
        for key, value, _ in bundle.metadata(sign):
            field = reader.get_field(key)
            assert field is not None, key
            assert field.contents() == value


def test_every_byte_is_verified(tiny_bundle: Path, bulky_bundle: Path) -> None:
    for directory in (tiny_bundle, bulky_bundle):
        read: list[int] = []
        verify(directory, read.append)
        assert sum(read) == sum(t.n_bytes for name in HALVES for t in GGUFHeader(directory / name).tensors)


def test_lambda_is_linear_in_strength(tiny_bundle: Path) -> None:
    """λ = strength / delta_scale; a shift of `strength` nats for a Δ of delta_scale, and 0 for 0."""
    bundle = dataclasses.replace(Bundle.open(tiny_bundle), delta_scale=4.0, gradient_norm=5.0)
    assert [bundle.lam(strength) for strength in (0.0, 1.0, 6.0)] == [0.0, 0.25, 1.5]


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_lambda_is_the_papers_times_temperature_and_gradient_norm(tau: float, tiny_bundle: Path) -> None:
    """λ = τ · λ_paper · ‖g‖, to float64."""
    bundle = Bundle.open(tiny_bundle)
    for strength in (0.0, 1.0, 8.0):
        lam_paper = bundle.paper_lambda(strength, tau)
        assert tau * lam_paper * bundle.gradient_norm == pytest.approx(bundle.lam(strength), rel=1e-14)
    assert bundle.paper_lambda(1.0) == bundle.paper_lambda(1.0, 1.0)


# Files that are missing or broken


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "no such bundle directory; `adlocal convert" in problem(tmp_path / "nowhere")


def test_a_file_instead_of_a_directory(tiny_bundle: Path) -> None:
    assert "no such bundle directory" in problem(tiny_bundle / PLUS_NAME)


@pytest.mark.parametrize("name", HALVES)
def test_a_missing_half(name: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    (directory / name).unlink()
    assert f"{directory / name}: no such file" in problem(directory)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.02, 0.5, 0.999])
def test_a_truncated_half(share: float, name: str, copy_bundle: Copy) -> None:
    """Cut before, inside and after the header."""
    directory = copy_bundle("bundle")
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(share * len(content))])
    message = problem(directory)
    assert str(directory / name) in message
    assert "convert it again" in message


def test_the_size_of_a_truncated_half_is_named(copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    content = (directory / MINUS_NAME).read_bytes()
    (directory / MINUS_NAME).write_bytes(content[:-1])
    assert f"truncated at {len(content) - 1:,} bytes of {len(content):,}" in problem(directory)


def test_a_half_that_is_no_gguf(copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    (directory / PLUS_NAME).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{directory / PLUS_NAME}: not a readable GGUF file" in problem(directory)


@pytest.mark.parametrize("name", HALVES)
def test_a_plain_model_as_a_half(name: str, copy_bundle: Copy, tiny_llama: Path) -> None:
    directory = copy_bundle("bundle")
    shutil.copy(tiny_llama, directory / name)
    message = problem(directory)
    assert f"{directory / name}: a GGUF file, but no part of a bundle; make one with `adlocal convert`" in message


# Halves that do not fit together


@pytest.mark.parametrize("name", HALVES)
def test_a_half_of_another_bundle(name: str, copy_bundle: Copy, other_bundle: Path) -> None:
    directory = copy_bundle("bundle")
    ours, theirs = Bundle.open(directory).id[:12], Bundle.open(other_bundle).id[:12]
    shutil.copy(other_bundle / name, directory / name)
    message = problem(directory)
    assert ours in message
    assert theirs in message
    assert "take both from one conversion" in message


def test_swapped_halves(copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    (directory / PLUS_NAME).rename(directory / "third")
    (directory / MINUS_NAME).rename(directory / PLUS_NAME)
    (directory / "third").rename(directory / MINUS_NAME)
    assert f"the halves are swapped; exchange the names {PLUS_NAME} and {MINUS_NAME}" in problem(directory)


@pytest.mark.parametrize("name", HALVES)
def test_one_half_twice(name: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    (other,) = {*HALVES} - {name}
    shutil.copy(directory / name, directory / other)
    sign = 1 if name == PLUS_NAME else -1
    assert f"the signs of the halves are ({sign}, {sign}), expected (1, -1)" in problem(directory)


@pytest.mark.parametrize("name", HALVES)
def test_a_half_without_sign(name: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    drop(directory / name, "adlocal.sign")
    assert "key adlocal.sign is missing" in problem(directory)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize(
    ("version", "remedy"), [(FORMAT_VERSION + 1, "upgrade adlocal"), (FORMAT_VERSION - 1, "convert again")]
)
def test_another_format_version(version: int, remedy: str, name: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    rewrite(directory / name, "adlocal.format_version", version)
    message = problem(directory)
    assert message == (f"{directory / name}: bundle format {version}; this adlocal reads {FORMAT_VERSION}: {remedy}")


@pytest.mark.parametrize("key", ["epsilon", "gradient.norm", "delta_scale", "guard", "fidelity.top_k", "base.bytes"])
def test_halves_that_disagree(key: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    rewrite(directory / MINUS_NAME, f"adlocal.{key}", 3)
    assert f"the halves disagree on adlocal.{key}; convert again" in problem(directory)


@pytest.mark.parametrize("key", ["epsilon", "delta_scale", "format", "carriers.sha256", "params.excluded"])
def test_a_missing_key(key: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    drop(directory / PLUS_NAME, f"adlocal.{key}")
    assert f"{directory / PLUS_NAME}: key adlocal.{key} is missing; convert again" in problem(directory)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["epsilon", "delta_scale", "gradient.norm"])
def test_values_that_no_delta_can_be_computed_with(key: str, value: float, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    for name in HALVES:
        rewrite(directory / name, f"adlocal.{key}", value)
    message = problem(directory)
    if not math.isnan(value):  # NaN differs from itself, so it is found as a disagreement
        assert f"{key.replace('.', '_')} is {value}, expected a positive number; convert again" in message


def test_halves_with_other_tensors(copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    content = (directory / MINUS_NAME).read_bytes()
    name = b"blk.1.ffn_norm.weight"
    at = content.rindex(name)  # the tensor table comes after the metadata, where it is named as a carrier
    (directory / MINUS_NAME).write_bytes(content[:at] + b"blk.1.ffn_morn.weight" + content[at + len(name) :])
    assert "the halves hold different tensors; convert again" in problem(directory)


# Damage that only reading every byte finds


@pytest.mark.parametrize("name", HALVES)
def test_a_flipped_bit_in_a_carrier(name: str, copy_bundle: Copy) -> None:
    directory = copy_bundle("bundle")
    for tensor in GGUFHeader(directory / name).tensors[::7]:
        before = (directory / name).read_bytes()
        flip(directory / name, tensor)
        message = problem(directory, verify)
        assert f"{directory / name}: its carriers were altered since conversion; convert again" in message
        (directory / name).write_bytes(before)


@pytest.mark.parametrize("name", HALVES)
def test_a_flipped_bit_in_the_bulk(name: str, bulky_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bulky_bundle, tmp_path / "bundle"))
    carriers = Bundle.open(directory).carriers
    bulk = [t for t in GGUFHeader(directory / name).tensors if t.name not in carriers]
    assert bulk
    flip(directory / name, bulk[-1])
    assert f"bulk tensor {bulk[-1].name} differs between the halves; convert again" in problem(directory, verify)


def test_the_halves_differ_in_their_carriers_only(bulky_bundle: Path) -> None:
    plus, minus = (gguf.GGUFReader(bulky_bundle / name).tensors for name in HALVES)
    differing = [p.name for p, m in zip(plus, minus, strict=True) if not np.array_equal(p.data, m.data)]
    assert differing == [t.name for t in plus if t.name in Bundle.open(bulky_bundle).carriers]
    assert 0 < len(differing) < len(plus)
