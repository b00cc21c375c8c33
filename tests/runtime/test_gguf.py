"""The reader and writer of GGUF headers, against llama.cpp's own functions."""

from __future__ import annotations

import ctypes
import os
import random
import re
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from adlocal.errors import ModelError
from adlocal.llamacpp.ggml import InitParams, ggml
from adlocal.llamacpp.ggml_types import GGML_TYPES
from adlocal.llamacpp.gguf import GGUFHeader, write_metadata
from adlocal.llamacpp.log import captured_log

_open = ggml.gguf_init_from_file
_open.restype, _open.argtypes = ctypes.c_void_p, (ctypes.c_char_p, InitParams)
_free = ggml.gguf_free
_free.restype, _free.argtypes = None, (ctypes.c_void_p,)


def opens(path: Path) -> bool:
    """Whether llama.cpp reads its header."""
    with captured_log():
        context = _open(os.fsencode(path), InitParams(no_alloc=True, ctx=None))
    if context:
        _free(context)
    return bool(context)


def is_read(path: Path) -> bool:
    """Whether we do. A file that ends in its tensors' data has been read."""
    try:
        GGUFHeader(path)
    except ModelError as error:
        return "truncated at" in str(error)
    return True


def test_the_types_are_ggmls() -> None:
    ggml.ggml_type_name.restype, ggml.ggml_type_name.argtypes = ctypes.c_char_p, (ctypes.c_int,)
    ggml.ggml_blck_size.restype, ggml.ggml_blck_size.argtypes = ctypes.c_int64, (ctypes.c_int,)
    ggml.ggml_type_size.restype, ggml.ggml_type_size.argtypes = ctypes.c_size_t, (ctypes.c_int,)
    declared = (Path(llama_cpp.__file__).parent.parent / "include" / "ggml.h").read_text(encoding="utf-8")
    (n_types,) = re.findall(r"GGML_TYPE_COUNT\s*= (\d+)", declared)
    there_are = {
        i: (ggml.ggml_type_name(i).decode().upper(), ggml.ggml_blck_size(i), ggml.ggml_type_size(i))
        for i in range(int(n_types))
        if ggml.ggml_blck_size(i)
    }
    assert there_are == GGML_TYPES


def test_a_models_header_is_as_another_reader_finds_it(tiny_llama: Path) -> None:
    header, other = GGUFHeader(tiny_llama), gguf.GGUFReader(tiny_llama)
    assert [(t.name, t.ggml_type, t.offset, t.n_bytes) for t in header.tensors] == [
        (t.name, int(t.tensor_type), t.data_offset, t.n_bytes) for t in other.tensors
    ]
    fields = {name: field for name, field in other.fields.items() if not name.startswith("GGUF.")}
    assert {name for name in fields if header.type_of(name) is None} == set()
    kept = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.")}
    assert kept
    assert {name: header.get(name) for name in kept} == kept
    assert header.get("tokenizer.ggml.tokens") is None
    assert header.type_of("tokenizer.ggml.tokens") == "ARRAY of STRING"


def test_rows_of_blocks(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    for kind, n_bytes in ((gguf.GGMLQuantizationType.Q4_K, 288), (gguf.GGMLQuantizationType.Q8_0, 68)):
        writer.add_tensor(kind.name, np.zeros((3, n_bytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert opens(tmp_path / "m.gguf")
    first, second = GGUFHeader(tmp_path / "m.gguf").tensors
    assert (first.n_bytes, second.n_bytes) == (3 * 288, 3 * 68)
    assert (first.offset % 64, second.offset - first.offset) == (0, 896)


def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    write_metadata(tmp_path / "m.gguf", [("a", 1, "UINT32"), ("b", ["x", ""], "STRING"), ("c", [], "FLOAT64")])
    assert opens(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").stat().st_size % 32 == 0


def spoiled(whole: bytes, end: int, seed: int) -> bytes:
    """Cut somewhere in the first `end` bytes, or one of them changed."""
    chosen = random.Random(seed)
    at = chosen.randrange(end)
    if seed % 4 == 0:
        return whole[:at]
    return whole[:at] + bytes([chosen.choice((0, 1, 9, 64, 255, whole[at] ^ 1))]) + whole[at + 1 :]


@pytest.mark.parametrize("of", ["model", "keys"])
def test_what_llama_cpp_refuses_is_refused(of: str, tiny_llama: Path, tmp_path: Path) -> None:
    """And nothing else, over damage in every part of the header."""
    path = tmp_path / "m.gguf"
    write_metadata(path, [("a", 2, "UINT32"), ("b", ["x", "yz"], "STRING"), ("c", True, "BOOL"), ("d", -1, "INT32")])
    whole = tiny_llama.read_bytes() if of == "model" else path.read_bytes()
    end = min(t.offset for t in GGUFHeader(tiny_llama).tensors) if of == "model" else len(whole)
    outcomes = set()
    for seed in range(600):
        path.write_bytes(spoiled(whole, end, seed))
        assert is_read(path) == opens(path), (seed, path)
        outcomes.add(is_read(path))
    assert outcomes == {True, False}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\1\0\0\0" + bytes(16), b"noise" * 20])
def test_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf: not a readable GGUF file \(.+\); download or convert it again"):
        GGUFHeader(tmp_path / "m.gguf")
