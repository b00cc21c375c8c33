"""From a proxy and traces to a bundle: what it says, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from adlocal.bundle import (
    ADAPTER,
    BASE_NAME,
    HALVES,
    NAMES,
    PLUS_NAME,
    SIGNS,
    Bundle,
)
from adlocal.bundle.calibration import CALIBRATION_NAME
from adlocal.bundle.choices import EXACT, NORMS
from adlocal.bundle.verify import verify
from adlocal.errors import AdlocalError, ConversionError, InputError, TraceError, VocabularyError
from adlocal.llamacpp import batching
from adlocal.llamacpp.batching import Batching
from adlocal.llamacpp.model import open_vocabulary
from adlocal.pair import ProxyPair
from adlocal.settings import DEFAULT_GUARD
from adlocal.traces import EncodedTrace, TraceEncoder, read_traces
from adlocal_convert import convert as convert_module
from adlocal_convert.bundle import candidate as candidate_module
from adlocal_convert.bundle.fidelity import Reference, delta_scale
from adlocal_convert.convert import convert
from adlocal_convert.direction import capabilities as capabilities_module
from adlocal_convert.direction import gradient as gradient_module
from adlocal_convert.direction.gradient import Gradient, Settings, compute_gradient
from adlocal_convert.direction.mixture import Mixture
from adlocal_convert.model.loss import directional_derivative, trace_losses
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options
from adlocal_convert.source.quantize import quantize
from support import tiny
from support.json_lines import read_lines, write_lines

Report = list[str]
WriteTraces = Callable[[list[dict[str, Any]]], Path]
EPSILON = 0.03  # within the linear range of the tiny model


@pytest.fixture
def options(tiny_llama: Path, tiny_traces: Path, tmp_path: Path) -> Options:
    """A conversion that works, at a fixed ε so that it takes a fraction of a second."""
    traces = {"traces": tiny_traces}
    return Options(str(tiny_llama), traces, tmp_path / "made" / "bundle", carriers=1.0, eps=EPSILON, n_threads=1)


@pytest.fixture
def adapter(options: Options) -> Options:
    """The same as an adapter."""
    return dataclasses.replace(options, format=ADAPTER, carriers=None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for gradients."""
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradients"


@pytest.fixture
def code_traces(tmp_path: Path) -> Path:
    """Traces of another kind."""
    rows = [{"prompt": f"def f{i}(x):", "completion": f" return x + {i}"} for i in range(6)]
    return write_lines(tmp_path / "code.jsonl", *rows)


@pytest.fixture
def write_traces(tmp_path: Path) -> WriteTraces:
    return lambda rows: write_lines(tmp_path / "own.jsonl", *rows)


def run(options: Options) -> tuple[Bundle, Report]:
    lines: Report = []
    return convert(options, lines.append), lines


def left_behind(options: Options) -> list[str]:
    """What lies in the directory in which the bundle was to be made."""
    parent = options.out.parent
    return sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encoded(options: Options, name: str = "traces") -> list[EncodedTrace]:
    encoder = TraceEncoder(open_vocabulary(options.proxy), raw=options.raw)
    return [encoder.encode(trace) for trace in read_traces(options.traces[name])]


def pairs(trace: EncodedTrace) -> list[tuple[int, bool]]:
    """Each token and whether it counts."""
    return list(zip(trace.tokens, trace.targets, strict=True))


