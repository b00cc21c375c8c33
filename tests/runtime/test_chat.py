"""What a chat template is found to know, on templates of a few lines that do as well-known ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from adlocal import InputError
from adlocal.llamacpp.chat import ChatTemplate
from support import tiny

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
THOUGHT = {**ANSWER, "reasoning_content": "two and two"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def chat(text: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(text, "<s>", "</s>", **more)


def each(turn: str, opened: str = "A:") -> str:
    """A template that writes `turn` for each message `m`."""
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{opened}{{% endif %}}"


PLAIN = each("{{ m.role[0] | upper }}:{{ m.content }};")


@pytest.mark.parametrize("is_open", [True, False])
def test_it_renders_as_llama_cpp_python_does(is_open: bool) -> None:
    formatter = Jinja2ChatFormatter(tiny.CHAT_TEMPLATE, "</s>", "<s>", add_generation_prompt=is_open)
    messages: list[Any] = [{"role": "system", "content": "a"}, USER, ANSWER, USER]
    rendered = chat(tiny.CHAT_TEMPLATE).render(messages, add_generation_prompt=is_open)
    assert rendered == formatter(messages=messages).prompt


# Reasoning


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_template_is_given_reasoning_under_the_name_that_it_knows(name: str) -> None:
    template = chat(each(f"{{% if m.{name} %}}[{{{{ m.{name} }}}}]{{% endif %}}{{{{ m.content }}}};"))
    assert template.reasoning_field == name
    assert template.render([USER, THOUGHT], add_generation_prompt=False) == "2+2?;[two and two]4;"


def test_a_template_that_knows_no_reasoning_gets_it_in_the_content() -> None:
    template = chat(PLAIN)
    assert (template.reasoning_field, template.drops_thoughts) == (None, False)
    rendered = template.render([USER, THOUGHT], add_generation_prompt=False)
    assert rendered == "U:2+2?;A:<think>\ntwo and two\n</think>\n\n4;"


# DeepSeek's template for R1: the thought is taken out of every content, and every answer is begun with <think>.
DROPPING = each("{{ m.role[0] | upper }}:{{ m.content.split('</think>')[-1] | trim }};", opened="A:<think>\n")


@pytest.mark.parametrize(
    ("answer", "ended", "said"),
    [
        (THOUGHT, True, "two and two\n</think>\n\n4;"),
        ({**ANSWER, "content": "<think>\nso\n</think>\n\n4"}, True, "so\n</think>\n\n4;"),
        ({**ANSWER, "content": "<think>so</think>4"}, True, "so</think>4;"),
        ({**ANSWER, "content": "so\n</think>\n\n4"}, True, "so\n</think>\n\n4;"),
        ({**ANSWER, "content": "so it"}, False, "so it;"),
    ],
    ids=["beside", "inside", "inside, no line breaks", "as it was sampled", "cut while it thought"],
)
def test_a_thought_that_the_template_drops_is_put_in_by_hand(answer: dict[str, Any], ended: bool, said: str) -> None:
    template = chat(DROPPING)
    assert template.drops_thoughts
    before, after = template.turn([USER, answer], 1, ended=ended)
    assert (before, after) == ("U:2+2?;A:<think>\n", f"U:2+2?;A:<think>\n{said}")


def test_a_dropping_template_that_begins_no_thought() -> None:
    template = chat(DROPPING.replace("A:<think>\n", "A:"))
    assert template.turn([USER, THOUGHT], 1)[1] == "U:2+2?;A:<think>\ntwo and two\n</think>\n\n4;"
    assert template.turn([USER, ANSWER], 1) == ("U:2+2?;A:", "U:2+2?;A:4;")


# Tools


def test_tools_are_known_where_they_are_written() -> None:
    template = chat("{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN)
    assert template.knows_tools
    assert not chat(PLAIN).knows_tools
    assert not template.knows_tool_calls
    rendered = template.render([USER], tools=[TOOL], add_generation_prompt=True)
    assert rendered == '[{"type": "function", "function": {"name": "add", "parameters": {}}}]U:2+2?;A:'


@pytest.mark.parametrize(
    "written", ["c.function.arguments | tojson", "'' + c.function.arguments", "c.function.arguments"]
)
def test_arguments_are_given_as_the_template_writes_them(written: str) -> None:
    """An object where it is encoded, JSON text where it is joined or written bare; neither is ever encoded twice."""
    calls = f"{{% for c in m.tool_calls or [] %}}{{{{ c.function.name + ' ' }}}}{{{{ {written} }}}}{{% endfor %}}"
    template = chat(each(f"{calls}{{{{ m.content or '' }}}};"))
    assert template.knows_tool_calls
    rendered = template.render([USER, CALLED], add_generation_prompt=False)
    assert rendered == '2+2?;add {"a": "é"};'


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ("{% if m.content is not none %}A:{{ m.content }};{% endif %}", "add;"),
        ("A:{{ m.content }};", "add;A:;"),
        ("{{ 'A:' + m.content }};", "add;A:;"),
    ],
    ids=["told apart", "written", "joined"],
)
def test_a_call_has_no_content_where_the_template_can_take_that(content: str, rendered: str) -> None:
    """DeepSeek's writes an empty content as a turn of its own; others write "None", or fail."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }};{% endfor %}"
    assert chat(each(calls + content)).render([CALLED], add_generation_prompt=False) == rendered


