"""What llama.cpp knows of families by heart, against the published configurations of their models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adlocal_convert.model.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    ("name", "n_layers", "width", "n_head", "head_dim", "query_pre_attn_scalar"),
    [
        ("gemma2", 26, 2304, 8, 256, 256),  # 2B
        ("gemma2", 42, 3584, 16, 256, 256),  # 9B
        ("gemma2", 46, 4608, 32, 128, 144),  # 27B
        ("gemma3", 34, 2560, 8, 256, 256),  # 4B
        ("gemma3", 48, 3840, 16, 256, 256),  # 12B
        ("gemma3", 62, 5376, 32, 128, 168),  # 27B
    ],
)
def test_attention_is_scaled_as_the_published_models_are(
    name: str, n_layers: int, width: int, n_head: int, head_dim: int, query_pre_attn_scalar: int
) -> None:
    assert ARCHITECTURES[name].attention_scale(n_layers, width, n_head, head_dim) == query_pre_attn_scalar


def test_gemma2_alternates_and_every_sixth_layer_of_gemma3_sees_all() -> None:
    assert {a.name: a.full_every for a in ARCHITECTURES.values() if a.full_every} == {"gemma2": 2, "gemma3": 6}


@pytest.mark.parametrize(
    ("tensor", "n_head"), [("blk.3.attn_q.weight", 8), ("blk.3.attn_k.bias", 2), ("blk.3.attn_v.weight", 0)]
)
def test_only_llamas_queries_and_keys_are_interleaved(tensor: str, n_head: int) -> None:
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
    assert ARCHITECTURES["llama"].interleaved_heads(tensor, config) == n_head
    assert ARCHITECTURES["qwen2"].interleaved_heads(tensor, config) == 0
