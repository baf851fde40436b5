"""The stand-in for Ollama formats chats as real servers were measured to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.standins.ollama_templates import formatter
from tests.support.ollama_client import (
    GO,
    OLD,
    PLAIN,
    RULE,
    THINKING,
    TURNS,
    WITH_TOOLS,
    Client,
)

BY_JINJA, BY_GO = "<user> Hi <assistant>", "[user] Hi [assistant]"


@pytest.mark.parametrize(
    ("jinja", "sent", "prompt", "shown"),
    [
        (PLAIN, {}, BY_JINJA, PLAIN),
        (PLAIN, {"template": GO}, BY_GO, GO),
        (WITH_TOOLS, {"template": GO}, BY_JINJA, WITH_TOOLS),
        (THINKING, {"template": GO}, BY_JINJA + "<think>", THINKING),
        (None, {"template": GO}, BY_GO, GO),
        (None, {}, "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n", "{{ .Prompt }}"),
    ],
    ids=["only Jinja", "plain Jinja", "tools", "thinking", "only Go", "neither"],
)
def test_who_formats_a_chat(client: Client, jinja: str | None, sent: dict[str, Any], prompt: str, shown: str) -> None:
    client.create(jinja, **sent)
    assert client.prompt() == prompt
    assert client.show()["template"] == shown


@pytest.mark.parametrize("client", [OLD], indirect=True)
def test_an_old_server_formats_by_go_alone_and_tells_no_prompt(client: Client) -> None:
    client.create(WITH_TOOLS, template=GO)
    answer = client.chat(_debug_render_only=True)
    assert "_debug_info" not in answer and answer["eval_count"] == 2
    assert client.show()["template"] == GO
    tokens = answer["prompt_eval_count"]
    client.create(WITH_TOOLS, "bare")
    assert client.show("bare")["template"] == "{{ .Prompt }}"
    assert client.chat("bare")["prompt_eval_count"] < tokens, "the bare words"


def test_a_template_of_gos_that_knows_as_much_is_preferred() -> None:
    knows_tools = GO + "{{ .Tools }}"
    assert formatter(WITH_TOOLS, knows_tools, knows_jinja=True).engine == "go"
    assert formatter(WITH_TOOLS, GO, knows_jinja=True).engine == "jinja"
    assert formatter(WITH_TOOLS, GO, knows_jinja=False).engine == "go"
    assert formatter(THINKING, knows_tools, knows_jinja=True).engine == "go", "neither knows more"


@pytest.mark.parametrize(
    ("text", "abilities"),
    [
        ("tool_call", {"tools"}), ("<think>", set()), ("<think></think>", {"thinking"}),
        ("content.split('</think>')", {"thinking"}), ('content.split("</think>") reasoning_content', set()),
    ],
)  # fmt: skip
def test_abilities_are_read_from_a_templates_words(text: str, abilities: set[str]) -> None:
    assert formatter(text, None, knows_jinja=True).capabilities == abilities


@pytest.mark.parametrize("sent", [{}, {"template": GO}], ids=["by Jinja", "by Go"])
def test_tokens_are_counted_with_the_one_at_the_beginning_and_the_prompt_is_shown_without(
    client: Client, sent: dict[str, Any], tmp_path: Path
) -> None:
    plain, counts = client.gguf.read_bytes(), []
    key = b"tokenizer.ggml.add_bos_token\x07\0\0\0"
    at = plain.index(key) + len(key)
    for adds_bos in (0, 1):
        client.gguf = tmp_path / "model.gguf"
        client.gguf.write_bytes(plain[:at] + bytes([adds_bos]) + plain[at + 1 :])
        client.create("{{ bos_token }}" * adds_bos + PLAIN, **sent)
        assert client.prompt() == (BY_GO if sent else BY_JINJA)
        counts.append(client.chat()["prompt_eval_count"])
    assert counts[1] == counts[0] + 1


def test_names_over_one_file_are_formatted_as_the_one_that_was_loaded_first(client: Client) -> None:
    client.create(PLAIN, "first")
    client.create(PLAIN, "second", template=GO)
    assert [client.prompt(name) for name in ("first", "second")] == [BY_JINJA, BY_JINJA]
    assert client.show("second")["template"] == GO
    assert client.unload("first") == "unload"
    assert [client.prompt(name) for name in ("second", "first")] == [BY_GO, BY_GO]


def test_a_prompt_alone_is_shown_or_left_out(client: Client) -> None:
    client.create(PLAIN)
    shown = client.post("generate", model="it", prompt=" Hi ", _debug_render_only=True).json()
    assert shown["_debug_info"]["rendered_template"] == BY_JINJA
    assert client.post("generate", model="it", prompt="Hi").status_code == 501
    assert client.post("generate", model="it", prompt="").json()["done_reason"] == "load"


def test_a_system_prompt_is_put_before_a_chat_that_does_not_begin_with_one(client: Client) -> None:
    client.create(PLAIN, system="S")
    late = [*TURNS, {"role": "system", "content": "T"}]
    assert client.prompt() == "<system>S" + BY_JINJA
    assert client.prompt(messages=late) == "<system>S<user> Hi <system>T<assistant>"
    assert client.prompt(messages=late[::-1]) == "<system>T" + BY_JINJA


TOOL = {
    "type": "function",
    "function": {
        "name": "sum",
        "strict": True,
        "parameters": {
            "properties": {"a": {"description": "", "type": "integer", "minimum": 1}, "b": {"items": {"z": 1, "a": 2}}},
            "additionalProperties": False,
            "required": ["a"],
            "type": "object",
        },
    },
}


def test_of_a_tool_the_known_keys_reach_the_template_in_the_servers_order(client: Client) -> None:
    client.create(WITH_TOOLS)
    assert client.prompt(tools=[TOOL]) == BY_JINJA + (
        '{"type": "function", "function": {"name": "sum", "description": "", "parameters": {"type": "object", '
        '"required": ["a"], "properties": {"a": {"type": "integer"}, "b": {"items": {"a": 2, "z": 1}}}}}}'
    )
    bare = {"type": "function", "function": {"name": "now"}}
    refused = client.post("chat", model="it", messages=TURNS, tools=[bare])
    assert (refused.status_code, refused.json()) == (400, {"error": "properties must be an object"})


def test_thinking_is_switched_off_and_never_sent_for_earlier_turns(client: Client) -> None:
    client.create(THINKING + "{% for message in messages %}{{ message.reasoning_content }}{% endfor %}")
    assert client.show()["capabilities"] == ["completion", "thinking"]
    earlier = [*TURNS, {"role": "assistant", "content": "A", "thinking": "T"}, *TURNS]
    assert client.prompt(messages=earlier) == "<user> Hi <assistant>A<user> Hi <assistant><think>"
    assert client.prompt(think=True) == client.prompt() == BY_JINJA + "<think>"
    assert client.prompt(think=False) == BY_JINJA + "<think></think>"


@pytest.mark.parametrize("asked", [{"tools": [TOOL]}, {"think": True}], ids=["tools", "thinking"])
def test_a_model_without_an_ability_refuses_what_needs_it(client: Client, asked: dict[str, Any]) -> None:
    client.create(PLAIN)
    refused = client.post("chat", model="it", messages=TURNS, **asked)
    assert refused.status_code == 400 and "does not support" in refused.json()["error"]


def test_a_call_and_its_answer_reach_the_template(client: Client) -> None:
    calls = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    client.create(
        RULE + calls + "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %};{% endfor %}"
    )
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]}
    given = {"role": "tool", "tool_name": "sum", "content": "2"}
    assert client.prompt(messages=[*TURNS, called, given]) == 'user: Hi ;assistant:sum{"a": 1};tool:2;'
