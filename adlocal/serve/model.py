"""What the gateway knows of the teacher, from its GGUF: nothing of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, ModelError
from ..llamacpp.gguf import GGUFHeader
from .config import Config
from .events import Failed
from .neutral import count
from .tags import Tags, check_hideable, tags_of

_CONTROL, _USER_DEFINED = 3, 4  # enum llama_token_type
#: In raw prompts: as many as a chat of the most messages that may be sent has.
CONTROL_MAX = 16384


@dataclass(frozen=True)
class Model:
    """The teacher.

    Attributes:
        name: for clients.
        created: seconds since 1970; of its file.
        template: its chat template.
        tags: around its reasoning; None where it does not reason.
        control: texts that clients' messages may not contain as such.
        n_vocab: tokens that there are.
    """

    name: str
    created: int
    template: str
    tags: Tags | None
    control: frozenset[str]
    n_vocab: int

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Refuses tokens that there are not, of which the engine would say that they are its own fault.

        Raises:
            Failed: 400.
        """
        for token in tokens:
            if token >= self.n_vocab:
                message = f"{token}: this model's tokens are 0 to {self.n_vocab - 1}"
                raise Failed(400, "invalid_request_error", f"{param}: {message}", param)

    def check_text(self, texts: Iterable[str], param: str) -> None:
        """Refuses raw text with more control tokens than a chat has: reading it takes time quadratic in them.

        Raises:
            Failed: 400.
        """
        n = sum(count(text, self.control) for text in texts)
        if n > CONTROL_MAX:
            message = f"{param}: {n} control tokens; at most {CONTROL_MAX} are allowed"
            raise Failed(400, "invalid_request_error", message, param)


def read_model(config: Config) -> Model:
    """Reads the header of the configuration's model.

    Raises:
        ModelError: it cannot be read.
        InputError: policy hides reasoning, which stands in a form that cannot be hidden.
    """
    path = Path(config.model or "")
    header = GGUFHeader(path, tokenizer=True)
    texts, types = header.get("tokenizer.ggml.tokens", []), header.get("tokenizer.ggml.token_type", [])
    if not texts:
        raise ModelError(f"{path}: has no vocabulary, so that control tokens cannot be told; give a model that has one")
    special = {
        text: i for i, (text, kind) in enumerate(zip(texts, types, strict=False)) if kind in (_CONTROL, _USER_DEFINED)
    }
    template = header.get("tokenizer.chat_template", "")
    if config.reasoning_tags is not None:
        given = config.reasoning_tags
        tags: Tags | None = Tags(given.open, given.close, special.get(given.open), special.get(given.close))
    else:
        if any(rule.disclosure not in (None, "show") for _, rule in config.policy.named_rules()):
            _check_own_template(config)
            check_hideable(template)
        tags = tags_of(template, special)
    control = {text for text, i in special.items() if types[i] == _CONTROL}
    name = config.alias or header.get("general.name") or path.stem
    return Model(
        name=name,
        created=int(path.stat().st_mtime),
        template=template,
        tags=tags,
        control=frozenset(control | ({tags.open, tags.close} if tags else set())),
        n_vocab=len(texts),
    )


def _check_own_template(config: Config) -> None:
    """Refuses another template than the model's, of which nothing is known here.

    Raises:
        InputError: the engine's flags give one.
    """
    for flag in config.engine.flags:
        if flag.partition("=")[0] in ("--chat-template", "--chat-template-file"):
            raise InputError(
                f"engine flag {flag}: another template than the model's own, so it is not known where reasoning that "
                "is to be hidden stands; say so with [reasoning_tags] open = ... and close = ..., or leave it out"
            )
