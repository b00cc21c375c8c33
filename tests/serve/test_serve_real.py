"""`adlocal serve` with SmolLM2: the whole way, with a model that takes its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from support.gateway import Gateway, gateway

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
]
LONG = "Tell me about rivers, lakes and the sea. " * 80


@pytest.fixture(scope="module")
def served(smollm2: Path, smollm2_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = "[policy.default]\nstrength = 2.0\n"
    with gateway(
        smollm2, smollm2_bundle, tmp_path_factory.mktemp("real"), "-np", 2, "-c", 2048, config=config
    ) as found:
        yield found


def test_a_chat_is_answered_and_protected(served: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    found = client.chat.completions.create(model="m", messages=messages, max_tokens=24)  # type: ignore[arg-type]
    text = found.choices[0].message.content or ""
    assert len(text.split()) > 5
    (answer,) = served.wait_for_record(1)[-1]["answers"]
    assert answer["strength"] == 2.0
    assert answer["rows"] >= answer["tokens"] == 24
    assert 0 < answer["choices"] == answer["evaluated"]
    assert answer["kl"] > 0


def test_who_hangs_up_while_the_prompt_is_read_stops_it(served: Gateway) -> None:
    """The engine reads a batch to its end, and no further."""
    control, before = served.control(), served.control().counters()
    n = served.n_records()
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 8}
    with served.client() as client, pytest.raises(Exception, match="timed out"):
        client.post("/v1/chat/completions", json=body, timeout=2.0)
    (record,) = served.wait_for_record(n + 1)[n:]
    assert record["status"] == 499
    assert record["answers"][0]["tokens"] == 0
    assert record["answers"][0]["prompt_tokens"] > len(LONG) // 4  # what was, or will be, read is charged
    served.wait_until(lambda: control.decodes().begun == control.decodes().ended)
    time.sleep(1.5)  # the engine asks once a second whether its client is there
    served.wait_until(lambda: control.decodes().begun == control.decodes().ended)
    assert (control.counters() - before).n_rows <= 1  # the last of the batch that was being read
    assert served.chat(n=2).status_code == 200
