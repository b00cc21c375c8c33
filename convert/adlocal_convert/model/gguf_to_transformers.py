"""transformers' configuration of a GGUF, from the hyperparameters that llama.cpp reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers

from adlocal.errors import ModelError
from adlocal.llamacpp.gguf import GGUFHeader

from .architectures import ARCHITECTURES, HEAD, TABLE, Architecture
from .weights import WeightFile

_FREQS, _SHORT = "rope_freqs.weight", "rope_factors_short.weight"


def configuration(header: GGUFHeader, architecture: Architecture, weights: WeightFile) -> Any:
    """The configuration whose model computes what llama.cpp computes from this file.

    Raises:
        ModelError: a hyperparameter is missing, or asks for something that is not mapped.
    """
    if TABLE not in weights:
        raise ModelError(f"{header.path}: it holds no tensor {TABLE}; convert it again")
    get = _Keys(header, architecture.name)
    n_head, width = get("attention.head_count"), get("embedding_length")
    settings = {
        "vocab_size": weights.shape(TABLE)[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": get("attention.head_count_kv", n_head),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in weights,
        "rope_parameters": _rope(get),
        "use_cache": False,
        "pad_token_id": None,
        **({"head_dim": get("attention.key_length", width // n_head)} if architecture.name != "phi3" else {}),
        **_OWN[architecture.name](get, weights),
    }
    config_class = _CONFIGURATIONS[architecture.name]
    return config_class(**settings)


def scale_frequencies(model: Any, header: GGUFHeader, architecture: Architecture, weights: WeightFile) -> None:
    """Gives a model's rotary positions what transformers has no setting for, or another one than llama.cpp.

    That is the file's table of factors (Llama 3; Phi-3's for short contexts), linear scaling, and the factor of the
    magnitude.
    """
    get = _Keys(header, architecture.name)
    rotary = model.model.rotary_emb
    name = "full_attention_inv_freq" if architecture.name == "gemma3" else "inv_freq"
    frequencies = getattr(rotary, name)
    for table in (_FREQS, _SHORT):
        if table in weights:
            frequencies /= torch.from_numpy(weights.get(table))
    scaling = get("rope.scaling.type", "linear")
    if scaling == "linear":
        frequencies /= get("rope.scaling.factor", get("rope.scale_linear", 1.0)) or 1.0  # llama.cpp takes 0 for 1
    if scaling != "yarn" and architecture.name != "gemma3":
        rotary.attention_scaling = get("rope.scaling.attn_factor", 1.0)


class _Keys:
    """The header's keys under its architecture's name."""

    def __init__(self, header: GGUFHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self.header.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise ModelError(f"{self.header.path}: key {self.prefix}.{key} is missing; convert it again")
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if isinstance(value, list):
            raise ModelError(f"{self.header.path}: {self.prefix}.{key} differs between layers, which is not supported")
        return value


def _rope(get: _Keys) -> dict[str, Any]:
    scaling = get("rope.scaling.type", "linear")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    if scaling == "yarn":
        factor = get("rope.scaling.factor")
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "attention_factor": (1 + 0.1 * math.log(factor)) * get("rope.scaling.attn_factor", 1.0),
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
        }
    elif scaling not in ("linear", "none", "longrope"):
        raise ModelError(f"{get.header.path}: rope scaling {scaling} is not supported; give a proxy without it")
    return rope


def _llama(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in weights, "mlp_bias": "blk.0.ffn_up.bias" in weights}


def _qwen2(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    return {}


def _qwen3(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in weights}


def _gemma(get: _Keys) -> dict[str, Any]:
    architecture = ARCHITECTURES[get.prefix]
    sizes = (get(key) for key in ("block_count", "embedding_length", "attention.head_count", "attention.key_length"))
    return {
        "query_pre_attn_scalar": architecture.attention_scale(*sizes),
        "layer_types": _layer_types(get, architecture.full_every),
    }


def _layer_types(get: _Keys, period: int) -> list[str]:
    """Which layers slide: llama.cpp's pattern is a list, or a period n of which every n-th layer does not."""
    n_layers = get("block_count")
    pattern = get.header.get(f"{get.prefix}.attention.sliding_window_pattern", period)
    slides = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(n_layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides[:n_layers]]


def _gemma2(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    return {
        **_gemma(get),
        "sliding_window": get("attention.sliding_window", 4096),
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
    }


def _gemma3(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    window = get("attention.sliding_window", 0)
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
    every = {"layer_types": ["full_attention"] * get("block_count")}
    return {
        **_gemma(get),
        "rope_parameters": {"full_attention": _rope(get), "sliding_attention": local},
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
        **({"sliding_window": window} if window else every),
    }


def _phi3(get: _Keys, weights: WeightFile) -> dict[str, Any]:
    """llama.cpp leaves Phi-3's sliding window out, and so must the model that is differentiated."""
    head_dim = get("embedding_length") // get("attention.head_count")
    share = get("rope.dimension_count", head_dim) / head_dim
    return {"rope_parameters": {**_rope(get), "partial_rotary_factor": share}, "sliding_window": None}


_OWN: dict[str, Callable[[_Keys, WeightFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
_CONFIGURATIONS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
}
