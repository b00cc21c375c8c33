"""Random requests, and nonsense, to llama-server under `adlocal run`: nothing of the teacher comes out unprotected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adlocal.plugin import control_directory
from llama_server import server
from support import tiny
from support.barrage import Barrage, control_of
from support.llama_server import Server

N_REQUESTS, N_SLOTS = 5000, 4
PROMPT = [tiny.BOS, *b"tick tock tick tock tick tock"]

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone"),
    pytest.mark.skipif(not server().exists(), reason="needs llama-server; run `make test-server`"),
]


def test_no_request_gets_an_unadjusted_row(tiny_llama: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Every token that is told of came from a row that was counted, and every row with a choice had the pair evaluated.

    No sequence was given less than the server was started with, and in between the server says what it said at first.
    """
    directory = control_directory(tmp_path / "control")
    options = ["--strength", 3, "--guard", 0.05, "--control", directory]
    asked = ["-m", tiny_llama, "--embeddings", "--pooling", "mean"]
    with Server(asked, tiny_bundle, options, n_parallel=N_SLOTS, log=tmp_path / "log") as running:
        barrage, expected = Barrage(running, seed=19), running.complete(PROMPT, 8)
        for i in range(N_REQUESTS):
            barrage.one()
            assert running.process.poll() is None, running.said()[-3000:]
            if i % 500 == 499:
                assert running.complete(PROMPT, 8) == expected
        control = control_of(running, directory)
        counters = control.counters()
        assert 0 < barrage.n_tokens <= counters.n_rows
        assert counters.n_rows == counters.n_choices == counters.n_evaluated, "this teacher is sure of nothing"
        assert counters.kl > 0.1 * counters.n_rows, "rows were evaluated and not changed"
        assert counters.n_closed == 0
        in_force = [control.in_force(seq_id) for seq_id in control.begun()]
        assert {(each.strength, each.guard, each.mode) for each in in_force} == {(3.0, 0.05, "protect")}
        assert barrage.outcomes["200"] > N_REQUESTS // 10, barrage.outcomes
        assert barrage.outcomes["400"] > N_REQUESTS // 10, barrage.outcomes