def direction_of(proxy: Proxy, traces: list[EncodedTrace], params: str = "all") -> Mixture:
    """ĝ on traces, computed apart."""
    names = [t.name for t in proxy.tensors if params == "all" or t.is_linear == (params == "linear")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g.safetensors"
        return Mixture.of([compute_gradient(proxy, traces, names, path, Settings(), lambda n, loss: None)], [1], names)


def written_direction(out: Path, epsilon: float) -> dict[str, Any]:
    """(θ₊ − θ₋) / 2ε of F32 halves."""
    plus, minus = (
        {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(out / name).tensors} for name in NAMES[HALVES]
    )
    return {name: (plus[name] - minus[name]) / (2 * epsilon) for name in plus}


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    """‖one − two‖ over all tensors; what one lacks is zero."""
    zero = np.zeros(())
    return float(np.sqrt(sum(np.square(one.get(n, zero) - two.get(n, zero)).sum() for n in {**one, **two})))


def values_of(direction: Mixture) -> dict[str, Any]:
    return {name: direction.get(name).double().numpy() for name in direction.products}


def fails(*_args: object, **_kwargs: object) -> Any:
    raise RuntimeError("must not be called")


def test_a_bundle_says_what_it_was_made_from(options: Options) -> None:
    bundle, lines = run(options)
    assert bundle == Bundle.open(options.out)
    verify(options.out)
    traces, proxy = encoded(options), Proxy(Path(options.proxy))
    direction = direction_of(proxy, traces[:-2])  # a fifth is held out
    assert bundle.gradient_norm == pytest.approx(direction.norm, rel=1e-6)
    assert bundle.gradient_loss == pytest.approx(direction.loss, rel=1e-6)
    assert bundle.gradient_traces == 8
    assert bundle.gradient_tokens == sum(t.n_targets for t in traces[:-2])
    assert bundle.fidelity_positions == sum(t.n_targets for t in traces[-2:])
    assert bundle.epsilon == EPSILON
    assert (bundle.sweep_epsilon, bundle.sweep_median) == ([EPSILON], [bundle.fidelity_median])
    assert bundle.base_sha256 == sha256(Path(options.proxy))
    assert bundle.base_bytes == Path(options.proxy).stat().st_size
    assert bundle.capability_names == ["traces"]
    assert bundle.capability_sha256 == [sha256(options.traces["traces"])]
    assert (bundle.capability_norms, bundle.capability_losses) == ([bundle.gradient_norm], [bundle.gradient_loss])
    assert (bundle.capability_weights, bundle.capability_traces) == ([1.0], [8])
    assert bundle.capability_cosines == pytest.approx([1.0])
    assert set(bundle.carriers) == {t.name for t in proxy.tensors}
    assert (bundle.carrier_fraction, bundle.params, bundle.forced) == (1.0, "all", False)
    assert (bundle.format, bundle.quality, bundle.adapter_rank, bundle.params_excluded) == (HALVES, "custom", 0, [])
    assert bundle.carrier_energy == pytest.approx(1, rel=1e-6)
    assert bundle.converter.startswith("adlocal ")
    references = [Reference.of(proxy, direction, t) for t in traces[-2:]]
    with ProxyPair.open(options.out, n_ctx=64, n_threads=1) as pair:
        assert bundle.delta_scale == pytest.approx(delta_scale(pair, references, DEFAULT_GUARD), rel=1e-6)
    assert lines[0].startswith("traces: 8 traces with")
    assert lines[-1] == f"wrote {options.out}"


def test_halves_hold_the_gradient_of_their_traces(options: Options) -> None:
    """To 1e-4 of ‖ĝ‖ = 1: the difference of two float32 weights near 1 is exact to 6e-8 / ε each, 60,000 of them."""
    run(options)
    expected = values_of(direction_of(Proxy(Path(options.proxy)), encoded(options)[:-2]))
    assert distance(written_direction(options.out, EPSILON), expected) < 1e-4


@pytest.mark.parametrize("format", NAMES)
def test_every_key_is_in_both_files_with_its_type(format: str, options: Options, adapter: Options) -> None:
    options = adapter if format == ADAPTER else options
    bundle, _ = run(options)
    for name, sign in zip(NAMES[format], SIGNS[format], strict=True):
        fields = gguf.GGUFReader(options.out / name).fields
        for key, value, value_type in bundle.metadata(sign):
            stored = fields[key]
            found = stored.types[-1].name if value != [] else gguf.GGUFValueType(stored.parts[3][0]).name
            assert (found, stored.contents()) == (value_type, value), key
    assert left_behind(options) == ["bundle"]
    assert {p.name for p in options.out.iterdir()} == set(NAMES[format])
    assert {p.stat().st_mode & 0o777 for p in options.out.iterdir()} == {0o600}
    assert options.out.stat().st_mode & 0o777 == 0o700
    verify(options.out)


def test_requantized_proxy_is_the_base(options: Options, tmp_path: Path) -> None:
    """The gradient is taken at the weights of the requantized file, not of the one that was given."""
    quantized = tmp_path / "q8.gguf"
    quantize(Path(options.proxy), quantized, "Q8_0", 1)
    bundle, lines = run(dataclasses.replace(options, quant="q8_0", carriers=0.3))
    assert bundle.base_sha256 == sha256(quantized)
    assert bundle.base_bytes == quantized.stat().st_size
    learned = encoded(options)[:-2]
    there = direction_of(Proxy(quantized), learned)
    here = direction_of(Proxy(Path(options.proxy)), learned)
    assert bundle.gradient_norm == pytest.approx(there.norm, rel=1e-6)
    assert abs(here.norm / there.norm - 1) > 1e-5, "the two would not tell"
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(options.out / PLUS_NAME).tensors}
    assert set(types.values()) == {"F32", "F16", "Q8_0"}
    assert any("Q8_0" in line for line in lines)
    assert left_behind(options) == ["bundle"]


