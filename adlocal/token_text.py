"""The text of single tokens, where a character may be spread over several."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp


def token_pieces(vocab: Any, tokens: Sequence[int]) -> list[bytes]:
    """Bytes of each token, `llama_token_to_piece`, special tokens as they are written.

    Args:
        vocab: `llama_model_get_vocab` of a model.
        tokens: ids below its `llama_vocab_n_tokens`.
    """
    return [_piece(vocab, token) for token in tokens]


def _piece(vocab: Any, token: int) -> bytes:
    size = 64
    while True:  # llama-cpp-python's own token_to_piece stops at 32 bytes and pads with zeros
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, True)
        if n > 0:
            return buffer.raw[:n]
        if n == 0:  # an unused token, say: its name is all that there is
            return bytes(llama_cpp.llama_vocab_get_text(vocab, token))
        size = -n


def token_texts(pieces: Sequence[bytes]) -> list[str]:
    """Text of each token: joined, what their joined bytes decode to, U+FFFD for what is no UTF-8.

    A character spread over several tokens belongs to the one that completes it; those before it have no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(piece, final=i == len(pieces)) for i, piece in enumerate(pieces, 1)]
