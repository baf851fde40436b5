"""The stand-in for Ollama makes models as real servers were measured to."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from tests.standins.ollama_server import Faults, ollama_stand_in
from tests.standins.ollama_templates import REFERENCES, detected, distance
from tests.support.gguf_files import Header, read_header
from tests.support.ollama_client import (
    ALPACA,
    CHATML,
    GO,
    KEEPS,
    LLAMA3,
    NEWEST,
    OLD,
    PLAIN,
    REWRITES,
    RULE,
    Client,
)


def layer_digest(client: Client, name: str = "it") -> str:
    path = client.server.directory.manifest(name)
    assert path is not None
    return str(json.loads(path.read_bytes())["layers"][0]["digest"])


@pytest.mark.parametrize("client", [REWRITES], indirect=True)
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


@pytest.mark.parametrize("client", [NEWEST], indirect=True)
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
