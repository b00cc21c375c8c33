"""The model families that can be differentiated here and carried back to their GGUF, and how both formats differ.

Everything else about a family comes from transformers (its model and its reading of a GGUF's hyperparameters) and from
gguf-py (names of tensors). The differences are those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf

from adlocal.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        name: `general.architecture` of its GGUF.
        model_types: transformers' `config.model_type`s that are stored as it.
        interleaved: the file keeps each head's rows of Q and K in pairs, where transformers keeps halves.
        norm_offset: what the file's norm weights hold more than transformers' parameters, whose models add it.
        full_every: of the layers with a sliding window, every n-th has none where the file does not say; 0: no windows.
        layers_of_27b: llama.cpp takes another attention scale for the 27B model, which it knows by its layers; 0: none.
    """

    name: str
    model_types: tuple[str, ...]
    interleaved: bool = False
    norm_offset: float = 0.0
    full_every: int = 0
    layers_of_27b: int = 0

    def interleaved_heads(self, tensor: str, config: Any) -> int:
        """Heads whose rows the file keeps interleaved in the GGUF tensor, 0 for none; `config` is transformers'."""
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        return int(heads.get(tensor.split(".")[-2], 0)) if self.interleaved else 0

    def attention_scale(self, n_layers: int, width: int, n_head: int, head_dim: int) -> int:
        """Whose root llama.cpp divides the logits of attention by: a head's width, but in the 27B model."""
        return width // n_head if n_layers == self.layers_of_27b else head_dim


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", ("llama", "mistral"), interleaved=True),
        Architecture("qwen2", ("qwen2",)),
        Architecture("qwen3", ("qwen3",)),
        Architecture("gemma2", ("gemma2",), norm_offset=1.0, full_every=2, layers_of_27b=46),
        Architecture("gemma3", ("gemma3_text",), norm_offset=1.0, full_every=6, layers_of_27b=62),
        Architecture("phi3", ("phi3",)),
    )
}
#: The embedding table, and the output head, which tied models have none of.
TABLE, HEAD = "token_embd.weight", "output.weight"
# Tables that llama.cpp stores among the tensors and no training ever changes.
CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def architecture_of(where: object, name: str) -> Architecture:
    """The family of a GGUF's `general.architecture`; `where` is for the message.

    Raises:
        ModelError: it is none of ARCHITECTURES.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"{where}: architecture {name} is not supported; give one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def tensor_names(architecture: Architecture, parameters: Iterable[str], n_layers: int) -> dict[str, str]:
    """Parameter name of transformers -> GGUF tensor name, without parameters that the family's files do not hold."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(arch, n_layers)
    named = ((p, table.get_name(p, try_suffixes=(".weight", ".bias"))) for p in parameters)
    return {parameter: name for parameter, name in named if name is not None}


def stored_as(model_type: str) -> Architecture | None:
    """The family that a transformers `config.model_type` is stored as, None if it is none of ARCHITECTURES."""
    return next((a for a in ARCHITECTURES.values() if model_type in a.model_types), None)
