"""The proxy in PyTorch, and the proof that its weights are the GGUF's.

transformers reads the GGUF, dequantizes it, and may reorder it on the way (llama's Q and K rows are permuted between
the two formats). Each tensor is therefore matched to a parameter by name and compared number by number with what
gguf-py dequantizes; a gradient can then be carried back to the file without a guess.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers

from adlocal.errors import ModelError

Array = npt.NDArray[np.float32]
ARCHITECTURES = ("llama", "qwen2")
# Tables that llama.cpp stores among the tensors and no training ever changes.
_CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Tensor:
    """One GGUF tensor that training would change.

    Attributes:
        name: its name in the GGUF.
        parameter: its name in the transformers model.
        n_head: heads whose rows llama.cpp keeps interleaved, 0 where both formats agree.
        stored: the tensor as the file holds it.
    """

    name: str
    parameter: str
    n_head: int
    stored: Any

    @property
    def is_linear(self) -> bool:
        """A matrix: a linear layer's, or the embedding table, which a tied model multiplies with too."""
        return len(self.stored.shape) > 1

    @property
    def n_weights(self) -> int:
        return int(self.stored.n_elements)

    def weights(self) -> Array:
        """The file's own weights, dequantized to float32, in the file's order."""
        return np.asarray(gguf.dequantize(self.stored.data, self.stored.tensor_type), dtype=np.float32)

    def to_gguf(self, values: torch.Tensor) -> Array:
        """Values in the parameter's order, in the file's order."""
        array = values.detach().to(torch.float32).cpu().numpy()
        return _interleave(array, self.n_head) if self.n_head else array


class Proxy:
    """A proxy student: the GGUF file, and the transformers model at its dequantized weights.

    `progress` is called after each of three steps of loading.

    Attributes:
        path: the GGUF.
        reader: gguf-py's view of it.
        model: float32, in eval mode.
        tensors: every tensor that training would change, in file order.

    Raises:
        ModelError: the file is of an architecture that is not supported, its weights are not finite, or a tensor does
            not match the model's parameter.
    """

    def __init__(self, path: Path, progress: Callable[[], object] = lambda: None) -> None:
        self.path = path
        self.reader = _open(path)
        progress()
        self.model = _load(path)
        progress()
        self.tensors = list(self._match())
        progress()

    def _match(self) -> Iterator[Tensor]:
        parameters = dict(self.model.named_parameters())
        config = self.model.config
        names = _gguf_names(self.reader, list(parameters), config.num_hidden_layers)
        for stored in self.reader.tensors:
            if stored.name in _CONSTANTS:
                continue
            parameter = names.get(stored.name)
            if parameter is None:
                raise ModelError(f"{self.path}: tensor {stored.name} has no counterpart in transformers' model")
            yield self._aligned(stored, parameter, parameters[parameter], config)

    def _aligned(self, stored: Any, parameter: str, values: torch.Tensor, config: Any) -> Tensor:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        n_head = next((n for part, n in heads.items() if f".{part}." in stored.name), 0)
        weights = Tensor(stored.name, parameter, 0, stored).weights()
        if not np.all(np.isfinite(weights)):
            raise ModelError(
                f"{self.path}: tensor {stored.name} holds NaN or infinite weights; convert or download it again"
            )
        for candidate in (Tensor(stored.name, parameter, n, stored) for n in dict.fromkeys((0, n_head))):
            if weights.shape == tuple(values.shape) and np.array_equal(candidate.to_gguf(values), weights):
                return candidate
        raise ModelError(
            f"{self.path}: tensor {stored.name} differs from transformers' {parameter}; it cannot be mapped back"
        )


def _open(path: Path) -> Any:
    try:
        reader: Any = gguf.GGUFReader(path)
    except Exception as error:  # gguf-py raises whatever its parser trips over
        raise ModelError(f"{path}: not a readable GGUF file ({error}); download or convert it again") from None
    field = reader.get_field("general.architecture")
    check_architecture(path, field.contents() if field else "none")
    return reader


def check_architecture(path: Path, architecture: str) -> None:
    """Raises ModelError unless it is one that can be differentiated here and carried back."""
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {architecture} is not supported; give one of {', '.join(ARCHITECTURES)}"
        )


def _load(path: Path) -> Any:
    try:
        with _quiet_transformers():
            return transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            ).eval()
    except Exception as error:  # whatever its loaders trip over
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path}: transformers cannot open it ({reason})") from error


def _gguf_names(reader: Any, parameters: list[str], n_layers: int) -> dict[str, str]:
    """GGUF tensor name -> parameter name."""
    architecture = reader.get_field("general.architecture").contents()
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, n_layers)
    named = ((table.get_name(p, try_suffixes=(".weight", ".bias")), p) for p in parameters)
    return {name: parameter for name, parameter in named if name is not None}


def _interleave(values: Array, n_head: int) -> Array:
    """Rows from transformers' order (halves of each head) to llama.cpp's (pairs): its converter's `permute`."""
    rows = values.reshape(n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings; its progress bar stays."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
