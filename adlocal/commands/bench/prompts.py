"""What bench goes on from."""

from __future__ import annotations

import itertools
from contextlib import closing

import llama_cpp

from ...errors import InputError

_TEXT = "Once upon a time, in a small town by the sea, there lived an old clockmaker who"
_N_OWN = 24


def prompt(llm: llama_cpp.Llama, text: str | None) -> list[int]:
    """Tokens of a text, by default of the beginning of a story.

    A vocabulary of words alone cannot spell one, and llama.cpp ends the process that asks it to. Then the default is
    what the model itself says from its first token on.

    Raises:
        InputError: the vocabulary cannot spell the text, or has no first token.
    """
    if not _spells(llm):
        return _of_words(llm, text)
    try:
        return llm.tokenize((_TEXT if text is None else text).encode())
    except UnicodeEncodeError:
        raise InputError("--prompt is not valid UTF-8") from None


def _spells(llm: llama_cpp.Llama) -> bool:
    """Whether there is a token for every byte, as in all vocabularies that are not of words alone."""
    vocab = llm._model.vocab
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
        return True
    ids = range(llama_cpp.llama_vocab_n_tokens(vocab))
    return any(llama_cpp.llama_vocab_get_attr(vocab, i) & llama_cpp.LLAMA_TOKEN_ATTR_BYTE for i in ids)


def _of_words(llm: llama_cpp.Llama, text: str | None) -> list[int]:
    first = llama_cpp.llama_vocab_bos(llm._model.vocab)
    if text is not None or first < 0:
        raise InputError("--prompt: the teacher's vocabulary has no bytes to spell a text with; leave --prompt out")
    llm.set_seed(1)
    with closing(llm.generate([first], temp=1.0)) as stream:
        return [first, *itertools.islice(stream, _N_OWN)]
