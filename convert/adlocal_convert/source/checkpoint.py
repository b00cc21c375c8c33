"""A Hugging Face directory: its configuration, and its weights read one tensor at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from adlocal.errors import ModelError

from ..model.architectures import ARCHITECTURES, Architecture, stored_as
from .hub import CONFIG, INDEX, SINGLE
from .transformers_to_gguf import refusal

_VISION = ("vision_tower.", "multi_modal_projector.")


class Checkpoint:
    """The language model of a directory with config.json and safetensors. A context manager.

    Attributes:
        directory: where it lies.
        architecture: the family that it is stored as in a GGUF.
        config: transformers' configuration of the language model.
        shapes: of the parameters that transformers gives it, by name.

    Raises:
        ModelError: a file is missing or broken, the family is not mapped, the weights are quantized, or they are not
            those of the configuration.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = _json(directory / CONFIG)
        text = raw.get("text_config") or raw
        architecture = stored_as(str(text.get("model_type")))
        if architecture is None:
            raise refusal(directory, f"model_type {text.get('model_type')} is none of {', '.join(_model_types())}")
        if quantization := raw.get("quantization_config"):
            raise refusal(directory, f"its weights are quantized ({quantization.get('quant_method')})")
        self.architecture: Architecture = architecture
        self.config = _configuration(directory)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._files = ExitStack()
        try:
            self._tensors = self._open()
            self._check()
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def dtype(self, parameter: str) -> str:
        """As safetensors names it: F32, F16, BF16, ..."""
        file, stored = self._tensors[parameter]
        return str(file.get_slice(stored).get_dtype())

    def get(self, parameter: str) -> torch.Tensor:
        """One tensor, read now."""
        file, stored = self._tensors[parameter]
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor

    def _open(self) -> dict[str, tuple[Any, str]]:
        """Parameter name -> open file and the name that the tensor has there."""
        tensors: dict[str, tuple[Any, str]] = {}
        for path in self._paths():
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error}); download it again") from None
            tensors |= {name: (file, stored) for stored in file.keys() if (name := _parameter(stored))}  # noqa: SIM118
        return tensors

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX
        names = sorted(set(_json(index)["weight_map"].values())) if index.exists() else [SINGLE]
        paths = [self.directory / name for name in names]
        if missing := next((path for path in paths if not path.exists()), None):
            raise ModelError(f"{self.directory}: {missing.name} is missing; download it, or save as safetensors")
        return paths

    def _check(self) -> None:
        """The tensors are the model's parameters, no more and no less."""
        for name, shape in self.shapes.items():
            if name not in self._tensors:
                raise ModelError(f"{self.directory}: no file holds {name}; download the model again")
            file, stored = self._tensors[name]
            found = tuple(file.get_slice(stored).get_shape())
            if found != shape:
                raise ModelError(f"{self.directory}: {name} is {found}, and {CONFIG} makes it {shape}")
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        if unknown := self._tensors.keys() - self.shapes.keys() - tied:
            raise refusal(self.directory, f"tensor {min(unknown)} has no place in {self.architecture.name}")


def _parameter(stored: str) -> str | None:
    """The language model's name of a tensor; None if it is no weight of the language model."""
    if any(part in stored for part in _VISION) or stored.endswith("rotary_emb.inv_freq"):
        return None
    _, inside, name = stored.partition("language_model.")
    if not inside:
        return stored
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; give a directory with {CONFIG} and safetensors, or a GGUF") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(content).__name__}; download it again")
    return content


def _configuration(directory: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validation raises errors of several libraries
        reason = " ".join(str(error).split())
        raise ModelError(f"{directory / CONFIG}: transformers refuses it ({reason}); download it again") from None
    return config.get_text_config()


def _model_types() -> list[str]:
    return [model_type for architecture in ARCHITECTURES.values() for model_type in architecture.model_types]
