"""Do teacher and proxy number their tokens alike? Their ids are exchanged as they are, never as text."""

from __future__ import annotations

import llama_cpp
from llama_cpp._internals import LlamaModel

from .errors import VocabularyError


def shared_vocabulary(teacher: LlamaModel, proxy: LlamaModel) -> int:
    """Number of leading token ids that teacher and proxy share; padding may make one of them longer.

    Special tokens must be shared; the roles they play (a base model's end of sequence is often another token than its
    chat version's) may differ, because Δ compares ids and does not read roles.

    Raises:
        VocabularyError: naming the first id whose text or type differs, or a special token that the proxy lacks.
    """
    n_shared = min(teacher.n_vocab(), proxy.n_vocab())
    if n_shared == 0:
        raise VocabularyError(
            "the teacher or the proxy has no vocabulary; both need the tokenizer they were trained with"
        )
    get_text, get_attr = llama_cpp.llama_vocab_get_text, llama_cpp.llama_vocab_get_attr
    for token in range(n_shared):
        ours, theirs = get_text(teacher.vocab, token), get_text(proxy.vocab, token)
        if ours != theirs or get_attr(teacher.vocab, token) != get_attr(proxy.vocab, token):
            raise VocabularyError(
                f"token {token} is {_show(ours)} (type {get_attr(teacher.vocab, token)}) to the teacher and "
                f"{_show(theirs)} (type {get_attr(proxy.vocab, token)}) to the proxy; "
                "convert a proxy that shares the teacher's tokenizer"
            )
    beyond = [token for token in _special_tokens(teacher) if token >= n_shared]
    if beyond:
        raise VocabularyError(
            f"the teacher's special token {beyond[0]} lies beyond the proxy's {n_shared} tokens; "
            "convert a proxy that shares the teacher's tokenizer"
        )
    return n_shared


def _special_tokens(model: LlamaModel) -> set[int]:
    vocab = model.vocab
    roles = ("bos", "eos", "eot", "sep", "nl", "pad", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
    ids = {int(getattr(llama_cpp, f"llama_vocab_{role}")(vocab)) for role in roles}
    return {token for token in ids if token >= 0}


def _show(text: bytes | None) -> str:
    return repr(text.decode("utf-8", errors="replace")) if text is not None else "nothing"
