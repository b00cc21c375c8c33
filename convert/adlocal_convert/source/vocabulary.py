"""The tokenizer of an exported proxy: the teacher's, once it is shown that both number their tokens alike."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from adlocal.errors import ModelError, VocabularyError

from ..gguf_copy import AsStored, array_items, open_reader

_TOKENS, _TYPES, _SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
_UNUSED = int(gguf.TokenType.UNUSED)
# Embedding tables are padded to a multiple of at most 512 rows; a larger difference is another vocabulary.
_MOST_PADDING = 1024


def tokenizer_keys(teacher: Path, directory: Path, n_rows: int) -> dict[str, AsStored]:
    """Every `tokenizer.*` key of the teacher's GGUF, its tokens cut or padded to the proxy's embedding table.

    All rows of the table are kept, so that the proxy's softmax stays that of the model: where the teacher has fewer
    tokens, unused ones named [PADn] follow, as llama.cpp's converter pads; where it has more, they must be unused.

    Args:
        teacher: its GGUF, or the first part of one that is split.
        directory: the proxy's; its tokenizer.json, where there is one, must have the teacher's texts.
        n_rows: of the proxy's embedding table.

    Raises:
        ModelError: the teacher cannot be read, or holds no tokens.
        VocabularyError: the tokens differ; the first differing id is named.
    """
    fields = _tokenizer_fields(teacher)
    tokens, types = array_items(fields[_TOKENS]), _types(fields)
    texts = _tokenizer_json(directory)
    if n_rows - len(tokens) > _MOST_PADDING:
        raise VocabularyError(
            f"{directory} embeds {n_rows:,} tokens and {teacher} has {len(tokens):,}: too many more for padding; "
            "give a proxy of the teacher's own family"
        )
    for i, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type != _UNUSED:
            _check(i, token.decode("utf-8", errors="replace"), texts, n_rows, teacher, directory)
    keys = {name: AsStored(field) for name, field in fields.items()}
    return keys if n_rows == len(tokens) else {**keys, **_resized(fields, tokens, types, n_rows)}


def _check(i: int, token: str, texts: dict[int, str], n_rows: int, teacher: Path, directory: Path) -> None:
    other = texts.get(i, token)
    if i >= n_rows:
        raise VocabularyError(f"token {i} is {token!r} in {teacher} and {directory} embeds only {n_rows:,} tokens")
    if _spaced(other) != _spaced(token):
        raise VocabularyError(
            f"token {i} is {token!r} in {teacher} and {other!r} in {directory}; give a proxy with the teacher's tokens"
        )


def _spaced(text: str) -> str:
    """llama.cpp's converter writes some of SentencePiece's spaces as spaces."""
    return text.replace("\u2581", " ")


def _tokenizer_fields(teacher: Path) -> dict[str, Any]:
    fields = {name: field for name, field in open_reader(teacher).fields.items() if name.startswith("tokenizer.")}
    if _TOKENS not in fields:
        raise ModelError(f"{teacher}: it holds no tokens; give the GGUF that will be the teacher")
    return fields


def _types(fields: dict[str, Any]) -> list[int]:
    if _TYPES not in fields:
        return [int(gguf.TokenType.NORMAL)] * len(fields[_TOKENS].data)
    return [int(token_type) for token_type in fields[_TYPES].contents()]


def _tokenizer_json(directory: Path) -> dict[int, str]:
    """Token texts by id as the directory's tokenizer.json has them; empty without one."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        pieces = vocabulary.items() if isinstance(vocabulary, dict) else ((p[0], i) for i, p in enumerate(vocabulary))
        added = ((token["content"], token["id"]) for token in content.get("added_tokens") or [])
        return {int(i): str(text) for text, i in (*pieces, *added)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{path}: no readable tokenizer ({error}); download it again") from None


def _resized(fields: dict[str, Any], tokens: Sequence[bytes], types: Sequence[int], n_rows: int) -> dict[str, AsStored]:
    padding = range(len(tokens), n_rows)
    names = [f"[PAD{i}]".encode() for i in padding]
    all_types = [struct.pack("<i", token_type) for token_type in (*types[:n_rows], *[_UNUSED] * len(padding))]
    keys = {
        _TOKENS: AsStored.array(gguf.GGUFValueType.STRING, [*tokens[:n_rows], *names]),
        _TYPES: AsStored.array(gguf.GGUFValueType.INT32, all_types),
    }
    if _SCORES in fields:
        scores = [*array_items(fields[_SCORES])[:n_rows], *[struct.pack("<f", -10000.0)] * len(padding)]
        keys[_SCORES] = AsStored.array(gguf.GGUFValueType.FLOAT32, scores)
    return keys
