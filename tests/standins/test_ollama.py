"""The stand-in for Ollama does what real servers were measured to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from tasks.chat.formats import FORMATS
from tests.standins.ollama_server import Faults, OllamaStandIn, ollama_stand_in
from tests.standins.ollama_templates import REFERENCES, detected, distance, formatter
from tests.support.gguf_files import Header, read_header, with_chat_template

OLD, REWRITES, KEEPS, NEWEST = "0.24.0", "0.33.0", "0.34.0", "0.35.0"
RULE = "{# " + "─" * 120 + " #}"
CHATML, LLAMA3, ALPACA = (FORMATS[name].jinja for name in ("chatml", "llama3", "alpaca"))
PLAIN = RULE + "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
WITH_TOOLS = PLAIN + "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
THINKING = PLAIN + "{{ '<think>' if enable_thinking else '<think></think>' }}"
GO = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}[assistant]"
TURNS = [{"role": "user", "content": " Hi "}]


class Client:
    """Sends requests to a server, and makes models from one GGUF with any template."""

    def __init__(self, server: OllamaStandIn, gguf: Path) -> None:
        self.server, self.gguf = server, gguf

    def post(self, route: str, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}/api/{route}", json=request, timeout=600)

    def create(self, jinja: str | None, name: str = "it", **sent: Any) -> list[dict[str, Any]]:
        """Create a model; the lines of the answer."""
        content = with_chat_template(self.gguf.read_bytes(), jinja)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        httpx.post(f"{self.server.url}/api/blobs/{digest}", content=content).raise_for_status()
        response = self.post("create", model=name, files={"model.gguf": digest}, **sent)
        return [{"upload": digest}, *map(json.loads, response.text.splitlines())]

    def show(self, name: str = "it") -> dict[str, Any]:
        return dict(self.post("show", model=name).raise_for_status().json())

    def prompt(self, name: str = "it", **request: Any) -> str:
        """What the model would read."""
        request = {"messages": TURNS, "_debug_render_only": True} | request
        response = self.post("chat", model=name, **request).raise_for_status()
        return str(response.json()["_debug_info"]["rendered_template"])

    def chat(self, name: str = "it", **request: Any) -> dict[str, Any]:
        request = {"messages": TURNS, "stream": False, "options": {"num_predict": 2}} | request
        return dict(self.post("chat", model=name, **request).raise_for_status().json())

    def unload(self, name: str = "it") -> str:
        response = self.post("generate", model=name, prompt="", keep_alive=0)
        return str(response.raise_for_status().json()["done_reason"])


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path, go_render: Path, tiny_gguf: Path) -> Iterator[Client]:
    """Of a server that keeps files, or of another version."""
    with ollama_stand_in(tmp_path / "models", go_render, getattr(request, "param", KEEPS)) as server:
        yield Client(server, tiny_gguf)


def served_by(version: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", [version], indirect=True)


def layer_digest(client: Client, name: str = "it") -> str:
    path = client.server.directory.manifest(name)
    assert path is not None
    return str(json.loads(path.read_bytes())["layers"][0]["digest"])


@served_by(REWRITES)
def test_a_file_is_written_anew_and_still_runs(client: Client) -> None:
    upload, *lines = client.create(PLAIN)
    digest = layer_digest(client)
    assert digest != upload["upload"]
    assert [line["status"] for line in lines] == [
        "parsing GGUF", "validating GGUF model", "verifying conversion", f"creating new layer {digest}",
        "writing manifest", "success",
    ]  # fmt: skip
    assert client.chat()["prompt_eval_count"] > 0
    client.create(PLAIN, "again")
    assert layer_digest(client, "again") == digest, "the same each time"
    assert client.show()["details"]["parent_model"] == ""
    assert not any("stand_in" in key for key in client.show()["model_info"])


@pytest.mark.parametrize(("client", "parent"), [(OLD, ""), (KEEPS, "model.gguf")], indirect=["client"])
def test_a_file_is_kept(client: Client, parent: str) -> None:
    upload, *lines = client.create(PLAIN)
    assert layer_digest(client) == upload["upload"]
    existing = f"using existing layer {upload['upload']}"
    assert [line["status"] for line in lines] == ["parsing GGUF", existing, "writing manifest", "success"]
    assert client.show()["details"]["parent_model"] == parent


@pytest.mark.parametrize("version", [OLD, REWRITES, KEEPS])
def test_the_version_is_told(tmp_path: Path, go_render: Path, version: str) -> None:
    with ollama_stand_in(tmp_path, go_render, version) as server:
        assert httpx.get(f"{server.url}/api/version").json() == {"version": version}


def test_a_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("Ünicode")
    writer.add_array("texts", ["a", "", "bcd"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    writer.add_float32("half", 0.5)
    writer.add_uint64("large", 2**40)
    for name, shape in {"a": (4, 8), "b": (3,)}.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(tmp_path / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields["texts"] == ["a", "", "bcd"] and len(fields) == 7
    expected = {key: None if isinstance(value, list) else value for key, value in fields.items()}
    assert read_header(tmp_path / "model.gguf") == Header(expected, 35)


@pytest.mark.parametrize(("a", "b", "edits"), [("", "abc", 3), ("kitten", "sitting", 3), ("─x", "x", 1), ("x", "x", 0)])
def test_edits_are_counted_in_code_points(a: str, b: str, edits: int) -> None:
    assert distance(a, b) == distance(b, a) == edits


@pytest.mark.parametrize(
    ("jinja", "name"),
    [
        (CHATML, "chatml"), (LLAMA3, "chatml"), ("{{ bos_token }}" + LLAMA3, "chatml"), (RULE + LLAMA3, None),
        (RULE + CHATML, None), (ALPACA, None), (REFERENCES["gemma-instruct"].jinja, "gemma-instruct"),
        (REFERENCES["chatml"].jinja + "x" * 99, "chatml"), (REFERENCES["chatml"].jinja + "x" * 100, None), (None, None),
    ],
)  # fmt: skip
def test_a_template_is_taken_for_the_nearest_reference(jinja: str | None, name: str | None) -> None:
    assert detected(jinja) == name


def test_a_detected_template_is_served_with_its_stops_in_place_of_the_files(client: Client) -> None:
    _, *lines = client.create(LLAMA3)
    assert {"status": "using autodetected template chatml"} in lines
    assert client.show()["template"] == REFERENCES["chatml"].go
    assert client.show()["parameters"].split() == ["stop", '"<|im_start|>"', "stop", '"<|im_end|>"']
    assert client.prompt() == "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"


def test_a_detected_template_gives_stops_to_one_that_is_sent_without(client: Client) -> None:
    _, *lines = client.create(LLAMA3, template=GO, parameters={"top_k": 3})
    assert not any("autodetected" in line["status"] for line in lines)
    assert client.show()["template"] == GO
    assert "<|im_end|>" in client.show()["parameters"] and "top_k" in client.show()["parameters"]
    client.create(LLAMA3, parameters={"stop": ["x"]})
    assert client.show()["parameters"].split() == ["stop", '"x"']


def test_a_template_of_gemmas_kind_is_served_otherwise_than_it_says(client: Client) -> None:
    client.create(REFERENCES["gemma-instruct"].jinja)
    assert client.prompt() == "<start_of_turn>user\n Hi <end_of_turn>\n<start_of_turn>model\n", "it is not trimmed"


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


@served_by(OLD)
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


@served_by(NEWEST)
def test_a_new_server_refuses_typical_p(client: Client) -> None:
    _, line = client.create(PLAIN, parameters={"typical_p": 0.9, "bogus": 3})
    assert line == {"error": "unknown parameter: typical_p"}
    client.create(PLAIN, parameters={"bogus": 3})
    assert client.show()["parameters"].split() == ["bogus", "3"]


def test_parameters_are_refused_or_dropped_where_a_test_wants_it(client: Client) -> None:
    client.server.faults = Faults(refuses=("top_k",))
    assert client.create(PLAIN, parameters={"top_k": 3})[1] == {"error": "unknown parameter: top_k"}
    client.server.faults = Faults(drops=("top_k",))
    client.create(PLAIN, parameters={"top_k": 3, "top_p": 0.5})
    assert client.show()["parameters"].split() == ["top_p", "0.5"]


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
