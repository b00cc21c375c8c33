"""Fixtures: tiny models with their bundles, and SmolLM2-135M-Instruct with a bundle converted from real traces."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from adlocal_convert.convert import Options, convert
from adlocal_convert.demo import demo_model
from adlocal_convert.word_problems import word_problems
from faults import Faults

from adlocal.bundle import Bundle
from adlocal.errors import BundleError

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train_1000.jsonl"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 GGUF of a random llama model with a byte vocabulary and a chat template."""
    path = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    return tiny.write_gguf(tiny.tiny_model("llama"), path, tiny.CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short traces."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = [{"prompt": f"{i} + {i + 3} =", "completion": f" {2 * i + 3}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_llama: Path, tiny_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny llama model."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    convert(Options(tiny_llama, tiny_traces, out, carriers=1.0, n_threads=1), lambda line: None)
    return out


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return demo_model()


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path, pytestconfig: pytest.Config) -> Path:
    """A bundle of SmolLM2 from the first 96 solutions of GSM8K, or from generated problems where they are absent.

    Converting takes minutes: it is kept between runs for as long as no source of the converter changes.
    """
    cache = pytestconfig.cache
    assert cache is not None
    rows = GSM8K.read_text(encoding="utf-8").splitlines()[:96] if GSM8K.exists() else map(json.dumps, word_problems(96))
    text = "\n".join(rows) + "\n"
    sources = sorted([*(ROOT / "adlocal").glob("*.py"), *(ROOT / "convert" / "adlocal_convert").glob("*.py")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + text.encode()).hexdigest()[:16]
    directory = cache.mkdir("smollm2") / key
    directory.mkdir(exist_ok=True)
    try:
        Bundle.open(directory / "bundle")
    except BundleError:
        (directory / "traces.jsonl").write_text(text, encoding="utf-8")
        convert(Options(smollm2, directory / "traces.jsonl", directory / "bundle", overwrite=True), print)
    return directory / "bundle"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Breaks proxies of pairs that are opened after it."""
    return Faults(monkeypatch)


@pytest.fixture
def copy_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of the tiny bundle that a test may spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_bundle, tmp_path / name))

    return copy
