"""From a proxy and traces to a bundle: what it says, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from adlocal_convert import convert as convert_module
from adlocal_convert import gradient as gradient_module
from adlocal_convert.convert import Options, convert
from adlocal_convert.fidelity import Reference, delta_scale
from adlocal_convert.gradient import Gradient
from adlocal_convert.proxy import Proxy
from adlocal_convert.quantize import quantize

from adlocal.bundle import DEFAULT_GUARD, MINUS_NAME, PLUS_NAME, Bundle, verify
from adlocal.errors import AdlocalError, ConversionError, InputError, TraceError
from adlocal.pair import ProxyPair
from adlocal.traces import EncodedTrace, TraceEncoder, open_vocabulary, read_traces

Report = list[str]
EPSILON = 0.03  # within the linear range of the tiny model


@pytest.fixture
def options(tiny_llama: Path, tiny_traces: Path, tmp_path: Path) -> Options:
    """A conversion that works, at a fixed ε so that it takes a fraction of a second."""
    return Options(tiny_llama, tiny_traces, tmp_path / "made" / "bundle", carriers=1.0, eps=EPSILON, n_threads=1)


@pytest.fixture
def write_traces(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def run(options: Options) -> tuple[Bundle, Report]:
    lines: Report = []
    return convert(options, lines.append), lines


def left_behind(options: Options) -> list[str]:
    """What lies in the directory in which the bundle was to be made."""
    parent = options.out.parent
    return sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encoded(options: Options) -> list[EncodedTrace]:
    encoder = TraceEncoder(open_vocabulary(options.proxy), raw=options.raw)
    return [encoder.encode(trace) for trace in read_traces(options.traces)]


def test_a_bundle_says_what_it_was_made_from(options: Options) -> None:
    bundle, lines = run(options)
    assert bundle == Bundle.open(options.out)
    verify(options.out)
    traces, proxy = encoded(options), Proxy(options.proxy)
    gradient = Gradient.of(proxy.model, traces[:-2], lambda loss: None)  # a fifth is held out
    assert bundle.gradient_norm == pytest.approx(gradient.norm, rel=1e-6)
    assert bundle.gradient_loss == pytest.approx(gradient.loss, rel=1e-6)
    assert bundle.gradient_traces == 8
    assert bundle.gradient_tokens == sum(t.n_targets for t in traces[:-2])
    assert bundle.fidelity_positions == sum(t.n_targets for t in traces[-2:])
    assert bundle.epsilon == EPSILON
    assert (bundle.sweep_epsilon, bundle.sweep_median) == ([EPSILON], [bundle.fidelity_median])
    assert bundle.base_sha256 == sha256(options.proxy)
    assert bundle.base_bytes == options.proxy.stat().st_size
    assert bundle.traces_sha256 == sha256(options.traces)
    assert set(bundle.carriers) == {t.name for t in proxy.tensors}
    assert (bundle.carrier_fraction, bundle.params, bundle.forced) == (1.0, "all", False)
    assert bundle.carrier_energy == pytest.approx(1, rel=1e-6)
    assert bundle.converter.startswith("adlocal ")
    references = [Reference.of(proxy, gradient, t) for t in traces[-2:]]
    with ProxyPair.open(options.out, n_ctx=64, n_threads=1) as pair:
        assert bundle.delta_scale == pytest.approx(delta_scale(pair, references, DEFAULT_GUARD), rel=1e-6)
    assert "8 traces with" in lines[0]
    assert lines[-1] == f"wrote {options.out}"


def test_every_key_is_in_both_halves_with_its_type(options: Options) -> None:
    bundle, _ = run(options)
    for name, sign in ((PLUS_NAME, 1), (MINUS_NAME, -1)):
        fields = gguf.GGUFReader(options.out / name).fields
        for key, value, kind in bundle.metadata(sign):
            assert fields[key].types[-1].name == kind, key
            assert fields[key].contents() == value, key
    assert left_behind(options) == ["bundle"]
    assert sorted(p.name for p in options.out.iterdir()) == [MINUS_NAME, PLUS_NAME]
    assert {p.stat().st_mode & 0o777 for p in options.out.iterdir()} == {0o600}
    assert options.out.stat().st_mode & 0o777 == 0o700


def test_requantized_proxy_is_the_base(options: Options, tmp_path: Path) -> None:
    """The gradient is taken at the weights of the requantized file, not of the one that was given."""
    quantized = tmp_path / "q8.gguf"
    quantize(options.proxy, quantized, "Q8_0", 1)
    bundle, lines = run(dataclasses.replace(options, quant="q8_0", carriers=0.3))
    assert bundle.base_sha256 == sha256(quantized)
    assert bundle.base_bytes == quantized.stat().st_size
    learned = encoded(options)[:-2]
    there = Gradient.of(Proxy(quantized).model, learned, lambda loss: None)
    here = Gradient.of(Proxy(options.proxy).model, learned, lambda loss: None)
    assert bundle.gradient_norm == pytest.approx(there.norm, rel=1e-6)
    assert abs(here.norm / there.norm - 1) > 1e-5, "the two would not tell"
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(options.out / PLUS_NAME).tensors}
    assert set(types.values()) == {"F32", "F16", "Q8_0"}
    assert any("Q8_0" in line for line in lines)
    assert left_behind(options) == ["bundle"]


def test_an_unknown_type_is_refused_with_those_there_are(options: Options) -> None:
    with pytest.raises(InputError, match=r"--quant Q9_Z: no such type; give one of .*Q4_K_M"):
        run(dataclasses.replace(options, quant="Q9_Z"))
    assert left_behind(options) == []


def test_messages_and_prompt_and_completion_give_the_same_bundle(
    options: Options, write_traces: Callable[[list[dict[str, Any]]], Path]
) -> None:
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
        bundle, _ = run(dataclasses.replace(options, traces=write_traces(rows), overwrite=True))
        assert bundle.plus_sha256 == strings.plus_sha256
        assert bundle.traces_sha256 != strings.traces_sha256
        assert bundle.id != strings.id


def test_raw_leaves_the_chat_template_out(options: Options) -> None:
    bundle, _ = run(dataclasses.replace(options, raw=True))
    rows = [json.loads(line) for line in options.traces.read_text().splitlines()]
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
        ({"traces": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
        ({"proxy": Path("nowhere.gguf")}, "nowhere.gguf"),
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


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("at", ["Gradient.of", "sweep", "write_half", "_publish", "quantize"])
def test_whatever_fails_nothing_is_left(
    options: Options, failure: BaseException, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comes in the middle: the second trace of the gradient, the second half written."""
    module, name = (gradient_module, "trace_loss") if at == "Gradient.of" else (convert_module, at)
    original, n_calls = getattr(module, name), 0
    first_works = at in ("Gradient.of", "write_half")

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1 and first_works:
            return original(*args, **kwargs)
        raise failure

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(failure)):
        run(dataclasses.replace(options, eps=None, quant="Q8_0"))
    assert n_calls == 1 + first_works
    assert left_behind(options) == []


