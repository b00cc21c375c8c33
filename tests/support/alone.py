"""What a request is answered when nobody else is: by llama-cpp-python, or by the drop-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch

from adlocal import AntidistillationLlama, ProxyPair
from adlocal.engine import parallel
from adlocal.engine.sequences import Request, Sampling
from adlocal.pair import context_params
from adlocal.settings import Settings
from support import tiny

#: Of the teacher; its proxies in bundles of the tiny model have 256.
N_CTX = 1024
N_CTX_PROXY = 256
Said = tuple[list[int], str]


def write_ending_teacher(path: Path) -> Path:
    """A tiny llama that ends its turn now and then: some answers stop and some are cut."""
    model = tiny.tiny_model(max_position_embeddings=N_CTX)
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] *= 2
    return tiny.write_gguf(model, path, tiny.CHAT_TEMPLATE)


def prompt(n: int) -> list[int]:
    """Of n tokens after the first one, no two of different lengths alike."""
    return [tiny.BOS, *((37 * n + j * j) % 256 for j in range(n))]


def use_exact_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No flash attention and no F16 cache in any context; the arguments that `AntidistillationLlama` needs for that.

    Both round to some 3e-4, and Δ multiplies that by 1 / 2ε = 35: as batches differ, so would sampled text.
    """
    f32, load = llama_cpp.GGML_TYPE_F32, ProxyPair.load

    def load_exact(first: Path, second: Path, *, params: Any, **rest: Any) -> ProxyPair:
        params.type_k, params.type_v = f32, f32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return load(first, second, params=params, **rest)

    monkeypatch.setattr(ProxyPair, "load", load_exact)
    monkeypatch.setattr(parallel, "context_params", partial(context_params, type_k=f32, type_v=f32))
    return {"type_k": f32, "type_v": f32, "flash_attn": False, "n_threads": 1, "n_threads_batch": 1}


def alone(llm: Any, tokens: Sequence[int], n: int, temp: float = 0.0, **sampling: Any) -> Said:
    """What llama-cpp-python generates after these tokens, and why it ended."""
    llm.reset()
    said: list[int] = []
    for token in llm.generate(list(tokens), temp=temp, **sampling):
        if token == tiny.EOS:
            return said, "stop"
        said.append(token)
        if len(said) == n:
            return said, "length"
    raise AssertionError


def answered_alone(llm: Any, asked: Request, sampling: Sampling, settings: Settings | None = None) -> Said:
    """What it makes of a request, the drop-in under these settings."""
    if settings is not None:
        llm.strength, llm.guard = settings.strength, settings.guard
    llm.set_seed(asked.seed)
    return alone(llm, asked.tokens, asked.n_predict, **asdict(sampling))


def gap(llm: AntidistillationLlama, tokens: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Between the adjusted logits of the tokens at which two completions part.

    Kernels for three rows round otherwise than those for one, and adjusted logits are off by 3e-5. Sampling sorts fifty
    tokens, and two that are as close as that may change places: where texts part, it is between such two.
    """
    pairs = enumerate(zip_longest(ours, theirs, fillvalue=tiny.EOS))
    i, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    llm.reset()
    llm.eval([*tokens, *theirs[:i]])
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return abs(float(logits[a]) - float(logits[b]))
