"""Encoders of tiny models by chat template, and what an encoded trace says in words."""

from __future__ import annotations

from pathlib import Path

from adlocal.llamacpp.model import open_vocabulary
from adlocal.traces import EncodedTrace, Trace, TraceEncoder
from support import tiny

_SPECIAL = {tiny.BOS: b"<s>", tiny.EOS: b"</s>"}


class Encoders:
    """Opens the vocabulary of a tiny model with the given chat template, once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._weights = folder, tiny.tiny_model(num_hidden_layers=1)
        self._encoders: dict[tuple[str | None, bool], TraceEncoder] = {}

    def __call__(self, template: str | None = tiny.CHAT_TEMPLATE, raw: bool = False) -> TraceEncoder:
        key = template, raw
        if key not in self._encoders:
            path = tiny.write_gguf(self._weights, self._folder / f"{len(self._encoders)}.gguf", template)
            self._encoders[key] = TraceEncoder(open_vocabulary(path), raw=raw)
        return self._encoders[key]

    def says(self, trace: Trace, template: str | None = tiny.CHAT_TEMPLATE, raw: bool = False) -> tuple[str, list[str]]:
        """The whole text of a trace, and each run of text that is learned."""
        encoded = self(template, raw).encode(trace)
        return text_of(encoded.tokens), runs(encoded)


def text_of(tokens: list[int]) -> str:
    """What tokens of tiny's vocabulary say: a byte is a token, and so is each special one."""
    return b"".join(_SPECIAL.get(token, bytes([token % 256])) for token in tokens).decode()


def runs(encoded: EncodedTrace) -> list[str]:
    """Each unbroken run of targets."""
    found: list[list[int]] = []
    before = False
    for token, is_target in zip(encoded.tokens, encoded.targets, strict=True):
        if is_target:
            found = found if before else [*found, []]
            found[-1].append(token)
        before = is_target
    return [text_of(run) for run in found]
