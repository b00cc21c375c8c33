"""A tiny model with recurrent memory: random Mamba weights in a GGUF that llama.cpp opens."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from support import tiny

_N_STATE, _N_CONV, _N_RANK = 16, 4, 8


def write_mamba(path: Path, seed: int = 0, n_layers: int = 2, n_ctx: int = 256, n_embd: int = 64) -> Path:
    """An F32 GGUF with the tiny models' vocabulary."""
    n_inner = 2 * n_embd  # llama.cpp has no other
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(n_layers)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(_N_CONV)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_state_size(_N_STATE)
    writer.add_ssm_time_step_rank(_N_RANK)
    writer.add_vocab_size(tiny.N_VOCAB)
    tiny.add_vocabulary(writer, tiny.N_VOCAB, tiny.BYTES)
    rng = np.random.default_rng(seed)

    def add(name: str, *shape: int, scale: float = 0.3, mean: float = 0.0) -> None:
        writer.add_tensor(name, (mean + scale * rng.normal(size=shape)).astype(np.float32))

    add("token_embd.weight", tiny.N_VOCAB, n_embd, scale=1.0)
    add("output_norm.weight", n_embd, mean=1.0)
    add("output.weight", tiny.N_VOCAB, n_embd)
    for i in range(n_layers):
        add(f"blk.{i}.attn_norm.weight", n_embd, mean=1.0)
        add(f"blk.{i}.ssm_in.weight", 2 * n_inner, n_embd)
        add(f"blk.{i}.ssm_conv1d.weight", n_inner, _N_CONV, scale=0.5)
        add(f"blk.{i}.ssm_conv1d.bias", n_inner)
        add(f"blk.{i}.ssm_x.weight", _N_RANK + 2 * _N_STATE, n_inner)
        add(f"blk.{i}.ssm_dt.weight", n_inner, _N_RANK)
        add(f"blk.{i}.ssm_dt.bias", n_inner)
        writer.add_tensor(f"blk.{i}.ssm_a", -np.tile(np.arange(1, _N_STATE + 1, dtype=np.float32) / 8, (n_inner, 1)))
        add(f"blk.{i}.ssm_d", n_inner, mean=1.0)
        add(f"blk.{i}.ssm_out.weight", n_embd, n_inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