@pytest.mark.parametrize(
    ("format", "quant", "changes", "noted"),
    [
        (HALVES, "Q4_1", {}, True),
        (ADAPTER, "Q4_1", {}, True),
        (HALVES, "Q4_0", {}, False),
        (ADAPTER, "Q4_0", {}, False),
        (HALVES, "Q4_1", {"quality": EXACT}, False),
        (ADAPTER, "Q4_1", {"quality": EXACT}, False),
        (HALVES, "Q4_1", {"quality": EXACT, "params": NORMS}, True),
        (HALVES, "Q4_1", {"carriers": 0.3}, True),
        (HALVES, "Q4_1", {"carriers": 1.0}, False),
        (HALVES, "Q4_1", {"n_gpu_layers": 1}, False),
    ],
)
def test_a_type_without_a_batched_kernel_is_noted_before_the_gradient(
    format: str, quant: str, changes: dict[str, Any], noted: bool, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is said then is true of the file that is written in the end."""
    monkeypatch.setattr(batching, "cpu_features", lambda: frozenset({"AVX", "AVX2", "F16C", "LLAMAFILE"}))
    made = dataclasses.replace(options, format=format, quant=quant, carriers=None, force=True)
    bundle, lines = run(dataclasses.replace(made, **changes))
    notes = [(i, line) for i, line in enumerate(lines) if line.startswith("note: ")]
    assert len(notes) == noted
    for i, line in notes:
        assert i < next(j for j, other in enumerate(lines) if "‖g‖" in other)
        assert "Q4_1" in line
        assert line.endswith("--quant Q4_0 has one")
    if "n_gpu_layers" not in changes:
        assert (Batching.of(bundle.headers()[0].tensors).note is not None) == noted


def test_an_unknown_type_is_refused_with_those_there_are(options: Options) -> None:
    with pytest.raises(InputError, match=r"--quant Q9_Z: no such type; give one of .*Q4_K_M"):
        run(dataclasses.replace(options, quant="Q9_Z"))
    assert left_behind(options) == []


def test_messages_and_prompt_and_completion_give_the_same_bundle(options: Options, write_traces: WriteTraces) -> None:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def assistant(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    pairs = [(f"{i} + {i + 3} =", f" {2 * i + 3}") for i in range(10)]
    strings = run(options)[0]
    forms = (
        [{"messages": [user(p), assistant(c)]} for p, c in pairs],
        [{"prompt": [user(p)], "completion": [assistant(c)]} for p, c in pairs],
    )
    for rows in forms:
        bundle, _ = run(dataclasses.replace(options, traces={"traces": write_traces(rows)}, overwrite=True))
        assert bundle.carriers_sha256 == strings.carriers_sha256
        assert bundle.capability_sha256 != strings.capability_sha256
        assert bundle.id != strings.id


def test_raw_leaves_the_chat_template_out(options: Options) -> None:
    bundle, _ = run(dataclasses.replace(options, raw=True))
    rows = read_lines(options.traces["traces"])
    assert bundle.gradient_tokens == sum(len(row["completion"]) for row in rows[:-2])  # a byte a token
    assert run(dataclasses.replace(options, overwrite=True))[0].gradient_tokens > bundle.gradient_tokens


def test_sweep_chooses_the_best_of_what_it_measured(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert len(bundle.sweep_epsilon) >= 5
    assert bundle.fidelity_median == max(bundle.sweep_median)


def test_low_fidelity_is_refused_and_says_what_would_help(options: Options) -> None:
    """ε = 50 is far outside the linear range."""
    with pytest.raises(ConversionError, match=r"fidelity -?\d\.\d+ is under 0\.9: .*--eps auto, .*--force") as refused:
        run(dataclasses.replace(options, eps=50.0))
    assert refused.value.exit_status == 1
    assert left_behind(options) == []


def test_force_writes_it_and_marks_it(options: Options) -> None:
    bundle, _ = run(dataclasses.replace(options, eps=50.0, force=True))
    assert bundle.forced
    assert bundle.fidelity_median < 0.9
    assert Bundle.open(options.out).forced
    assert not run(dataclasses.replace(options, force=True, overwrite=True))[0].forced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carriers": -0.1}, r"--carriers -0\.1: give a share"),
        ({"carriers": 1.5}, r"--carriers 1\.5"),
        ({"carriers": float("nan")}, "--carriers nan"),
        ({"eps": 0.0}, r"--eps 0\.0: give a positive step, or auto"),
        ({"eps": -1.0}, "--eps -1"),
        ({"eps": float("nan")}, "--eps nan"),
        ({"eps": float("inf")}, "--eps inf"),
        ({"n_ctx": 1}, "--ctx-size 1"),
        ({"traces": {"traces": Path("nowhere.jsonl")}}, "nowhere.jsonl: cannot be read"),
        ({"proxy": "nowhere.gguf"}, "nowhere.gguf"),
        ({"mix": "code=1"}, r"--mix names 'code', and --traces gives traces; name one of those"),
        ({"mix": "traces=0"}, r"--mix traces=0: give a positive number"),
        ({"loss_on": "["}, r"--loss-on \[: no regular expression \(unterminated character set"),
        ({"loss_on": "€"}, "--loss-on €: found in no token of .*'s completions; give another"),
        ({"rank": 4}, "--rank is for --format adapter"),
        ({"format": ADAPTER}, r"--carriers is for --format halves"),
        ({"format": ADAPTER, "carriers": None, "params": "all"}, r"--params all: an adapter carries matrices alone"),
        ({"format": ADAPTER, "carriers": None, "params": "norms"}, r"--params norms: an adapter carries matrices"),
        ({"format": ADAPTER, "carriers": None, "rank": 0}, r"--rank 0: .* give 1 to \d+"),
        ({"format": ADAPTER, "carriers": None, "rank": 65}, r"--rank 65: \S+ is 264 by 64; give 1 to 64"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options: Options, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(options, **change))
    assert left_behind(options) == []


def test_an_existing_bundle_is_kept_without_overwrite(options: Options) -> None:
    run(options)
    before = {p.name: sha256(p) for p in options.out.iterdir()}
    with pytest.raises(InputError, match="holds a bundle already; give another --out, or say --overwrite"):
        run(dataclasses.replace(options, eps=0.02))
    assert {p.name: sha256(p) for p in options.out.iterdir()} == before
    assert run(dataclasses.replace(options, eps=0.02, overwrite=True))[0].epsilon == 0.02
    assert Bundle.open(options.out).epsilon == 0.02
    verify(options.out)
    assert left_behind(options) == ["bundle"]


def test_a_failed_overwrite_keeps_the_old_bundle(options: Options) -> None:
    old, _ = run(options)
    with pytest.raises(ConversionError):
        run(dataclasses.replace(options, eps=50.0, overwrite=True))
    assert Bundle.open(options.out) == old
    verify(options.out)
    assert left_behind(options) == ["bundle"]


def test_a_file_in_the_place_of_the_directory_is_refused(options: Options) -> None:
    options.out.parent.mkdir()
    options.out.write_text("mine")
    with pytest.raises(InputError, match="bundle is a file; give a directory for --out"):
        run(options)
    assert options.out.read_text() == "mine"


def test_a_parent_that_is_no_directory_is_an_error_of_one_line(options: Options) -> None:
    """As an unwritable parent is, which a superuser cannot try."""
    options.out.parent.write_text("a file")
    with pytest.raises(ConversionError, match=r"cannot write the bundle to \S+bundle: ") as refused:
        run(options)
    assert "\n" not in str(refused.value)
    assert options.out.parent.read_text() == "a file"


STAGES: dict[str, tuple[Any, str, int]] = {
    "quantize": (convert_module, HALVES, 0),
    "trace_losses": (gradient_module, HALVES, 1),
    "sweep": (convert_module, HALVES, 0),
    "write_half": (candidate_module, HALVES, 1),
    "factorize": (convert_module, ADAPTER, 0),
    "write_adapter": (candidate_module, ADAPTER, 1),
    "publish": (convert_module, ADAPTER, 0),
}


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("at", STAGES)
def test_whatever_fails_nothing_is_left(
    options: Options, adapter: Options, cache: Path, failure: BaseException, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some come in the middle: the second batch of the gradient, the second file written."""
    module, format, n_working = STAGES[at]
    original, n_calls = getattr(module, at), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls <= n_working:
            return original(*args, **kwargs)
        raise failure

    monkeypatch.setattr(module, at, fail)
    with pytest.raises(type(failure)):
        run(dataclasses.replace(adapter if format == ADAPTER else options, eps=None, quant="Q8_0"))
    assert n_calls == 1 + n_working
    assert left_behind(options) == []
    assert {p.suffix for p in cache.glob("*")} <= {".safetensors"}


@pytest.fixture
def limited() -> Iterator[None]:
    """The system refuses to let any file grow beyond 150,000 bytes, of 400,000 that gradient and halves need each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", NAMES)
def test_a_full_disk_is_told_in_one_line(
    format: str, options: Options, adapter: Options, tiny_bundle: Path, limited: None
) -> None:
    """For real. The gradient is there: it is the tiny bundle's."""
    with pytest.raises(ConversionError) as refused:
        run(adapter if format == ADAPTER else options)
    assert str(refused.value).startswith(f"cannot write the bundle to {options.out}: ")
    assert str(refused.value).endswith(("; is the disk full?", "File too large"))
    assert "\n" not in str(refused.value)
    assert left_behind(options) == []


def test_a_gradient_that_the_disk_does_not_take_is_told_in_one_line(
    options: Options, cache: Path, limited: None
) -> None:
    with pytest.raises(ConversionError, match=rf"^cannot write .*{cache}.*: File too large"):
        run(options)
    assert left_behind(options) == []


def test_a_gradient_that_the_disk_does_not_take_leaves_nothing(options: Options, cache: Path, limited: None) -> None:
    with pytest.raises(ConversionError):
        run(options)
    assert [p.name for p in cache.iterdir()] == []


def test_room_for_the_gradient_is_asked_for_before_it_is_computed(
    options: Options, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities_module, "compute_gradient", fails)
    n_bytes = 4 * sum(t.n_weights for t in Proxy(Path(options.proxy)).tensors)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=n_bytes - 1, f_frsize=1))
    words = rf"^{cache} has 0\.0 GB left and the gradient takes 0\.0 GB; free some, or .* ADLOCAL_CACHE$"
    with pytest.raises(ConversionError, match=words):
        run(options)
    assert left_behind(options) == []
    assert list(cache.iterdir()) == []


