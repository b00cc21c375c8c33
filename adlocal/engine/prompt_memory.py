"""A prompt's keys and values, computed once and copied for every sequence that begins with it."""

from __future__ import annotations

from collections.abc import Iterable

import llama_cpp


def can_share(contexts: Iterable[int]) -> bool:
    """Whether all contexts keep every token of a sequence, as neither sliding windows nor recurrent states do."""
    models = map(llama_cpp.llama_get_model, contexts)
    return not any(
        llama_cpp.llama_model_n_swa(m) or llama_cpp.llama_model_is_recurrent(m) or llama_cpp.llama_model_is_hybrid(m)
        for m in models
    )


def share(contexts: Iterable[int], source: int, target: int, n: int) -> None:
    """Makes the first `n` tokens of a sequence all that another one, with a stream of its own, has in each context.

    llama.cpp copies whole streams, when it decodes next, and cuts what is cut here at once (`llama_memory_seq_cp`).
    """
    for context in contexts:
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_seq_cp(memory, source, target, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory, target, n, -1)
