"""The `adlocal` command: what it prints, what it refuses and with which exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import adlocal
from adlocal.bundle import MINUS_NAME, NAMES, PLUS_NAME, Bundle
from adlocal.llamacpp import batching
from support import tiny
from support.cli import Cli, Done, only_line, refused
from support.json_lines import write_lines

VERBS = ("traces", "convert", "inspect", "generate", "calibrate", "score", "run", "engine", "bench", "demo")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a bundle is to be made, in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


# convert


def other_architecture(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unusable_proxies_are_refused(cli: Cli, tiny_llama: Path, tiny_traces: Path, tmp_path: Path, out: Path) -> None:
    whole = tiny_llama.read_bytes()
    for name, data in {"head": whole[:3000], "tail": whole[:-1000], "noise": b"GGUF" + b"\1\2\3" * 99}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    for proxy, words in {
        tmp_path / "nowhere.gguf": ("nowhere.gguf: no such file or directory, and no hub id; give a GGUF",),
        tmp_path: (f"{tmp_path}: ", "give --teacher TEACHER.gguf"),
        tmp_path / "head.gguf": ("head.gguf: not a readable GGUF file (failed to read key-value pairs)",),
        tmp_path / "tail.gguf": ("tail.gguf: truncated at", "download or convert it again"),
        tmp_path / "noise.gguf": ("noise.gguf: not a readable GGUF file",),
        other_architecture(tmp_path / "gpt2.gguf"): ("architecture gpt2 is not supported; give one of llama, qwen2,",),
    }.items():
        done = cli("convert", proxy, "--traces", tiny_traces, "--out", out)
        refused(done, "convert", *words)
        only_line(done)
    assert list(out.parent.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(cli: Cli, tiny_traces: Path, tmp_path: Path, out: Path) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    path = tiny.write_gguf(model, tmp_path / "nan.gguf", tiny.CHAT_TEMPLATE)
    done = cli("convert", path, "--traces", tiny_traces, "--out", out, "-t", 1)
    refused(done, "convert", "tensor output_norm.weight holds NaN or infinite weights")
    assert list(out.parent.iterdir()) == []


GOOD = {"prompt": "1 + 1 =", "completion": " 2"}


@pytest.mark.parametrize("verb", ["convert", "score"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, GOOD, '{"prompt": "1'], ("t.jsonl:3: broken JSON at column 12",)),
        ([GOOD, "", "[1]"], ("t.jsonl:3: expected a JSON object, found list",)),
        ([GOOD, {"prompt": "1", "completion": "  "}], ("t.jsonl:2: the completion is empty; remove the line",)),
        ([GOOD, {"question": "1"}], ("t.jsonl:2: has ['question']",)),
        ([], ("t.jsonl: no traces; give lines like",)),
        ([{"prompt": "x" * 300, "completion": y} for y in "abc"], ("all 3 prompts fill the context of 256 tokens",)),
    ],
    ids=["broken JSON", "no object", "empty completion", "other keys", "empty file", "too long"],
)
def test_unusable_traces_are_refused(
    verb: str, rows: list[Any], words: tuple[str, ...], cli: Cli, tiny_llama: Path, tiny_bundle: Path, out: Path
) -> None:
    traces = write_lines(out.parent.parent / "t.jsonl", *rows)
    argv = {
        "convert": ["convert", tiny_llama, "--traces", traces, "--out", out],
        "score": ["score", "--bundle", tiny_bundle, traces, "-c", 256],
    }
    done = cli(*argv[verb], "-t", 1)
    refused(done, verb, *words)
    only_line(done)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--carriers", "2"], ["--carriers 2.0: give a share of the linear weights"]),
        (["--carriers", "nan"], ["--carriers nan"]),
        (["--carriers", "much"], ["--carriers", "'much'", "adlocal convert --help"]),
        (["--eps", "0"], ["--eps 0.0: give a positive step, or auto"]),
        (["--eps=-1"], ["--eps -1.0"]),
        (["--eps", "inf"], ["--eps inf"]),
        (["--eps", "small"], ["--eps", "small: give a positive number, or auto"]),
        (["--quant", "Q9_Z"], ["--quant Q9_Z: no such type; give one of", "Q4_K_M"]),
        (["-c", "1"], ["--ctx-size 1: give at least 2 tokens"]),
        (["-t", "none"], ["-t/--threads", "none: give a whole number from 1 up"]),
        (["--color"], ["--color"]),
    ],
    ids=lambda v: " ".join(v) if v[0].startswith("-") else "",
)
def test_wrong_options_of_convert_are_refused(
    argv: list[str], words: list[str], cli: Cli, tiny_llama: Path, tiny_traces: Path, out: Path
) -> None:
    done = cli("convert", tiny_llama, "--traces", tiny_traces, "--out", out, *argv)
    if argv == ["--color"]:  # argparse leaves what it does not know to the parser above
        assert (done.status, done.out) == (2, "")
        assert "unrecognized arguments: --color" in done.message()
    else:
        refused(done, "convert", *words)
    assert list(out.parent.iterdir()) == []


def test_convert_makes_a_bundle_and_says_what_it_is(cli: Cli, tiny_llama: Path, tiny_traces: Path, out: Path) -> None:
    argv = ["convert", tiny_llama, "--traces", tiny_traces, "--out", out, "--carriers", "1", "-t", "1"]
    done = cli(*argv, "--eps", "0.03", "--json")
    assert done.status == 0
    report, bundle = json.loads(done.out), Bundle.open(out)
    assert (report["id"], report["epsilon"], report["files_fit"]) == (bundle.id, 0.03, True)
    assert report["bytes"] == {name: (out / name).stat().st_size for name in (PLUS_NAME, MINUS_NAME)}
    assert "8 traces with" in done.err
    assert f"wrote {out}" in done.err
    assert json.loads(cli("inspect", out, "--json").out) == report

    refused(cli(*argv), "convert", "holds a bundle already; give another --out, or say --overwrite")
    done = cli(*argv, "--eps", "0.02", "--overwrite")
    assert (done.status, done.out) == (0, "")
    assert Bundle.open(out).epsilon == 0.02
    refused(cli(*argv, "--eps", "50", "--overwrite"), "convert", "fidelity", "--force", status=1)
    assert Bundle.open(out).epsilon == 0.02
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


# inspect, score, generate, bench


@pytest.mark.parametrize("format", NAMES)
def test_convert_says_that_a_type_does_not_batch(
    format: str, cli: Cli, tiny_llama: Path, tiny_traces: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "cpu_features", lambda: frozenset({"AVX", "AVX2", "F16C", "LLAMAFILE"}))
    argv = ["convert", tiny_llama, "--traces", tiny_traces, "--out", out, "--quant", "Q5_1", "--format", format]
    done = cli(*argv, "--eps", "0.03", "--force", "--json", "-t", "1")
    assert done.status == 0
    assert json.loads(done.out)["batching"] == {"type": "Q5_1", "batched": False, "remedy": "Q5_0"}
    note = "most weights are Q5_1, for which llama.cpp has no batched CPU kernel here"
    assert f"note: {note}" in done.err
    assert note in cli("inspect", out).out


def test_inspect_is_a_page_and_an_object(cli: Cli, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    page = cli("inspect", tiny_bundle)
    assert page.status == 0
    for part in (bundle.id[:16], "fit together", f"{bundle.gradient_norm:.4f}", f"{bundle.fidelity_median:.4f}"):
        assert part in page.out
    assert sum(line.lstrip().startswith("* ") for line in page.out.splitlines()) == 1, "one ε was chosen"
    found = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert found["files_fit"] is True
    assert found["sweep_epsilon"] == bundle.sweep_epsilon
    assert found["carriers"] == bundle.carriers
    assert found["paper_lambda_at_strength_1"] == pytest.approx(1 / bundle.delta_scale / bundle.gradient_norm)


@pytest.mark.parametrize("verb", ["inspect", "score", "generate", "bench"])
def test_unusable_bundles_are_refused(
    verb: str, cli: Cli, tiny_llama: Path, tiny_traces: Path, copy_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    def argv(bundle: Path) -> list[object]:
        return {
            "inspect": ["inspect", bundle],
            "score": ["score", "--bundle", bundle, tiny_traces],
            "generate": ["generate", "-m", tiny_llama, "--bundle", bundle, "-p", "1"],
            "bench": ["bench", "-m", tiny_llama, "--bundle", bundle],
        }[verb]

    swapped, missing, cut = (copy_bundle(name) for name in ("swapped", "missing", "cut"))
    (swapped / PLUS_NAME).rename(swapped / "spare")
    (swapped / MINUS_NAME).rename(swapped / PLUS_NAME)
    (swapped / "spare").rename(swapped / MINUS_NAME)
    (missing / MINUS_NAME).unlink()
    (cut / PLUS_NAME).write_bytes((cut / PLUS_NAME).read_bytes()[:-5000])
    for bundle, words in {
        swapped: "the halves are swapped; exchange the names",
        missing: f"{MINUS_NAME}: no such file",
        cut: f"{PLUS_NAME}: truncated at",
        tmp_path / "nowhere": "no such bundle directory; `adlocal convert PROXY.gguf --out DIR` makes one",
    }.items():
        done = cli(*argv(bundle))
        refused(done, verb, words)
        only_line(done)


def test_inspect_finds_altered_weights(cli: Cli, copy_bundle: Callable[[str], Path]) -> None:
    bundle = copy_bundle("altered")
    data = bytearray((bundle / MINUS_NAME).read_bytes())
    data[-70] ^= 1
    (bundle / MINUS_NAME).write_bytes(data)
    refused(cli("inspect", bundle), "inspect", f"{MINUS_NAME}: its carriers were altered since conversion")


def test_score_is_a_row_a_trace_and_their_mean(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(4)]
    long = [{"prompt": "x", "completion": "y" * 300}, {"prompt": "x" * 300, "completion": "y"}]
    traces = write_lines(tmp_path / "t.jsonl", *rows, *long)
    argv = ["score", "--bundle", tiny_bundle, traces, "-c", 256, "-t", 1]
    found = json.loads(cli(*argv, "--json").out)
    scores = found["scores"]
    assert (found["traces"], found["cut"], found["skipped"]) == (5, 1, 1)
    assert [s["where"] for s in scores] == [f"{traces}:{i}" for i in range(1, 6)]
    assert found["dose"] == pytest.approx(sum(s["dose"] for s in scores))
    assert found["n_tokens"] == sum(s["n_tokens"] for s in scores)
    assert found["dose_per_token"] == pytest.approx(found["dose"] / found["n_tokens"])
    for s in scores:
        assert s["dose_per_token"] == pytest.approx(s["dose"] / s["n_tokens"])
    table = cli(*argv).out.splitlines()
    assert len(table) == 1 + 5 + 1
    row = [f"{scores[0]['dose']:+.2f}", f"{scores[0]['dose_per_token']:+.4f}", "3", f"{traces}:1"]
    assert table[1].split()[:4] == row
    assert table[-1].split()[0] == f"{found['dose']:+.2f}"
    assert table[-1].endswith("all 5 (1 cut, 1 skipped)")


@pytest.fixture
def generate(cli: Cli, tiny_llama: Path) -> Callable[..., Done]:
    def call(*argv: object) -> Done:
        return cli("generate", "-m", tiny_llama, "-c", 256, "-t", 1, *argv)

    return call


def test_generate_needs_a_bundle_or_the_word(generate: Callable[..., Done], tiny_bundle: Path) -> None:
    refused(generate("-p", "1"), "generate", "no --bundle given", "--unprotected")
    both = generate("-p", "1", "--bundle", tiny_bundle, "--unprotected")
    refused(both, "generate", "contradict each other")


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["text", "chat"])
def test_generate_tells_its_statistics(generate: Callable[..., Done], tiny_bundle: Path, chat: list[str]) -> None:
    argv = ["-p", "1 + 1 =", "-n", "12", "-s", "3", "--bundle", tiny_bundle, "--strength", "2", "--guard", "0.1", *chat]
    done = generate(*argv, "--json")
    found = json.loads(done.out)
    assert set(found) == {
        *("text", "tokens", "protected", "strength", "guard", "dose", "mean_delta", "mean_kl", "steerable"),
        *("seconds", "tokens_per_second"),
    }
    assert (found["protected"], found["strength"], found["guard"]) == (True, 2, 0.1)
    assert found["tokens"] >= 1  # llama-cpp-python goes on beyond -n until a character is whole
    assert found["mean_delta"] == pytest.approx(found["dose"] / found["tokens"])
    assert found["mean_kl"] > 0
    plain = generate(*argv)
    assert plain.out == found["text"] + "\n", "the same seed, the same text, and nothing else on stdout"
    assert plain.err.startswith(f"dose {found['dose']:+.1f}, mean Δ {found['mean_delta']:+.3f}, KL")
    assert plain.err.endswith("(strength 2, guard 0.1)\n")


def test_text_with_nothing_to_steer_is_not_called_unprotected(generate: Callable[..., Done], tiny_bundle: Path) -> None:
    done = generate("-p", "1 +", "--bundle", tiny_bundle, "--guard", 1, "--temp", 0)
    assert done.status == 0, done.err
    assert "nothing to steer, KL 0.000" in done.err
    assert "unprotected" not in done.err


def test_generate_at_strength_0_is_the_teacher(generate: Callable[..., Done], tiny_bundle: Path) -> None:
    argv = ["-p", "1 + 1 =", "-n", "12", "-s", "3"]
    plain, zero = generate(*argv, "--unprotected"), generate(*argv, "--bundle", tiny_bundle, "--strength", "0")
    assert zero.out == plain.out
    assert "unprotected" in plain.err
    assert "unprotected" in zero.err
    found = json.loads(generate(*argv, "--unprotected", "--json").out)
    assert found["protected"] is False
    assert found["text"] + "\n" == plain.out
    assert json.loads(generate(*argv, "--bundle", tiny_bundle, "--strength", "0", "--json").out)["protected"] is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--strength", "-1"], ["strength=-1.0: give nats from 0"]),
        (["--strength", "nan"], ["strength=nan"]),
        (["--strength", "strong"], ["--strength", "strong: give a number of nats, or calibrated"]),
        (["--guard", "1.5"], ["guard=1.5: give a share"]),
        (["--guard", "-0.1"], ["guard=-0.1"]),
        (["--guard", "nan"], ["guard=nan"]),
        (["-n", "0"], ["-n/--n-predict", "0: give a whole number from 1 up"]),
        (["-n", "-4"], ["-n/--n-predict", "-4: give a whole number"]),
        (["-n", "many"], ["-n/--n-predict", "many: give a whole number"]),
        (["-n", "1.5"], ["1.5: give a whole number"]),
        (["-p", "x" * 300], ["exceed context window of 256; give a larger --ctx-size or a shorter prompt"]),
        (["-p", "\udcff"], ["--prompt is not valid UTF-8"]),
    ],
    ids=lambda v: " ".join(v)[:14].encode("ascii", "replace").decode() if v[0].startswith("-") else "",
)
def test_wrong_options_of_generate_are_refused(
    argv: list[str], words: list[str], generate: Callable[..., Done], tiny_bundle: Path
) -> None:
    done = generate("-p", "1", "--bundle", tiny_bundle, *argv)
    refused(done, "generate", *words)
    only_line(done)


def test_a_teacher_with_another_vocabulary_is_refused(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    pieces = list(tiny.BYTES)
    pieces[65], pieces[66] = pieces[66], pieces[65]
    teacher = tiny.write_gguf(tiny.tiny_model(), tmp_path / "teacher.gguf", pieces=pieces)
    for verb, rest in {"generate": ["-p", "1"], "bench": []}.items():
        done = cli(verb, "-m", teacher, "--bundle", tiny_bundle, "-c", 256, *rest)
        refused(done, verb, "token 65 is 'B'", "to the teacher", "convert a proxy that shares the teacher's tokenizer")


def test_a_missing_teacher_is_refused(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "nowhere.gguf"
    for how in (["--bundle", tiny_bundle], ["--unprotected"]):
        refused(cli("generate", "-m", teacher, "-p", "1", *how), "generate", "nowhere.gguf: no such file")
    refused(cli("bench", "-m", teacher, "--bundle", tiny_bundle), "bench", "nowhere.gguf: no such file")


# The command as a whole


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, cli: Cli) -> None:
    done = cli(verb, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"example:\n  adlocal {verb}" in done.out


def test_help_lists_every_verb(cli: Cli) -> None:
    done = cli("--help")
    assert done.status == 0
    assert all(f"\n    {verb}" in done.out for verb in VERBS)


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"adlocal {adlocal.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["train"]])
def test_a_missing_or_unknown_verb_is_refused(argv: list[str], cli: Cli) -> None:
    done = cli(*argv)
    assert done.status == 2
    assert done.err.startswith("adlocal: ")
    only_line(done)


def command(*argv: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "adlocal", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        preexec_fn=_at_a_terminal,
    )


def _at_a_terminal() -> None:
    """Tests that run in the background hand down that Ctrl-C is to be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