def test_the_number_of_cut_and_skipped_traces_is_said(options: Options, write_traces: WriteTraces) -> None:
    """With raw traces a byte is a token; the first is the BOS."""
    fits = [{"prompt": "1 +", "completion": f" {i} = more"} for i in range(6)]
    cut = [{"prompt": "2 + 2 =", "completion": letter * 60} for letter in "xy"]
    filled = [{"prompt": letter * 60, "completion": "z"} for letter in "uvw"]
    own = write_traces([*cut, *filled, *fits, *fits[:2]])
    bundle, lines = run(dataclasses.replace(options, traces={"sums": own}, raw=True, n_ctx=40))
    assert lines[0] == (
        f"sums: 7 traces with {bundle.gradient_tokens} tokens to learn from, 1 held out; 2 cut to the context; "
        "3 skipped, their prompts fill it; 2 duplicates, left out"
    )
    assert bundle.capability_names == ["sums"]
    assert bundle.gradient_traces == 7
    assert bundle.gradient_tokens == 2 * (40 - 8) + sum(len(row["completion"]) for row in fits[:5])


def test_context_is_no_longer_than_the_proxys(options: Options, write_traces: WriteTraces) -> None:
    own = write_traces([{"prompt": "a", "completion": letter * 300} for letter in "bcd"])
    bundle, lines = run(dataclasses.replace(options, traces={"traces": own}, raw=True))
    assert "; 3 cut to the context" in lines[0]
    assert bundle.gradient_tokens == 2 * (256 - 2)


