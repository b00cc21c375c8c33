"""A Hugging Face directory written as a GGUF with the teacher's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from adlocal.errors import ConversionError
from adlocal.files import written_whole

from ..gguf_copy import Writer
from ..model.architectures import tensor_names
from .checkpoint import Checkpoint
from .transformers_to_gguf import Setting, refusal, rope_tables, settings
from .vocabulary import tokenizer_keys

_TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
# As numpy holds them; it has no BF16.
_ITEM: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}


def export_directory(
    directory: Path, teacher: Path, target: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> None:
    """Writes the language model of a Hugging Face directory as a GGUF with the teacher's tokenizer.

    Matrices stay in the type in which they are stored, F32, F16 or BF16; norms and biases become F32. One tensor at a
    time is in memory. Nothing is left at `target` if it fails.

    Args:
        directory: with config.json and safetensors.
        teacher: GGUF whose vocabulary the model shares; all its `tokenizer.*` keys are taken over.
        target: the GGUF to write.
        progress: told the bytes of tensors written, and how many there will be.

    Raises:
        ModelError: the directory or the teacher cannot be read, or the family or one of its features is not mapped.
        VocabularyError: the model's tokens are not the teacher's.
        ConversionError: the file cannot be written.
    """
    with Checkpoint(directory) as checkpoint:
        export = _Export(checkpoint, teacher)
        with written_whole(target, ConversionError) as partial:
            export.write(partial, progress)


class _Export:
    """What will be written: keys, and tensors with their types, all checked before the first byte."""

    def __init__(self, checkpoint: Checkpoint, teacher: Path) -> None:
        self._checkpoint = checkpoint
        self._arch = checkpoint.architecture
        config, directory = checkpoint.config, checkpoint.directory
        self._settings = settings(directory, config, self._arch)
        self._tables = rope_tables(config)
        self._names = tensor_names(self._arch, checkpoint.shapes, config.num_hidden_layers)
        for parameter in checkpoint.shapes:
            self._check(parameter)
        n_rows = checkpoint.shapes["model.embed_tokens.weight"][0]
        self._settings["vocab_size"] = n_rows
        self._tokenizer = tokenizer_keys(teacher, directory, n_rows)

    def write(self, path: Path, progress: Callable[[int, int], object]) -> None:
        writer = Writer(path, self._arch.name)
        try:
            self._add_keys(writer)
            total = self._announce(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for table in self._tables.values():
                writer.write_tensor_data(table)
            for parameter in self._checkpoint.shapes:
                array = self._array(parameter)
                writer.write_tensor_data(array)
                done += array.nbytes
                progress(done, total)
        finally:
            writer.close()

    def _check(self, parameter: str) -> None:
        where = self._checkpoint.directory
        if parameter not in self._names:
            raise refusal(where, f"tensor {parameter} has no place in llama.cpp's {self._arch.name}")
        if (stored := self._checkpoint.dtype(parameter)) not in _TYPES:
            raise refusal(where, f"tensor {parameter} is stored as {stored}, expected {', '.join(_TYPES)}")

    def _add_keys(self, writer: Writer) -> None:
        for key, value in self._settings.items():
            _add(writer, f"{self._arch.name}.{key}", value)
        for key, stored in self._tokenizer.items():
            writer.add_stored(key, stored)

    def _announce(self, writer: Writer) -> int:
        """Tells the writer every tensor; returns the bytes of all."""
        for name, table in self._tables.items():
            writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
        total = 0
        for parameter, shape in self._checkpoint.shapes.items():
            stored = self._stored_type(parameter)
            n_bytes = int(np.prod(shape)) * _ITEM[stored].itemsize
            writer.add_tensor_info(self._names[parameter], shape, _ITEM[stored], n_bytes, raw_dtype=_TYPES[stored])
            total += n_bytes
        return total

    def _stored_type(self, parameter: str) -> str:
        return "F32" if len(self._checkpoint.shapes[parameter]) == 1 else self._checkpoint.dtype(parameter)

    def _array(self, parameter: str) -> Any:
        """A tensor as the file holds it; BF16 as uint16."""
        tensor, name = self._checkpoint.get(parameter), self._names[parameter]
        if tensor.ndim == 1:
            tensor = tensor.float()
        if name.endswith("norm.weight"):
            tensor = tensor + self._arch.norm_offset
        array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        n_head = self._arch.interleaved_heads(name, self._checkpoint.config)
        return _interleaved(array, n_head) if n_head else np.ascontiguousarray(array)


def _interleaved(values: Any, n_head: int) -> Any:
    """Rows from transformers' order (halves of each head) to llama.cpp's (pairs): its converter's `permute`."""
    rows = values.reshape(n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))


def _add(writer: Writer, key: str, value: Setting) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
