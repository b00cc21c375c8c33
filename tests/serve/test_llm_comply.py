"""`llm-comply` checks servers against the published schemas: what the engine alone passes, the gateway passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.engines import serving
from support.gateway import gateway

COMMAND = shutil.which("llm-comply", path=str(Path(sys.executable).parent)) or shutil.which("llm-comply")
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
    pytest.mark.skipif(COMMAND is None, reason="llm-comply is not installed"),
]
#: The tiny model says anything, for as long as it may: how an answer ends is not the server's doing.
CHANCE = "finish_reason: expected 'stop',expected status='completed',stop_reason: expected"
#: Cases that the gateway does not pass, and why.
FAILING = {
    "openai-chat": {
        "chat-tool-calling": "the tiny model calls no tool",
        "chat-image-input": "images are refused: 400",
        "chat-error-handling": "wants a request without a model's name refused; there is one model, as in llama-server",
    },
    "open-responses": {
        "tool-calling": "the tiny model calls no tool",
        "image-input": "images are refused: 400",
        "error-handling": "wants a request without a model's name refused; there is one model, as in llama-server",
    },
    "anthropic": {
        "anth-basic-response": "fields of Anthropic's own business, as `inference_geo`, are not made up",
        "anth-system-prompt": "the same",
        "anth-multi-turn": "the same",
        "anth-tool-calling": "the tiny model calls no tool",
        "anth-image-input": "images are refused: 400",
    },
}
SKIPPED = {"chat-reasoning-summary", "reasoning-summary", "anth-thinking-display"}  # for models by their name


@pytest.fixture(scope="module")
def urls(long_llama: Path, long_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Where the gateway and the engine alone listen."""
    directory = tmp_path_factory.mktemp("comply")
    engine = [sys.executable, "-m", "adlocal", "engine", "--bundle", long_bundle, "-m", long_llama]
    engine += ["--control", directory / "control", "-np", 2, "-c", 8192, "-t", 1, "-n", 200, "--port", 0]
    config = "[policy.default]\nmax_tokens = 200\n"
    with (
        serving(engine, directory / "engine.log", {"TMPDIR": str(directory)}, 240) as alone,
        gateway(long_llama, long_bundle, directory, "-np", 2, "-c", 4096, config=config) as found,
    ):
        yield found.url, alone.address


def outcomes(url: str, form: str) -> dict[str, str]:
    """The status of each case by its id."""
    assert COMMAND is not None
    command = [COMMAND, "--format", form, "-u", f"{url}/v1", "-k", "none", "-m", "tiny", "--json", "-i", CHANCE]
    done = subprocess.run([*command, "--timeout", "60"], capture_output=True, text=True, timeout=200)
    return {each["id"]: each["status"] for each in json.loads(done.stdout)["results"]}


@pytest.mark.parametrize("form", FAILING)
def test_the_gateway_passes_what_the_engine_passes(urls: tuple[str, str], form: str) -> None:
    served, alone = (outcomes(url, form) for url in urls)
    assert set(served) == set(alone)
    lost = {case for case, status in alone.items() if status == "passed" and served[case] != "passed"}
    assert not lost
    assert {case for case, status in served.items() if status == "failed"} == set(FAILING[form])
    assert {case for case, status in served.items() if status == "skipped"} <= SKIPPED