def test_prompts_that_fill_the_context_are_refused(options: Options, write_traces: WriteTraces) -> None:
    own = write_traces([{"prompt": letter * 60, "completion": "z"} for letter in "abc"])
    with pytest.raises(TraceError, match="all 3 prompts fill the context of 40 tokens"):
        run(dataclasses.replace(options, traces={"traces": own}, n_ctx=40))


def test_one_trace_is_too_few(options: Options, write_traces: WriteTraces) -> None:
    own = write_traces([{"prompt": "1 +", "completion": " 2"}])
    with pytest.raises(InputError, match="1 usable trace; give at least 2, one is held out"):
        run(dataclasses.replace(options, traces={"traces": own}))


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_kind_of_model_converts_to_both_formats(
    architecture: str, tied: bool, format: str, options: Options, adapter: Options, tmp_path: Path
) -> None:
    """An adapter cannot move the table of a tied model, and says so; the derivative is without it, too."""
    model = tiny.tiny_model(architecture, tie_word_embeddings=tied)
    path = tiny.write_gguf(model, tmp_path / "proxy.gguf", tiny.CHAT_TEMPLATE)
    bundle, lines = run(dataclasses.replace(adapter if format == ADAPTER else options, proxy=str(path)))
    assert bundle == Bundle.open(options.out)
    assert (bundle.format, bundle.params) == (format, "linear" if format == ADAPTER else "all")
    assert bundle.fidelity_median > 0.99
    assert np.isfinite(bundle.delta_scale)
    excluded = ["token_embd.weight"] if tied and format == ADAPTER else []
    assert bundle.params_excluded == excluded
    assert any("not carried: token_embd.weight" in line for line in lines) == bool(excluded)
    assert not set(excluded) & set(bundle.carriers)
    verify(options.out)


# Several capabilities


