"""A program on llama-cpp-python's C API that does what a test tells it, one call of llama.h at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PROGRAM = """
import ctypes, json, os, sys, llama_cpp as c
from pathlib import Path
from adlocal.plugin import Control
quiet = c.llama_log_callback(lambda level, text, data: None)  # a pipe that nobody reads would fill
c.llama_log_set(quiet, None)
c.llama_backend_init()
model = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())
params = c.llama_context_default_params()
params.n_ctx, params.n_seq_max, params.kv_unified, params.n_threads, params.n_threads_batch = 256, 4, True, 1, 1
ctx = c.llama_init_from_model(model, params)
memory, n_vocab = c.llama_get_memory(ctx), c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
saved, watched = {}, []

def batch(entries):
    made = c.llama_batch_init(len(entries), 0, 4)
    made.n_tokens = len(entries)
    for i, (token, pos, seq_ids, output) in enumerate(entries):
        made.token[i], made.pos[i], made.n_seq_id[i], made.logits[i] = token, pos, len(seq_ids), output
        for j, seq_id in enumerate(seq_ids):
            made.seq_id[i][j] = seq_id
    return made

def decode(entries):
    status = c.llama_decode(ctx, batch(entries))
    rows = [c.llama_get_logits_ith(ctx, i)[:n_vocab] for i, entry in enumerate(entries) if entry[3]]
    return [status, rows if status == 0 else []]

def encode(entries):
    return c.llama_encode(ctx, batch(entries))

def save(name, seq_id):
    saved[name] = (ctypes.c_uint8 * c.llama_state_seq_get_size(ctx, seq_id))()
    return c.llama_state_seq_get_data(ctx, saved[name], len(saved[name]), seq_id)

def load(name, seq_id):
    return c.llama_state_seq_set_data(ctx, saved[name], len(saved[name]), seq_id)

def rm(seq_id, p0, p1):
    return c.llama_memory_seq_rm(memory, seq_id, p0, p1)

def cp(source, target):
    c.llama_memory_seq_cp(memory, source, target, -1, -1)

def sampler(seq_id):
    return c.llama_set_sampler(ctx, seq_id, None)

def watch():
    control = Control.open(Path(os.environ["ADLOCAL_CONTROL_DIR"]) / f"{os.getpid()}.control")
    look = c.ggml_abort_callback(lambda _: watched.append(control.decodes()) or False)
    watched.append(look)
    c.llama_set_abort_callback(ctx, look, None)

def seen():
    return [[each.begun, each.ended] for each in watched[1:]]

for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""

#: A token, its position, its sequences, and whether it has a row.
Entry = tuple[int, int, Sequence[int], bool]


class Driver:
    """The program, with four sequences, under `adlocal run`; it ends with the `with`."""

    def __init__(self, teacher: Path, bundle: Path, control: Path, *options: object) -> None:
        own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, "--control", control, *options, "--"]
        command = list(map(str, [*own, sys.executable, "-c", _PROGRAM, teacher]))
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=variables, **pipes)  # type: ignore[call-overload]

    def __enter__(self) -> Driver:
        self.do("seen")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)

    def do(self, name: str, *arguments: object) -> Any:
        """What a function of the program returns."""
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def decode(self, *entries: Entry) -> list[list[float]]:
        """The rows of a batch, which has to go well."""
        status, rows = self.do("decode", entries)
        assert status == 0
        found: list[list[float]] = rows
        return found

    def prompt(self, tokens: Sequence[int], pos: int = 0, seq_id: int = 0) -> list[float]:
        """The row of a prompt's last token, the only one."""
        last = len(tokens) - 1
        (row,) = self.decode(*((token, pos + i, [seq_id], i == last) for i, token in enumerate(tokens)))
        return row

    def sampled(self, tokens: Sequence[int], pos: int, seq_id: int = 0) -> list[list[float]]:
        """The rows of a token that was sampled, and of what was drafted after it."""
        return self.decode(*((token, pos + i, [seq_id], True) for i, token in enumerate(tokens)))
