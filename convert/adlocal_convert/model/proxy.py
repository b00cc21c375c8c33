"""The proxy in PyTorch: transformers' model, computing with the weights of the GGUF as they lie in the file.

Matrices stay in the file (`streamed`), norms and biases are parameters. Tensors keep the names and the order of the
file throughout, so that a gradient needs no way back. That the model is llama.cpp's is checked on held-out traces,
where the logits of both must agree (`fidelity`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers

from adlocal.errors import ModelError
from adlocal.llamacpp.gguf import GGUFHeader

from ..gguf_copy import open_reader
from .architectures import CONSTANTS, HEAD, TABLE, Architecture, architecture_of, tensor_names
from .gguf_to_transformers import configuration, scale_frequencies
from .streamed import Stream, StreamedEmbedding, StreamedLinear
from .weights import Tensor, WeightFile

_HEAD_PARAMETER = "lm_head.weight"


class Proxy:
    """A proxy student: the GGUF file, and transformers' model at its dequantized weights.

    `progress` is called after each tensor.

    Attributes:
        path: the GGUF.
        model: of transformers, float32, its matrices streamed from the file.
        stream: what the model's streamed layers share.
        tensors: every tensor that training would change, in file order.
        is_tied: the embedding table is the head, too.
        small: tensor name -> parameter of every norm and bias, which are not streamed.
        parameters: their names in the model.

    Raises:
        ModelError: the file is of an architecture that is not supported, a tensor has no place in the model or the
            model none in the file, or weights are not finite.
    """

    def __init__(
        self, path: Path, *, n_threads: int = 1, device: str = "cpu", progress: Callable[[], object] = lambda: None
    ) -> None:
        self.path = path
        header = GGUFHeader(path)
        self.architecture = architecture_of(path, header.get("general.architecture", "none"))
        stored = [_tensor(t) for t in self.reader.tensors]  # and let go of it: a large vocabulary takes 200 MB there
        self.weights = WeightFile(path, stored, n_threads)
        self.tensors = [t for t in stored if t.name not in CONSTANTS]
        self.is_tied = HEAD not in self.weights
        self.stream = Stream(self.weights, torch.device(device))
        self.model = _skeleton(header, self.architecture, self.weights)
        self.small: dict[str, torch.nn.Parameter] = {}
        self.parameters: dict[str, str] = {}
        self._fill(progress)
        self.model.to(device)

    def close(self) -> None:
        """Closes the file."""
        self.weights.close()

    @property
    def reader(self) -> Any:
        """gguf-py's view of the file, parsed anew."""
        return open_reader(self.path)

    @property
    def n_vocab(self) -> int:
        return self.weights.shape(TABLE)[0]

    def _fill(self, progress: Callable[[], object]) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names: dict[str, str] = tensor_names(self.architecture, parameters, self.model.config.num_hidden_layers)
        if self.is_tied:
            names[_HEAD_PARAMETER] = TABLE
        held = {t.name for t in self.tensors}
        if missing := [parameter for parameter in parameters if names.get(parameter) not in held]:
            raise ModelError(f"{self.path}: it holds no tensor for transformers' {missing[0]}; convert it again")
        if unused := held.difference(names.values()):
            raise ModelError(f"{self.path}: tensor {min(unused)} has no counterpart in transformers' model")
        for parameter, values in parameters.items():
            self._place(parameter, names[parameter], tuple(values.shape))
            progress()

    def _place(self, parameter: str, name: str, shape: tuple[int, ...]) -> None:
        """Puts one tensor of the file into the model: norms and biases as values, matrices as streamed layers."""
        if self.weights.shape(name) != shape:
            raise ModelError(
                f"{self.path}: tensor {name} is {self.weights.shape(name)}, transformers' {parameter} {shape}"
            )
        owner, _, attribute = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        self._check_finite(name)
        if len(shape) == 1:
            values = self.weights.get(name)
            offset = self.architecture.norm_offset if _is_norm(module) else 0.0
            self.small[name] = torch.nn.Parameter(torch.from_numpy(values - np.float32(offset)))
            self.parameters[name] = parameter
            setattr(module, attribute, self.small[name])
        elif isinstance(module, torch.nn.Embedding):
            self._replace(owner, StreamedEmbedding(self.stream, name, getattr(module, "scalar_embed_scale", 1.0)))
        else:
            n_head = self.architecture.interleaved_heads(name, self.model.config)
            self._replace(owner, StreamedLinear(self.stream, name, None, n_head))

    def _replace(self, owner: str, layer: torch.nn.Module) -> None:
        parent, _, child = owner.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)

    def _check_finite(self, name: str) -> None:
        if not all(np.all(np.isfinite(band)) for _, band in self.weights.bands(name)):
            raise ModelError(f"{self.path}: tensor {name} holds NaN or infinite weights; convert or download it again")

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states of sequences that start at position 0, (n_sequences, n_tokens) to (..., width).

        Padding on the right needs no mask: attention is causal.
        """
        states: torch.Tensor = self.model.model(input_ids=ids.to(self.stream.device), use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, (..., n_vocab)."""
        logits: torch.Tensor = self.model.lm_head(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)


def _tensor(stored: Any) -> Tensor:
    shape = tuple(int(n) for n in reversed(stored.shape))
    return Tensor(stored.name, shape, stored.tensor_type, int(stored.n_bytes), int(stored.data_offset))


def _skeleton(header: GGUFHeader, architecture: Architecture, weights: WeightFile) -> Any:
    """transformers' model of the file's hyperparameters, all its parameters on the meta device."""
    config = configuration(header, architecture, weights)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale_frequencies(model, header, architecture, weights)
    return model.eval()


def _is_norm(module: torch.nn.Module) -> bool:
    return "Norm" in type(module).__name__