def test_several_capabilities_are_mixed_by_weight(options: Options, code_traces: Path, cache: Path) -> None:
    """Oracle: each gradient computed apart, made a unit vector, weighted; the sum made a unit vector."""
    traces = {"sums": options.traces["traces"], "code": code_traces}
    options = dataclasses.replace(options, traces=traces, mix="code=1,sums=3")
    bundle, lines = run(options)
    proxy = Proxy(Path(options.proxy))
    apart = [direction_of(proxy, encoded(options, "sums")[:-2]), direction_of(proxy, encoded(options, "code")[:-1])]
    units = [values_of(direction) for direction in apart]
    total = {name: 0.75 * units[0][name] + 0.25 * units[1][name] for name in units[0]}
    length = distance(total, {})
    expected = {name: value / length for name, value in total.items()}
    assert distance(written_direction(options.out, EPSILON), expected) < 1e-4
    assert distance(expected, units[0]) > 0.05, "the weights would not tell"
    cosine = sum(float((units[0][name] * units[1][name]).sum()) for name in total)
    assert bundle.capability_cosines == pytest.approx([1, cosine, cosine, 1], rel=1e-5)
    assert bundle.capability_names == ["sums", "code"]
    assert bundle.capability_weights == [0.75, 0.25]
    assert bundle.capability_norms == pytest.approx([direction.norm for direction in apart], rel=1e-6)
    assert bundle.capability_losses == pytest.approx([direction.loss for direction in apart], rel=1e-6)
    assert bundle.capability_traces == [8, 5]
    assert bundle.gradient_traces == 13
    assert bundle.capability_sha256 == [sha256(path) for path in traces.values()]
    held_out = [*encoded(options, "sums")[-2:], *encoded(options, "code")[-1:]]
    assert bundle.fidelity_positions == sum(t.n_targets for t in held_out)
    assert bundle.fidelity_median > 0.99
    assert [line.partition(":")[0] for line in lines[:4]] == ["sums", "code"] * 2
    assert lines[2].endswith(", weight 0.75")
    assert len(list(cache.iterdir())) == 2
    equal, _ = run(dataclasses.replace(options, mix=None, overwrite=True))
    assert equal.capability_weights == [0.5, 0.5]
    assert equal.id != bundle.id


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("sums=1,prose=1", r"--mix names 'prose', and --traces gives sums, code; name one of those"),
        ("sums=1", "--mix sums=1: give a weight for code, too"),
        ("sums=1,code=-1", "--mix code=-1: give a positive number"),
        ("sums=1,code", "--mix code=: give a positive number"),
    ],
)
def test_a_mix_that_does_not_fit_is_refused_before_any_work(
    mix: str, message: str, options: Options, code_traces: Path, cache: Path
) -> None:
    traces = {"sums": options.traces["traces"], "code": code_traces}
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(options, traces=traces, mix=mix))
    assert not cache.exists()
    assert left_behind(options) == []


# Selections, qualities, formats


def test_the_loss_may_be_on_matching_tokens_alone(options: Options, write_traces: WriteTraces) -> None:
    """Oracle: the gradient on traces whose targets are picked by hand; with raw traces a byte is a token.

    Every token of the held-out traces is measured: it is where text will be sampled.
    """
    rows = [{"prompt": f"{i} +", "completion": f" {i} is {2 * i}"} for i in range(12)]
    own = write_traces([{"prompt": "say", "completion": "nothing"}, *rows])
    options = dataclasses.replace(options, traces={"sums": own}, raw=True)
    whole = [encoded(options, "sums")[i] for i in range(13)]
    digits = [
        dataclasses.replace(trace, targets=[c and t in b"0123456789" for t, c in pairs(trace)]) for trace in whole
    ]
    bundle, lines = run(dataclasses.replace(options, loss_on="[0-9]"))
    proxy = Proxy(Path(options.proxy))
    expected = values_of(direction_of(proxy, digits[1:-2]))
    assert distance(written_direction(options.out, EPSILON), expected) < 1e-4
    assert distance(values_of(direction_of(proxy, whole[1:-2])), expected) > 0.05, "the two would not tell"
    assert bundle.gradient_tokens == sum(trace.n_targets for trace in digits[1:-2])
    assert bundle.fidelity_positions == sum(trace.n_targets for trace in whole[-2:])
    assert bundle.capability_names == ["sums on /[0-9]/"]
    assert lines[0].endswith("2 held out; 1 left out, no token of them counts")