def test_the_template_for_tools_takes_the_place_of_the_other() -> None:
    template = chat(PLAIN, for_tools=chat("{{ tools[0].function.name }};" + PLAIN))
    assert template.knows_tools
    assert template.render([USER], tools=[TOOL], add_generation_prompt=True) == "add;U:2+2?;A:"
    assert template.turn([USER, ANSWER], 1, tools=[TOOL])[1] == "add;U:2+2?;A:4;"
    assert template.render([USER], add_generation_prompt=True) == "U:2+2?;A:"


# Parts


def test_a_template_that_wants_parts_is_given_parts() -> None:
    """As those of models that see; a text would be walked through letter by letter."""
    template = chat(
        each("{{ m.role[0] }}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};")
    )
    assert template.render([USER, THOUGHT], add_generation_prompt=False) == (
        "u2+2?;a<think>\ntwo and two\n</think>\n\n4;"
    )


# Refusals


def test_a_template_that_refuses_is_told() -> None:
    with pytest.raises(InputError, match=r"^the model's chat template refuses the messages: not today$"):
        chat("{{ raise_exception('not today') }}").render([USER], add_generation_prompt=True)
    with pytest.raises(InputError, match=r"^the model's chat template has no place for calls of tools: not today$"):
        chat("{{ raise_exception('not today') }}").render([USER, CALLED], add_generation_prompt=True)


class Model:
    """What `ChatTemplate.of` asks a model."""

    def __init__(self, **templates: str) -> None:
        self._templates = templates

    def metadata(self) -> dict[str, str]:
        return {f"tokenizer.chat_template{name.replace('default', '')}": text for name, text in self._templates.items()}

    def token_bos(self) -> int:
        return 1

    def token_eos(self) -> int:
        return -1

    def token_get_text(self, token: int) -> str:
        return "<s>"


def test_a_models_templates_are_found() -> None:
    make: Callable[..., Any] = Model
    assert ChatTemplate.of(make()) is None
    template = ChatTemplate.of(make(**{"default": "{{ bos_token }}{{ eos_token }}.", ".tool_use": "{{ tools[0] }}"}))
    assert template is not None
    assert template.render([USER], add_generation_prompt=True) == "<s>."
    assert template.render([USER], tools=["x"], add_generation_prompt=True) == "x"
    with pytest.raises(InputError, match=r"the model's chat template cannot be parsed: .*; give a GGUF with another"):
        ChatTemplate.of(make(default="{% for %}"))
