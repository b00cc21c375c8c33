"""Hyperparameters of a Hugging Face configuration as the GGUF keys and tables that llama.cpp reads.

A configuration that llama.cpp's graph of the family would compute otherwise is refused. One difference is left, as in
llama.cpp's own converter: the sliding windows of mistral, phi3 and qwen, which llama.cpp runs with full attention.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adlocal.errors import ModelError

from ..model.architectures import Architecture

Array = npt.NDArray[np.float32]
Setting = int | float | str | list[bool]

_GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
# Attributes of a configuration that llama.cpp has no key for, and what its graph of the family computes with.
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
    "gemma2": {**_GELU, "tie_word_embeddings": True},
    "gemma3": {**_GELU, "attn_logit_softcapping": None},
    "phi3": {"hidden_act": "silu"},
}
_ROPE_TYPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma2": ("default", "linear"),
    "gemma3": ("default", "linear"),
    "phi3": ("default", "longrope"),
}
# The same for yarn; llama.cpp has keys for some of these, which these families do not read.
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


def refusal(where: Path, reason: str) -> ModelError:
    """The error for what cannot be mapped, with the command that may know better."""
    command = f"python convert_hf_to_gguf.py {where} --outfile proxy.gguf"
    return ModelError(f"{where}: {reason}; make a GGUF with llama.cpp's own script and give that: {command}")


def settings(where: Path, config: Any, architecture: Architecture) -> dict[str, Setting]:
    """GGUF keys without the architecture's prefix, and their values.

    Args:
        where: the directory, for messages.
        config: transformers' configuration of the language model.
        architecture: the family that it is stored as.

    Raises:
        ModelError: llama.cpp would compute another model.
    """
    _check(where, config, architecture)
    rope = _full(config.rope_parameters)
    dim = head_dim(config)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": int(dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling(where, rope, config),
        **(_gemma(where, config, architecture) if architecture.full_every else {}),
    }


def rope_tables(config: Any) -> dict[str, Array]:
    """The rotary factors that llama.cpp takes as tensors, (head_dim / 2,) each, by tensor name."""
    rope = _full(config.rope_parameters)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.asarray(rope[f"{name}_factor"], dtype=np.float32)
            for name in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    dim = head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _full(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of layers with full attention."""
    parameters: dict[str, Any] = rope.get("full_attention", rope)
    return parameters


def _check(where: Path, config: Any, architecture: Architecture) -> None:
    name, rope = architecture.name, _full(config.rope_parameters)
    for attribute, expected in _FIXED[name].items():
        value = getattr(config, attribute, expected)
        if value != expected:
            raise refusal(where, f"{attribute} is {value}, and llama.cpp's {name} has {expected}")
    if rope["rope_type"] not in _ROPE_TYPES[name]:
        raise refusal(where, f"rope_type {rope['rope_type']} of {name} is not mapped")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and name != "phi3":
        raise refusal(where, f"partial_rotary_factor is {rope['partial_rotary_factor']}, and llama.cpp's {name} has 1")
    if name in ("qwen2", "phi3") and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise refusal(where, f"head_dim is {head_dim(config)}, and llama.cpp's {name} has hidden_size / heads")


def _scaling(where: Path, rope: dict[str, Any], config: Any) -> dict[str, Setting]:
    rope_type = rope["rope_type"]
    if rope_type == "linear":
        return {"rope.scaling.type": rope_type, "rope.scaling.factor": float(rope["factor"])}
    if rope_type == "yarn":
        return _yarn(where, rope, config)
    if rope_type == "longrope":
        return _longrope(rope, config)
    return {}


def _yarn(where: Path, rope: dict[str, Any], config: Any) -> dict[str, Setting]:
    for name, expected in _YARN.items():
        value = rope.get(name, expected)
        if value not in (None, expected):
            raise refusal(where, f"{name} of yarn is {value}, and llama.cpp has {expected}")
    original = rope["original_max_position_embeddings"]
    factor = float(rope["factor"] or config.max_position_embeddings / original)
    own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # llama.cpp multiplies with it in any case
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": (rope.get("attention_factor") or own) / own,
    }


def _longrope(rope: dict[str, Any], config: Any) -> dict[str, Setting]:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(rope.get("attention_factor") or attention),
    }


def _gemma(where: Path, config: Any, architecture: Architecture) -> dict[str, Setting]:
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head_dim(config)
    scale = architecture.attention_scale(*sizes)  # a file has no key for it
    if config.query_pre_attn_scalar != scale:
        raise refusal(where, f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp has {scale}")
    if config.use_bidirectional_attention:
        raise refusal(where, "use_bidirectional_attention makes it no causal model")
    return {**_softcaps(where, config, architecture.name), **_window(where, config, architecture)}


def _softcaps(where: Path, config: Any, name: str) -> dict[str, Setting]:
    attention, final = config.attn_logit_softcapping, config.final_logit_softcapping
    if name == "gemma2" and not (attention and final):
        raise refusal(where, "llama.cpp's gemma2 has attn_logit_softcapping and final_logit_softcapping always")
    caps = {"attn_logit_softcapping": attention, "final_logit_softcapping": final}
    return {key: float(cap) for key, cap in caps.items() if cap}


def _window(where: Path, config: Any, architecture: Architecture) -> dict[str, Setting]:
    name, n_layers = architecture.name, len(config.layer_types)
    sliding = [layer_type == "sliding_attention" for layer_type in config.layer_types]
    if not (any(sliding) and config.sliding_window):
        if name == "gemma2":
            raise refusal(where, "no layer has a sliding window, and llama.cpp's gemma2 needs one")
        return {}
    window: dict[str, Setting] = {"attention.sliding_window": config.sliding_window}
    if name == "gemma3":
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default":
            raise refusal(where, f"rope_type {local['rope_type']} of layers with a sliding window is not mapped")
        window["rope.freq_base_swa"] = float(local["rope_theta"])
    if sliding != [(layer + 1) % architecture.full_every != 0 for layer in range(n_layers)]:
        window["attention.sliding_window_pattern"] = sliding
    return window
