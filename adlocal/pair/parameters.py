"""Parameters of the proxies' contexts."""

from __future__ import annotations

import os

import llama_cpp


def context_params(
    n_ctx: int = 0,
    n_batch: int = 512,
    n_outputs: int = 64,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    type_k: int | None = None,
    type_v: int | None = None,
) -> llama_cpp.llama_context_params:
    """llama.cpp's context parameters for a proxy; the arguments are those of `ProxyPair.open`."""
    params: llama_cpp.llama_context_params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, min(n_batch, params.n_ubatch)
    params.n_outputs_max = params.n_outputs_max_per_seq = min(n_outputs, n_batch)
    params.n_threads = n_threads or os.cpu_count() or 1
    params.n_threads_batch = n_threads_batch or params.n_threads
    params.type_k = params.type_k if type_k is None else type_k
    params.type_v = params.type_v if type_v is None else type_v
    return params
