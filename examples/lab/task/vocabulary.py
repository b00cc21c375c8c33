"""The laboratory's vocabulary, a word a token, as a GGUF whose tokenizer every model of the laboratory takes over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf

from .word_problems import words

# A word with the space before it is a user-defined token, which llama.cpp finds in a text before it tokenizes the rest.
SPECIAL = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = range(3)
TOKENS = (*SPECIAL, *(f" {word}" for word in words()))
IDS = {token: i for i, token in enumerate(TOKENS)}
N_VOCAB = len(TOKENS)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def encode(text: str) -> list[int]:
    """Ids of a text of the task; every word begins with a space."""
    return [IDS[f" {word}"] for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    """The text of ids; special tokens say nothing."""
    return "".join(TOKENS[i] for i in ids if i >= len(SPECIAL))


def write_vocabulary(path: Path) -> None:
    """Writes a GGUF with the tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * N_VOCAB)
    words_defined = [kinds.USER_DEFINED] * (N_VOCAB - len(SPECIAL))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *words_defined])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
