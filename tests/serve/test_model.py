"""What the gateway reads of a model: which tokens there are, which of them control it, and where it reasons."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from adlocal.errors import ModelError
from adlocal.serve.config import Config
from adlocal.serve.events import Failed
from adlocal.serve.model import CONTROL_MAX, read_model
from adlocal.serve.tags import Tags

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
TOKENS = ["a", "b", "<|end|>", "<think>", "</think>"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", TOKENS)


def write(path: Path, tokens: list[str]) -> Path:
    """A model without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(TEMPLATE)
    writer.add_tokenizer_model("gpt2")
    if tokens:
        normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        writer.add_token_list(tokens)
        writer.add_token_types([normal, normal, control, user, user])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_control_tokens_and_tags_are_read(path: Path) -> None:
    """Without them nothing that a client writes would be neutralized, and no reasoning hidden."""
    model = read_model(Config(model=path))
    assert model.control == {"<|end|>", "<think>", "</think>"}
    assert model.tags == Tags("<think>", "</think>", 3, 4)
    assert model.template == TEMPLATE
    assert model.n_vocab == len(TOKENS)


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no vocabulary"):
        read_model(Config(model=write(tmp_path / "model.gguf", [])))


def test_tokens_that_there_are_not_are_refused(path: Path) -> None:
    model = read_model(Config(model=path))
    model.check_tokens([0, 4], "tokens")
    with pytest.raises(Failed) as caught:
        model.check_tokens([0, 5], "tokens")
    assert (caught.value.status, caught.value.message) == (400, "tokens: 5: this model's tokens are 0 to 4")


def test_too_many_control_tokens_in_raw_text_are_refused(path: Path) -> None:
    """However they are spread over prompts: the engine takes minutes for a hundred thousand."""
    model = read_model(Config(model=path))
    model.check_text(["<|end|>" * CONTROL_MAX, "a" * 10**5], "prompt")
    with pytest.raises(Failed) as caught:
        model.check_text(["<|end|>" * CONTROL_MAX, "<think>"], "prompt")
    assert caught.value.status == 400
    assert f"{CONTROL_MAX + 1} control tokens" in caught.value.message
