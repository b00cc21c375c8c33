"""The text of tokens, where a character may be spread over several."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt


def token_pieces(vocab: Any, tokens: Sequence[int]) -> list[bytes]:
    """Bytes of each token, `llama_token_to_piece`, special tokens as they are written.

    Args:
        vocab: `llama_model_get_vocab` of a model.
        tokens: ids below its `llama_vocab_n_tokens`.
    """
    # The name of an unused token, say, is all that there is of it.
    return [
        _piece(vocab, token, special=True) or bytes(llama_cpp.llama_vocab_get_text(vocab, token)) for token in tokens
    ]


def token_texts(pieces: Sequence[bytes]) -> list[str]:
    """Text of each token: joined, what their joined bytes decode to, U+FFFD for what is no UTF-8.

    A character spread over several tokens belongs to the one that completes it; those before it have no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(piece, final=i == len(pieces)) for i, piece in enumerate(pieces, 1)]


def text_of(vocab: Any, tokens: Sequence[int]) -> str:
    """What sampled tokens say. Special tokens say nothing, and bytes that make no character are left out."""
    return b"".join(_piece(vocab, token, special=False) for token in tokens).decode("utf-8", errors="ignore")


def end_tokens(vocab: Any) -> npt.NDArray[np.int32]:
    """Ids of the tokens that end generation, `llama_vocab_is_eog`, rising."""
    ids = range(llama_cpp.llama_vocab_n_tokens(vocab))
    return np.array([token for token in ids if llama_cpp.llama_vocab_is_eog(vocab, token)], dtype=np.int32)


def _piece(vocab: Any, token: int, special: bool) -> bytes:
    size = 64
    while True:  # llama-cpp-python's own buffers are of 32 bytes; it pads with zeros, or drops longer tokens
        buffer = ctypes.create_string_buffer(size)
        n: int = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def _name(vocab: Any, token: int) -> bytes:
    """All that there is of an unused token, say."""
    return bytes(llama_cpp.llama_vocab_get_text(vocab, token))
