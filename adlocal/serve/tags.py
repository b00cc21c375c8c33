"""Between which tags a model reasons, from its chat template, and whether a prompt ends between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError

#: What known templates put reasoning between, the rarer first: some speak of <think> beside their own.
PAIRS = (
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere Command
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, SmolLM3, LFM2.5, ...
    ("<thinking>", "</thinking>"),  # Apriel 1.5
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
)
#: Tags of several tokens that nothing but one token begins.
BEGINNINGS = {"<|channel>thought": "<|channel>"}

#: Formats without two tags in the raw text, and what llama.cpp, too, knows their templates by. In Kimi K3's and
#: Ling 3's, llama-server takes the tags out of the raw text and leaves the reasoning in.
UNTAGGED = (
    ("channels, as gpt-oss has them", ("<|channel|>",)),
    ("Muse Glimmer's messages to itself", ("<atem:function_calls>", "<|eom|>")),
    ("Kimi K3's sections", ("<|open|>", "<|close|>", "<|end_of_msg|>")),
    ("Ling 3's blocks, whose tags llama-server removes", ("<role>ASSISTANT</role>", "<arg_key>")),
    ("a turn of its own, as Solar Open has it", ("<|begin|>assistant<|think|>",)),
    ("the text before [BEGIN FINAL RESPONSE]", ("[BEGIN FINAL RESPONSE]",)),
)
#: A template with one of these renders or asks for reasoning.
REASONS = re.compile(r"reasoning_content|enable_thinking|<think|<\|think|\[THINK")


@dataclass(frozen=True)
class Tags:
    """What reasoning stands between.

    Attributes:
        open, close: as text.
        open_id, close_id: of the token that is the tag, or that alone begins it; None where it is of several tokens.
    """

    open: str
    close: str
    open_id: int | None = None
    close_id: int | None = None

    @property
    def bannable(self) -> bool:
        """Whether neither can be written where two tokens are forbidden."""
        return self.open_id is not None and self.close_id is not None


def untagged(template: str) -> str | None:
    """What a chat template's reasoning stands in if not between two tags that adlocal knows; None if there is none."""
    for name, marks in UNTAGGED:
        if all(mark in template for mark in marks):
            return name
    if REASONS.search(template) and not any(close in template for _, close in PAIRS):
        return "a format that adlocal does not know"
    return None


def tags_of(template: str, tokens: Mapping[str, int]) -> Tags | None:
    """The tags of a chat template.

    Args:
        template: its source.
        tokens: the vocabulary's control and user-defined tokens by their text. An ordinary token can be written in
            other ways, so that it does not help to ban it.

    Returns:
        None for a template without reasoning, and for one whose reasoning is not between two tags (`untagged`).
    """
    if untagged(template) is not None:
        return None
    for open, close in PAIRS:
        if close in template:  # some speak of the close only, to cut earlier turns there
            return Tags(open, close, tokens.get(BEGINNINGS.get(open, open)), tokens.get(close))
    return None


def check_hideable(template: str) -> None:
    """Checks that a template's reasoning can be hidden.

    Raises:
        InputError: it is not between two tags.
    """
    name = untagged(template)
    if name is not None:
        raise InputError(
            f"the model's chat template has its reasoning in {name}, where adlocal cannot hide it; "
            'set disclosure to "show", or serve a model that reasons between tags such as <think> and </think>'
        )


def opens_hidden(rendered_prompt: str, tags: Tags | None) -> bool:
    """Whether a rendered prompt ends between the tags: its template, or the answer's given beginning, opened them.

    Tags that others than the template have written into it count as well. So those of users are broken before
    (`neutral`, with the tags among the control tokens), and those of earlier answers taken out (`scrub`). Where one
    is left, the answer is taken for reasoning: hidden, never shown.
    """
    if tags is None:
        return False
    return rendered_prompt.rfind(tags.open) > rendered_prompt.rfind(tags.close)
