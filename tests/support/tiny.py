"""Tiny models for tests: random weights in transformers, the same weights in a GGUF that llama.cpp opens."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
import transformers

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # what gpt2's vocabulary writes as itself
_OTHERS = [i for i in range(256) if i not in _PRINTED]
BYTES = [chr(i) if i in _PRINTED else chr(256 + _OTHERS.index(i)) for i in range(256)]
BOS, EOS, N_PIECES = 256, 257, 258
N_VOCAB = 264
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
#: transformers' settings of every tiny model: grouped-query attention, no weights shared.
SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model: 2 layers, 64 wide, grouped-query attention; float32, eval mode."""
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[architecture]
    settings = {**SIZES, **overrides}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases away from their neutral initial values
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def write_gguf(
    model: Any,
    path: Path,
    chat_template: str | None = None,
    pieces: list[str] | None = None,
    sampling: dict[str, float] | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Writes a transformers model as an F32 GGUF with a byte vocabulary (gpt2 tokenizer without merges).

    `sampling` is what the model recommends, by llama.cpp's keys after `general.sampling.`. `tags` are tokens as a
    user defined them, which take the place of padding from `N_PIECES` on.
    """
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size, pieces or BYTES, tags)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (sampling or {}).items():
        writer.add_float32(f"general.sampling.{key}", value)
    parameters = dict(model.named_parameters())
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in parameters.items():
        tensor_name = str(table.get_name(name, try_suffixes=(".weight", ".bias")))
        writer.add_tensor(tensor_name, _in_file_order(tensor_name, parameter, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_readable(path: Path, **overrides: Any) -> Path:
    """Writes a tiny llama whose every token is text: pairs of letters take the place of bytes beyond ASCII."""
    pairs = ["".join(pair) for pair in itertools.product("abcdefghijkl", repeat=2)]
    return write_gguf(tiny_model(**overrides), path, CHAT_TEMPLATE, [*BYTES[:128], *pairs[:128]])


def quantized(source: Path, path: Path, ftype: int) -> Path:
    """Writes a GGUF in another of llama.cpp's types, with all of its metadata."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize returned {status}"
    return path


def _in_file_order(tensor_name: str, parameter: Any, config: Any) -> Any:
    values = parameter.detach().float().numpy()
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    n_head = next((n for part, n in heads.items() if tensor_name.endswith(part)), 0)
    return interleaved(values, n_head) if n_head and config.model_type == "llama" else values


def interleaved(values: Any, n_head: int) -> Any:
    """Rows from transformers' order (halves of each head) to llama.cpp's (pairs): its converter's `permute`."""
    rows = values.reshape(n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))


def add_vocabulary(writer: Any, n_vocab: int, pieces: list[str], tags: Sequence[str] = ()) -> None:
    """A byte vocabulary with two control tokens, padded."""
    padding = [f"[PAD{i}]" for i in range(N_PIECES + len(tags), n_vocab)]
    tokens = [*pieces, "<s>", "</s>", *tags, *padding]
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    defined = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([normal] * 256 + [control] * 2 + [defined] * len(tags) + [unused] * len(padding))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