@pytest.mark.parametrize("params", ["linear", "norms"])
def test_a_selection_is_perturbed_and_measured_alone(params: str, options: Options) -> None:
    """Fidelity is against the derivative over the selection: with the whole one it would be another."""
    bundle, _ = run(dataclasses.replace(options, params=params))
    traces, proxy = encoded(options), Proxy(Path(options.proxy))
    names = {t.name for t in proxy.tensors if t.is_linear == (params == "linear")}
    assert (bundle.params, set(bundle.carriers)) == (params, names)
    part, whole = direction_of(proxy, traces[:-2], params), direction_of(proxy, traces[:-2])
    assert bundle.gradient_norm == pytest.approx(part.norm, rel=1e-6)
    assert abs(part.norm / whole.norm - 1) > 1e-4, "the two would not tell"
    found = written_direction(options.out, EPSILON)
    assert {name for name, value in found.items() if np.any(value)} == names
    assert distance(found, values_of(part)) < 1e-4
    assert bundle.fidelity_median > 0.99
    assert bundle.fidelity_slope == pytest.approx(1, abs=0.1)
    if params == "norms":
        own, full = (directional_derivative(proxy, direction, traces[-1])[1] for direction in (part, whole))
        assert float((own * full).sum() / (own.norm() * full.norm())) < 0.9, "the whole derivative would do"


def test_exact_quality_reaches_its_fidelity_or_refuses(options: Options) -> None:
    """ε = 0.16 gives 0.96: enough for the others."""
    coarse = dataclasses.replace(options, carriers=None, eps=0.16)
    with pytest.raises(ConversionError, match=r"fidelity 0\.9\d+ is under 0\.99: .*Try --eps auto, a wider proxy"):
        run(dataclasses.replace(coarse, quality="exact"))
    assert left_behind(options) == []
    bundle, _ = run(coarse)
    assert 0.9 < bundle.fidelity_median < 0.99
    assert (bundle.quality, bundle.forced) == ("balanced", False)
    exact = dataclasses.replace(coarse, quality="exact", overwrite=True)
    assert run(dataclasses.replace(exact, force=True))[0].forced
    bundle, _ = run(dataclasses.replace(exact, eps=None, quant="Q8_0"))
    assert bundle.fidelity_median >= 0.99
    assert (bundle.quality, bundle.carrier_fraction) == ("exact", 1.0)
    types = {t.tensor_type.name for t in gguf.GGUFReader(options.out / PLUS_NAME).tensors}
    assert types == {"F16", "F32"}


def test_the_base_of_an_exact_adapter_is_wide(adapter: Options) -> None:
    bundle, _ = run(dataclasses.replace(adapter, quality="exact", eps=None, quant="Q8_0"))
    assert bundle.fidelity_median >= 0.99
    assert bundle.carrier_energy > 0.9995 * (1 - 1e-5)
    types = {t.tensor_type.name for t in gguf.GGUFReader(adapter.out / BASE_NAME).tensors if len(t.shape) > 1}
    assert types == {"F16"}


@pytest.mark.parametrize("quality", ["small", "balanced"])
def test_size_and_what_is_carried_are_said_before_measuring(quality: str, options: Options) -> None:
    bundle, lines = run(dataclasses.replace(options, carriers=None, quality=quality, quant="Q8_0", force=True))
    said = next(i for i, line in enumerate(lines) if line.startswith("halves of "))
    assert f"{len(bundle.carriers)} tensors carry {bundle.carrier_energy:.1%}" in lines[said]
    assert said < lines.index("Δ through llama.cpp against the exact derivative:")
    largest = {"small": 1.10, "balanced": 1.25}[quality]
    for name in NAMES[HALVES]:
        metadata_and_padding = 8192
        assert (options.out / name).stat().st_size < largest * bundle.base_bytes + metadata_and_padding
    assert 0 < bundle.carrier_fraction < 1
    assert bundle.quality == quality


