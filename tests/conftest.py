"""Fixtures: tiny models with their bundles, and SmolLM2-135M-Instruct with a bundle converted from real traces."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before a library is loaded that reads it: one thread a process
    os.environ.setdefault("OMP_THREAD_LIMIT", "1")

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis
import llama_cpp
import pytest

from adlocal import AntidistillationLlama
from adlocal.bundle import Bundle
from adlocal.errors import BundleError
from adlocal_convert.convert import convert
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.demo.word_problems import word_problems
from adlocal_convert.options import Options
from support import tiny
from support.adapters import Pairs
from support.alone import N_CTX, use_exact_kernels, write_ending_teacher
from support.cli import Cli, runner
from support.encoders import Encoders
from support.engines import PROMPTS, STRENGTH, N
from support.faults import Faults
from support.json_lines import write_lines
from support.paths import REAL_TRACES, ROOT

# The same examples in each run: what fails in CI fails here. ADLOCAL_RANDOM=1 draws others, to look for more.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("random" if "ADLOCAL_RANDOM" in os.environ else "same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the laboratory's tests."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "lab"):
            item.add_marker(pytest.mark.lab)


def bundle_of(proxy: Path, traces: Path, out: Path) -> Path:
    """Converts a tiny proxy in silence."""
    convert(Options(str(proxy), {"traces": traces}, out, carriers=1.0, n_threads=1), lambda line: None)
    return out


@pytest.fixture(scope="session", autouse=True)
def gradient_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gradients of this session are its own, those of commands that it runs too."""
    before, own = os.environ.get("ADLOCAL_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["ADLOCAL_CACHE"] = str(own)
    yield own
    del os.environ["ADLOCAL_CACHE"]
    if before is not None:
        os.environ["ADLOCAL_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 GGUF of a random llama model with a byte vocabulary and a chat template."""
    path = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    return tiny.write_gguf(tiny.tiny_model("llama"), path, tiny.CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def teacher(tiny_llama: Path) -> Path:
    """A GGUF to take a vocabulary from: 256 bytes, two control tokens, 6 unused."""
    return tiny_llama


@pytest.fixture(scope="session")
def ending_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that ends its turn now and then, with a longer context than its proxies."""
    return write_ending_teacher(tmp_path_factory.mktemp("teacher") / "teacher.gguf")


@pytest.fixture(scope="module")
def plain(ending_teacher: Path) -> Iterator[llama_cpp.Llama]:
    """It in llama-cpp-python, which answers one prompt after another."""
    how: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(llama_cpp.Llama(str(ending_teacher), **how)) as llm:
        yield llm


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, adapter_bundle: Path) -> dict[str, Any]:
    """As `use_exact_kernels` says. The bundles are made before: ε is chosen by the kernels that run."""
    return use_exact_kernels(monkeypatch)


@pytest.fixture(scope="session")
def tiny_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short traces."""
    rows = [{"prompt": f"{i} + {i + 3} =", "completion": f" {2 * i + 3}"} for i in range(10)]
    return write_lines(tmp_path_factory.mktemp("traces") / "traces.jsonl", *rows)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_llama: Path, tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny llama model."""
    return bundle_of(tiny_llama, tiny_traces, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def readable_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose every token is text."""
    return tiny.write_readable(tmp_path_factory.mktemp("readable") / "llama.gguf")


@pytest.fixture(scope="session")
def readable_bundle(readable_llama: Path, tiny_traces: Path) -> Path:
    """A bundle of it."""
    return bundle_of(readable_llama, tiny_traces, readable_llama.with_name("bundle"))


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A readable tiny model with room for long answers: 4,096 tokens."""
    return tiny.write_readable(tmp_path_factory.mktemp("long") / "llama.gguf", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def long_bundle(long_llama: Path, tiny_traces: Path) -> Path:
    """A bundle of it."""
    return bundle_of(long_llama, tiny_traces, long_llama.with_name("bundle"))


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """Encoders of tiny models by chat template."""
    return Encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def tiny_pairs(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A tiny llama model and a direction of rank 3 over all its linear tensors."""
    return Pairs.of(tmp_path_factory.mktemp("pairs"), "llama", Bundle.open(tiny_bundle))


@pytest.fixture(scope="session")
def adapter_bundle(tiny_pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its adapter bundle."""
    return tiny_pairs.write_adapter_bundle(tmp_path_factory.mktemp("adapter") / "bundle")


@pytest.fixture(scope="session")
def equal_halves(tiny_pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The halves that the adapter bundle must equal."""
    return tiny_pairs.write_halves(tmp_path_factory.mktemp("halves") / "bundle")


@pytest.fixture(scope="session")
def drop_in_says(tiny_llama: Path, tiny_bundle: Path) -> dict[float, list[list[int]]]:
    """What the drop-in goes on with after each prompt that engines are asked, by strength."""
    kwargs: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, **kwargs)) as llm:
        said = {
            strength: [list(itertools.islice(llm.generate(p, temp=0.0, strength=strength), N)) for p in PROMPTS]
            for strength in (0.0, STRENGTH)
        }
    assert said[0.0] != said[STRENGTH]
    assert not any(tiny.EOS in tokens for each in said.values() for tokens in each), "an engine would stop there"
    return said


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return demo_model()


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path, pytestconfig: pytest.Config) -> Path:
    """A bundle of SmolLM2 from the first 96 rows of ADLOCAL_TEST_TRACES, or from generated problems.

    Converting takes minutes: it is kept between runs for as long as no source of the converter changes.
    """
    cache = pytestconfig.cache
    assert cache is not None
    rows = REAL_TRACES.read_text(encoding="utf-8").splitlines() if REAL_TRACES else map(json.dumps, word_problems(96))
    text = "\n".join(itertools.islice(rows, 96)) + "\n"
    sources = sorted([*(ROOT / "adlocal").rglob("*.py"), *(ROOT / "convert" / "adlocal_convert").rglob("*.py")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + text.encode()).hexdigest()[:16]
    directory = cache.mkdir("smollm2") / key
    directory.mkdir(exist_ok=True)
    try:
        Bundle.open(directory / "bundle")
    except BundleError:
        (directory / "traces.jsonl").write_text(text, encoding="utf-8")
        traces = {"traces": directory / "traces.jsonl"}
        convert(Options(str(smollm2), traces, directory / "bundle", overwrite=True), print)
    return directory / "bundle"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs the command in this process and gives its status and output, llama.cpp's own too."""
    with runner(capfd) as call:
        yield call


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Breaks proxies of pairs that are opened after it."""
    faults = Faults()
    with faults.installed():
        yield faults


@pytest.fixture
def copy_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of the tiny bundle that a test may spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_bundle, tmp_path / name))

    return copy