@pytest.mark.parametrize("module", ["torch", "transformers", "gguf"])
def test_without_the_converters_parts_the_remedy_is_told(module: str, tmp_path: Path, tiny_traces: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    process = command(
        "convert", "p.gguf", "--traces", tiny_traces, "--out", tmp_path / "bundle", PYTHONPATH=str(tmp_path)
    )
    done = ended(process)
    refused(
        done,
        "convert",
        f"the converter needs {module}, which is not installed",
        "pip install 'adlocal[convert]'",
        status=1,
    )
    only_line(done)


def test_the_runtime_needs_no_part_of_the_converter(tmp_path: Path, tiny_bundle: Path, tiny_llama: Path) -> None:
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in ("torch", "transformers", "gguf", "adlocal_convert"))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{absent}")
    argv = ["-m", tiny_llama, "--bundle", tiny_bundle, "-c", 256, "-n", 4, "-t", 1, "-p", "1", "--json"]
    done = ended(command("generate", *argv, PYTHONPATH=str(tmp_path)))
    assert done.status == 0, done.err
    assert done.err == ""
    assert json.loads(done.out)["protected"] is True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interrupted_conversion_leaves_nothing(how: signal.Signals, tiny_llama: Path, out: Path) -> None:
    traces = write_lines(
        out.parent.parent / "t.jsonl", *[{"prompt": f"{i} +", "completion": " 2" * 100} for i in range(800)]
    )
    process = command("convert", tiny_llama, "--traces", traces, "--out", out, "-t", 1)
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 60
    while "loss=" not in seen and time.monotonic() < deadline:  # in the middle of the gradient
        seen += process.stderr.read(1)
    assert [p.name.startswith(".bundle.") for p in out.parent.iterdir()] == [True]
    process.send_signal(how)
    done = ended(process)
    assert done.status == 130, done.err
    assert done.message() == "adlocal convert: interrupted; nothing half-written is left"
    assert "Traceback" not in done.err
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_a_reader_that_leaves_is_no_failure_of_ours(tiny_bundle: Path) -> None:
    script = f'"{sys.executable}" -m adlocal inspect "{tiny_bundle}" --json | true'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