@pytest.mark.parametrize("first", NAMES)
def test_overwriting_by_the_other_format_leaves_nothing_of_the_first(
    first: str, options: Options, adapter: Options
) -> None:
    """An older calibration goes, too: it is of the bundle that is replaced."""
    old, new = (options, adapter) if first == HALVES else (adapter, options)
    run(old)
    (options.out / CALIBRATION_NAME).write_bytes(b"old")
    (options.out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds a bundle already"):
        run(new)
    assert (options.out / CALIBRATION_NAME).exists()
    bundle, _ = run(dataclasses.replace(new, overwrite=True))
    assert {p.name for p in options.out.iterdir()} == {*NAMES[new.format], "notes.txt"}
    assert Bundle.open(options.out) == bundle
    run(dataclasses.replace(new, overwrite=True))


# Saved gradients


def test_a_saved_gradient_is_reused(
    options: Options, adapter: Options, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another bundle, another format and a selection; not with other traces or another base."""
    first, _ = run(options)
    (saved,) = cache.iterdir()
    assert saved.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    linear = direction_of(Proxy(Path(options.proxy)), encoded(options)[:-2], "linear")
    monkeypatch.setattr(capabilities_module, "compute_gradient", fails)
    again, _ = run(dataclasses.replace(options, overwrite=True))
    assert again == first
    smaller, _ = run(dataclasses.replace(options, carriers=0.3, force=True, overwrite=True))
    assert (smaller.gradient_norm, smaller.gradient_loss) == (first.gradient_norm, first.gradient_loss)
    other, _ = run(dataclasses.replace(adapter, overwrite=True))
    assert other.gradient_norm == pytest.approx(linear.norm, rel=1e-6)
    for changes in ({"raw": True}, {"n_ctx": 30}, {"quant": "Q8_0"}):
        with pytest.raises(RuntimeError, match="must not be called"):
            run(dataclasses.replace(options, overwrite=True, **changes))


def test_a_gradient_over_a_selection_serves_no_other(
    options: Options, adapter: Options, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(adapter)
    monkeypatch.setattr(capabilities_module, "compute_gradient", fails)
    run(dataclasses.replace(options, params="linear", overwrite=True))
    for params in ("all", "norms"):
        with pytest.raises(RuntimeError, match="must not be called"):
            run(dataclasses.replace(options, params=params, overwrite=True))


@pytest.mark.parametrize("spoil", ["cut", "garbage", "empty"])
def test_a_spoilt_gradient_is_computed_again(spoil: str, options: Options, cache: Path) -> None:
    first, _ = run(options)
    (saved,) = cache.iterdir()
    content = saved.read_bytes()
    saved.write_bytes({"cut": content[:-100], "garbage": b"\1\2\3" * 1000, "empty": b""}[spoil])
    assert run(dataclasses.replace(options, overwrite=True))[0] == first
    assert saved.read_bytes() == content


def test_an_interrupted_conversion_goes_on_with_its_gradient(
    options: Options, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(options, batch_size=1)
    monkeypatch.setattr(gradient_module, "SAVE_SECONDS", 0.0)
    original, n_calls, last = trace_losses, 0, 6

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == last:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(gradient_module, "trace_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert left_behind(options) == []
    n_calls, last = 0, -1
    bundle, _ = run(options)
    assert n_calls < 8, "it began anew"
    (saved,) = cache.iterdir()
    assert saved.suffix == ".safetensors"
    expected = direction_of(Proxy(Path(options.proxy)), encoded(options)[:-2])
    assert bundle.gradient_norm == pytest.approx(expected.norm, rel=1e-6)
    assert bundle.gradient_loss == pytest.approx(expected.loss, rel=1e-6)
    assert bundle.gradient_traces == 8
    assert distance(written_direction(options.out, EPSILON), values_of(expected)) < 1e-4


@pytest.mark.parametrize("changes", [{"low_memory": True}, {"batch_size": 1}, {"batch_size": 100}], ids=str)
def test_memory_and_batches_do_not_change_the_bundle(
    changes: dict[str, Any], options: Options, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rounding: gradients to 1e-6 of their norm."""
    one, _ = run(options)
    (path,) = cache.iterdir()
    usual = Gradient.open(path)
    monkeypatch.setenv("ADLOCAL_CACHE", str(cache / "other"))
    two, _ = run(dataclasses.replace(options, overwrite=True, **changes))
    (path,) = (cache / "other" / "gradients").iterdir()
    other = Gradient.open(path)
    assert usual is not None
    assert other is not None
    values = [{name: g.file.get(name).double().numpy() for name in g.file} for g in (usual, other)]
    assert distance(*values) < 1e-6 * distance(values[0], {})
    for name in ("gradient_norm", "gradient_loss", "delta_scale", "fidelity_median"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), name
    assert two.gradient_tokens == one.gradient_tokens


def test_every_failure_is_an_error_of_adlocal(options: Options) -> None:
    """So that the command tells it in a line: here a proxy that is a directory, and traces that are one."""
    directory = options.traces["traces"].parent
    for changes in ({"proxy": str(directory)}, {"traces": {"traces": directory}}):
        wrong: Options = dataclasses.replace(options, **changes)
        with pytest.raises(AdlocalError):
            run(wrong)


def test_a_teacher_with_other_tokens_is_refused_before_any_work(options: Options, tmp_path: Path) -> None:
    """A GGUF proxy brings its own tokenizer; --teacher proves that it is the teacher's."""
    pieces = [*tiny.BYTES[:7], "other", *tiny.BYTES[8:]]
    other = tiny.write_gguf(tiny.tiny_model(), tmp_path / "other.gguf", tiny.CHAT_TEMPLATE, pieces)
    with pytest.raises(VocabularyError, match="token 7"):
        run(dataclasses.replace(options, teacher=other))
    assert left_behind(options) == []
    assert run(dataclasses.replace(options, teacher=Path(options.proxy)))[0].fidelity_median > 0.99
