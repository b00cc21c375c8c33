"""Tags are found in templates, and whether a prompt ends between them in what is rendered."""

from __future__ import annotations

import pytest

from adlocal.errors import InputError
from adlocal.serve.disclosure import scrub
from adlocal.serve.neutral import neutralize
from adlocal.serve.tags import PAIRS, UNTAGGED, Tags, check_hideable, opens_hidden, tags_of, untagged

QWEN = "{%- if '</think>' in content %}{{ content.split('</think>')[-1] }}{% endif %}<|im_start|>assistant\n<think>\n"
THINK = Tags("<think>", "</think>")


@pytest.mark.parametrize(("open", "close"), PAIRS)
def test_each_pair_is_found_in_a_template(open: str, close: str) -> None:
    tags = tags_of(f"{{{{ '{open}' + message.reasoning_content + '{close}' + message.content }}}}", {close: 7})
    assert tags == Tags(open, close, None, 7)
    assert not tags.bannable
    assert open not in close
    assert close not in open


def test_a_template_that_only_cuts_at_the_close_names_the_pair() -> None:
    tags = tags_of("{{ content.split('</think>')[-1] }}", {"<think>": 5, "</think>": 6})
    assert tags == Tags("<think>", "</think>", 5, 6)
    assert tags.bannable


def test_a_tag_of_several_tokens_is_known_by_the_one_that_begins_it() -> None:
    template = "{{ '<|channel>thought\n' + thinking + '\n<channel|>' }}"
    assert tags_of(template, {"<|channel>": 3, "<channel|>": 4}) == Tags("<|channel>thought", "<channel|>", 3, 4)


def test_a_template_without_reasoning_has_no_tags() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert tags_of(template, {}) is None
    assert untagged(template) is None
    check_hideable(template)
    check_hideable(QWEN)
    assert not opens_hidden("<think>", None)


@pytest.mark.parametrize(("name", "marks"), UNTAGGED)
def test_reasoning_that_is_not_between_tags_cannot_be_hidden(name: str, marks: tuple[str, ...]) -> None:
    template = "<think></think>".join(["", *marks])
    assert tags_of(template, {}) is None
    with pytest.raises(InputError, match=r'set disclosure to "show"') as raised:
        check_hideable(template)
    assert name in str(raised.value)


def test_reasoning_in_an_unknown_format_cannot_be_hidden() -> None:
    template = "{%- set close = '</think{}>'.format(X) %}{{ message.reasoning_content + close }}"
    assert tags_of(template, {}) is None
    with pytest.raises(InputError, match="does not know"):
        check_hideable(template)


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n</think>", False),
        ("<think>1</think>Yes<|im_end|><|im_start|>assistant\n", False),
        ("<think>1</think>Yes<|im_end|><|im_start|>assistant\n<think>So", True),
        ("<|im_start|>assistant\n<think>So</think>Then <think>no", True),
    ],
)
def test_the_last_tag_of_a_prompt_decides(prompt: str, opened: bool) -> None:
    assert opens_hidden(prompt, THINK) is opened


@pytest.mark.parametrize("said", ["<think>", "</think>", "a <think> b", "<think><think>", "<thi", "ink>"])
@pytest.mark.parametrize("tail", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
def test_what_users_and_earlier_answers_say_never_matters(said: str, tail: str) -> None:
    answer = scrub([{"role": "assistant", "content": said}], THINK)[0]["content"]
    user = neutralize(said, {"<|im_end|>", THINK.open, THINK.close})
    assert opens_hidden(f"{user}<|im_end|>{answer}<|im_end|>{user}<|im_end|>{tail}", THINK) is ("<think>" in tail)