def test_a_full_disk_is_told_in_one_line(options: Options) -> None:
    """For real: the system refuses to let any file grow beyond 150,000 bytes, of 400,000 that a half needs."""
    command = [sys.executable, "-m", "adlocal", "convert", str(options.proxy), "--traces", str(options.traces)]
    command += ["--out", str(options.out), "--eps", str(EPSILON), "--carriers", "1", "-t", "1"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"adlocal convert: cannot write the bundle to {options.out}: ")
    assert last.endswith(("; is the disk full?", "File too large"))
    assert "Traceback" not in done.stderr
    assert left_behind(options) == []


def test_the_number_of_cut_and_skipped_traces_is_said(
    options: Options, write_traces: Callable[[list[dict[str, Any]]], Path]
) -> None:
    """With raw traces a byte is a token; the first is the BOS."""
    fits = [{"prompt": "1 +", "completion": f" {i} = more"} for i in range(6)]
    cut = [{"prompt": "2 + 2 =", "completion": "x" * 60}] * 2
    filled = [{"prompt": "y" * 60, "completion": "z"}] * 3
    own = write_traces([*cut, *filled, *fits])
    bundle, lines = run(dataclasses.replace(options, traces=own, raw=True, n_ctx=40))
    assert lines[0] == (
        f"7 traces with {bundle.gradient_tokens} tokens to learn from, 1 held out; 2 cut to the context; "
        "3 skipped, their prompts fill it"
    )
    assert bundle.gradient_traces == 7
    assert bundle.gradient_tokens == 2 * (40 - 8) + sum(len(row["completion"]) for row in fits[:5])


def test_context_is_no_longer_than_the_proxys(
    options: Options, write_traces: Callable[[list[dict[str, Any]]], Path]
) -> None:
    rows = [{"prompt": "a", "completion": "b" * 300}] * 3
    bundle, lines = run(dataclasses.replace(options, traces=write_traces(rows), raw=True))
    assert "; 3 cut to the context" in lines[0]
    assert bundle.gradient_tokens == 2 * (256 - 2)


def test_prompts_that_fill_the_context_are_refused(
    options: Options, write_traces: Callable[[list[dict[str, Any]]], Path]
) -> None:
    rows = [{"prompt": "y" * 60, "completion": "z"}] * 3
    with pytest.raises(TraceError, match="all 3 prompts fill the context of 40 tokens"):
        run(dataclasses.replace(options, traces=write_traces(rows), n_ctx=40))


def test_one_trace_is_too_few(options: Options, write_traces: Callable[[list[dict[str, Any]]], Path]) -> None:
    with pytest.raises(InputError, match="1 usable trace; give at least 2, one is held out"):
        run(dataclasses.replace(options, traces=write_traces([{"prompt": "1 +", "completion": " 2"}])))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_supported_kind_of_model_converts(
    architecture: str, tied: bool, options: Options, tmp_path: Path
) -> None:
    model = tiny.tiny_model(architecture, tie_word_embeddings=tied)
    path = tiny.write_gguf(model, tmp_path / "proxy.gguf", tiny.CHAT_TEMPLATE)
    bundle, _ = run(dataclasses.replace(options, proxy=path))
    assert bundle.fidelity_median > 0.99
    assert np.isfinite(bundle.delta_scale)


def test_every_failure_is_an_error_of_adlocal(options: Options) -> None:
    """So that the command tells it in a line: here a proxy that is a directory, and traces that are one."""
    directory = options.traces.parent
    for wrong in (dataclasses.replace(options, proxy=directory), dataclasses.replace(options, traces=directory)):
        with pytest.raises(AdlocalError):
            run(wrong)
