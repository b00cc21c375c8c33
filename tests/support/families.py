"""Tiny Hugging Face models of every family that `adlocal convert` takes, random weights, saved as directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from support import tiny

_COMMON: dict[str, Any] = {**tiny.SIZES, "pad_token_id": None}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75}
SHORT, LONG = [1.0, 1.1, 1.2, 1.4, 1.6, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
_GEMMA: dict[str, Any] = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True}
_LOCAL = {"rope_type": "default", "rope_theta": 100.0}

# name -> (configuration class, settings). Windows are shorter than the tests' 40 tokens.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (transformers.LlamaConfig, {"head_dim": 24}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}}),
    "mistral": (transformers.MistralConfig, {"head_dim": 24, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-yarn": (transformers.Qwen2Config, {"rope_parameters": _YARN}),
    "qwen2-yarn-attention": (
        transformers.Qwen2Config,
        {"rope_parameters": {**_YARN, "attention_factor": 0.8}},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-linear": (
        transformers.Qwen3Config,
        {"head_dim": 24, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **_GEMMA,
            "final_logit_softcapping": 3.0,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
                "sliding_attention": _LOCAL,
            },
        },
    ),
    "gemma3-default": (transformers.Gemma3TextConfig, {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": (transformers.Phi3Config, {"sliding_window": None}),
    "phi3-longrope": (
        transformers.Phi3Config,
        {
            "rope_parameters": {**_LONGROPE, "short_factor": SHORT, "long_factor": LONG},
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
        },
    ),
}


def family_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model, float32, in eval mode, with norms and biases away from their initial values."""
    config_class, own = FAMILIES[name]
    torch.manual_seed(seed)
    config = config_class(**{**_COMMON, **own, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Writes config.json and safetensors as transformers does."""
    model.save_pretrained(directory, **options)
    return directory
