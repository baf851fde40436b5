"""What Ollama is told of a model: names, template, context, parameters, and the Modelfile's text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from tasks.chat.formats import format_names
from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.llamacpp.header import human_parameters
from tasks.ollama.modelfile import ollama_model, render_modelfile
from tasks.ollama.names import ModelName, parse_name
from tasks.ollama.served_template import served_template
from tasks.settings.export import OllamaSettings
from tests.support.made_artifacts import make_dataset


@pytest.mark.parametrize(
    "name", ["", "-x", "a b", "../x", "a/b/c/d", "x:", "x:y:z", "x@y", "x:cloud", "x:my-cloud", "a.b/x", "é", "x" * 81]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no valid Ollama model name"):
        parse_name(name)


PART = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_-]{0,20}", fullmatch=True)


@given(PART, PART, PART)
def test_good_names_are_read(namespace: str, model: str, tag: str) -> None:
    tag = f"v{tag}" if tag.lower() in ("local", "cloud") or tag.lower().endswith("-cloud") else tag
    tag = tag.removesuffix("-cloud")
    assert parse_name(model) == ModelName(model)
    assert parse_name(f"{namespace}/{model}:{tag}") == ModelName(model, namespace, tag=tag)
    assert parse_name(f"host.example:8080/{namespace}/{model}").host == "host.example:8080"


@pytest.mark.parametrize(
    ("count", "text"), [(8_030_261_248, "8.0B"), (134_515_008, "134.52M"), (2_000_000, "2M"), (128, "128")]
)
def test_parameters_are_written_as_ollama_does(count: int, text: str) -> None:
    assert human_parameters(count) == text


def test_modelfile(store: Store) -> None:
    dataset = make_dataset(
        store, ollama_template="alpaca", end_of_turn="<|end_of_text|>", stops=["<|end_of_text|>", "<|eot|>"],
        system=None, max_length=64,
    )  # fmt: skip
    model = ollama_model(dataset, OllamaSettings(parameters={"temperature": 0}), "mit")
    assert "{{ $m.Content }}<|end_of_text|>\n\n{{ end }}" in model.template
    assert model.parameters["stop"] == ["### Instruction:", "### Response:", "<|end_of_text|>", "<|eot|>"]
    lines = render_modelfile(model, "model.gguf").splitlines()
    assert 'PARAMETER stop "### Response:"' in lines
    assert not any(line.startswith(("SYSTEM", "PARAMETER num_ctx", "REQUIRES")) for line in lines)


@pytest.mark.parametrize(
    ("max_length", "context_length", "parameters", "num_ctx", "context"),
    [
        (2048, 8192, {}, None, 4096),
        (2049, 8192, {}, 4098, 4098),
        (8192, 8192, {}, 8192, 8192),
        (4096, 4096, {}, None, 4096),
        (2048, 2048, {}, None, 2048),
        (4096, 8192, {"num_ctx": 2048}, 2048, 2048),
        (64, 8192, {"num_ctx": 8192}, 8192, 8192),
    ],
)
def test_the_context_is_set_where_a_chat_needs_more_than_ollama_gives(
    store: Store, max_length: int, context_length: int, parameters: Any, num_ctx: int | None, context: int
) -> None:
    dataset = make_dataset(store, max_length=max_length, context_length=context_length)
    model = ollama_model(dataset, OllamaSettings(parameters=parameters), None)
    assert model.parameters.get("num_ctx") == num_ctx
    assert model.context == context


@pytest.mark.parametrize(
    ("version", "template", "fits", "capabilities", "kind"),
    [
        (None, "auto", True, [], "go"),
        (None, "auto", True, ["tools"], "go"),
        (None, "auto", False, [], "jinja"),
        ("0.24.0", "auto", True, ["tools"], "go"),
        ("0.30.0", "auto", True, [], "go"),
        ("0.34.0", "auto", True, ["tools"], "jinja"),
        ("0.34.0", "auto", False, [], "jinja"),
        ("0.34.0", "go", True, ["tools"], "go"),
        ("0.34.0", "jinja", True, [], "jinja"),
        (None, "jinja", True, [], "jinja"),
        ("0.24.0", "none", False, ["tools"], "none"),
    ],
)
def test_who_formats_the_chat(
    store: Store, version: str | None, template: Any, fits: bool, capabilities: list[str], kind: str
) -> None:
    dataset = make_dataset(store, ollama_template="chatml" if fits else None, server_capabilities=capabilities)
    server = Version(version) if version else None
    served = served_template(dataset, OllamaSettings(template=template), server)
    assert served.kind == kind
    assert served.needs == ("0.30" if kind == "jinja" else None)


@pytest.mark.parametrize("template", ["auto", "jinja"])
def test_a_server_that_is_too_old_for_the_template_is_named(store: Store, template: Any) -> None:
    dataset = make_dataset(store, ollama_template=None)
    with pytest.raises(UserError, match=r"Ollama 0.24.0 cannot render .* needs 0.30 or newer. Use a newer"):
        served_template(dataset, OllamaSettings(template=template), Version("0.24.0"))


@pytest.mark.parametrize(
    ("facts", "parameters", "message"),
    [
        ({"context_length": 4095}, {"num_ctx": 4096}, "num_ctx is 4096, and the model's context has 4095 tokens"),
        ({}, {"stop": "use"}, "the stop 'use' is a part of the chat template's own text"),
        ({}, {"temprature": 1}, "Ollama knows no temprature"),
        ({}, {"temperature": "warm"}, "temperature is 'warm'. Ollama wants a number here"),
        ({"system": 'three """ quotes'}, {}, 'a Modelfile cannot express """'),
    ],
)
def test_what_ollama_cannot_serve_is_refused(
    store: Store, facts: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        ollama_model(make_dataset(store, **facts), OllamaSettings(parameters=parameters), None)
    assert message in str(caught.value)


def test_a_stop_of_white_space_is_nobodys(store: Store) -> None:
    model = ollama_model(make_dataset(store), OllamaSettings(parameters={"stop": "\n"}), None)
    assert model.parameters["stop"][-1] == "\n"


@pytest.mark.parametrize(
    ("template", "fits", "system", "sent"),
    [
        ("go", "chatml", "Be helpful.", "Be helpful."),
        ("jinja", "chatml", "Be helpful.", "Be helpful."),
        ("jinja", "alpaca", "Be helpful.", None),
        ("jinja", None, "Be helpful.", None),
        ("jinja", None, "Be brief.", "Be brief."),
    ],
)
def test_a_system_prompt_that_the_template_puts_in_by_itself_is_sent_where_go_may_render(
    store: Store, template: Any, fits: str | None, system: str, sent: str | None
) -> None:
    dataset = make_dataset(store, ollama_template=fits, system=system, default_system="Be helpful.")
    assert ollama_model(dataset, OllamaSettings(template=template), None).system == sent


def test_a_go_template_is_asked_for_where_there_is_none(store: Store) -> None:
    dataset = make_dataset(store, ollama_template=None)
    with pytest.raises(UserError, match=f"chat template is like none of {format_names('and')}"):
        ollama_model(dataset, OllamaSettings(template="go"), None)


def test_a_parameter_that_a_new_server_drops_is_refused(store: Store) -> None:
    settings = OllamaSettings(parameters={"typical_p": 0.9})
    assert ollama_model(make_dataset(store), settings, None, Version("0.33")).parameters["typical_p"] == 0.9
    with pytest.raises(UserError, match=r"Ollama 0.34 refuses or ignores typical_p. Leave it out"):
        ollama_model(make_dataset(store), settings, None, Version("0.34"))
