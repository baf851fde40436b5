"""A server formats the chat as the training did, or it is found out: each kind of server, through the stand-in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.chat.capabilities import server_capabilities
from tasks.chat.formats import FORMATS
from tasks.chat.recognition import known_format
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.ollama.promotion_rule import export_checks
from tasks.ollama.server import OllamaServer
from tasks.register import is_registered, register
from tasks.settings.export import OllamaSettings
from tests.standins.ollama_server import OllamaStandIn, ollama_stand_in
from tests.support.gguf_files import with_chat_template
from tests.support.jinja_templates import EVERYTHING, TOOLS, TRIMMING
from tests.support.made_artifacts import make, make_dataset

OLD, REWRITES, KEEPS = "0.24.0", "0.33.0", "0.34.0"
Run = Callable[..., Artifact]


@pytest.fixture
def server(
    request: pytest.FixtureRequest, tmp_path: Path, go_render: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OllamaStandIn]:
    monkeypatch.setattr("tasks.ollama.server.ANSWER", 4)  # the tiny model never ends, and need not say more
    with ollama_stand_in(tmp_path / "models", go_render, getattr(request, "param", KEEPS)) as running:
        yield running


def served_by(*versions: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", versions, indirect=True)


@pytest.fixture
def run(server: OllamaStandIn, store: Store, tiny_gguf: Path, smollm2_tokenizer: PreTrainedTokenizerFast) -> Run:
    """Register a model: `jinja` is its own template, or `chat_format` one of ours; `in_gguf` what its file holds."""

    def registered(
        template: Any = "auto", jinja: str = "", chat_format: Any = "chatml", in_gguf: str = "", **options: Any
    ) -> Artifact:
        base = copy.deepcopy(options.get("tokenizer", smollm2_tokenizer))
        if jinja:
            base.chat_template, chat_format = jinja, "tokenizer"
        tokenizer = apply_chat_format(base, chat_format)
        text = str(tokenizer.chat_template)
        with store.draft("gguf") as draft:
            (draft.path / "model.gguf").write_bytes(with_chat_template(tiny_gguf.read_bytes(), in_gguf or text))
        dataset = make_dataset(
            store,
            tokenizer,
            ollama_template=known_format(tokenizer),
            server_capabilities=sorted(server_capabilities(text)),
        )
        settings = OllamaSettings(target="server", host=server.url, template=template)
        return register.function(
            draft.done(), dataset=dataset, settings=settings, name="it", license_name=None, store=store
        )

    return registered


def prompts_check(store: Store, registration: Artifact) -> tuple[str, str]:
    checks = {check.key: check for check in export_checks(make(store, "fidelity", {"checks": []}), registration)}
    return checks["rendering"].reading, checks["rendering"].value


@served_by(REWRITES, KEEPS)
def test_a_template_that_knows_tools_and_thinking_is_served_as_it_is(
    run: Run, server: OllamaStandIn, store: Store
) -> None:
    registration = run(jinja=EVERYTHING)
    rendering = registration.facts["rendering"]
    assert rendering["differences"] == [] and rendering["compared"] > 20
    assert prompts_check(store, registration) == ("passed", f"{rendering['compared']} conversations equal")
    assert registration.facts["needs"] == "0.30"
    assert "TEMPLATE" not in (registration.path / "Modelfile").read_text()


@pytest.mark.parametrize(("server", "template"), [(REWRITES, "auto"), (KEEPS, "jinja")], indirect=["server"])
@pytest.mark.parametrize("chat_format", ["chatml", "alpaca"])  # the tiny model's vocabulary lacks llama3's tokens
def test_our_formats_are_served_by_both_kinds_of_template(run: Run, template: str, chat_format: str) -> None:
    rendering = run(template, chat_format=chat_format).facts["rendering"]
    assert rendering["differences"] == [] and rendering["compared"] > 10


@served_by(OLD)
def test_an_old_server_formats_by_go_and_shows_no_prompts(run: Run, store: Store) -> None:
    registration = run()
    assert registration.facts["rendering"] == {"compared": 0, "differences": []}
    assert prompts_check(store, registration) == ("warned", "not proven: the server does not show them")
    with pytest.raises(UserError, match=r"Ollama 0.24.0 cannot render the model's own chat template"):
        run(jinja=EVERYTHING)


@served_by(OLD)
def test_an_old_server_joins_neighbours_and_takes_no_tools(run: Run, server: OllamaStandIn) -> None:
    """Whatever the GGUF's template knows: so nothing of that is compared."""
    server.chats.shows_prompts = True
    registration = run(jinja=TOOLS)
    assert registration.facts["needs"] is None
    assert registration.facts["rendering"]["differences"] == [] and registration.facts["rendering"]["compared"] > 5


def test_a_template_that_the_server_has_detected_is_none_of_ours(run: Run) -> None:
    """Our short llama3 template without its rule is taken for another."""
    with pytest.raises(UserError, match="formats the chat with a template that is none of ours"):
        run("jinja", jinja=TRIMMING, in_gguf=FORMATS["llama3"].jinja)


def test_a_prompt_that_differs_is_named(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.ollama.server_proof.check_selected", lambda _: None)
    registration = run("jinja", chat_format="alpaca", in_gguf="{# a file of another training #}" + "─" * 200 + TRIMMING)
    reading, value = prompts_check(store, registration)
    assert reading == "failed" and "conversations differ, first a question" in value
    first = registration.facts["rendering"]["differences"][0]
    assert "### Instruction:\nHello" in first["training"] and first["server"].startswith("─")


def test_what_was_loaded_before_is_unloaded_first(run: Run) -> None:
    """Names of one file share the formatting of the first that was loaded: Go joins two questions in a row."""
    run("go", chat_format="alpaca")
    rendering = run("jinja", chat_format="alpaca").facts["rendering"]
    assert rendering["differences"] == []


def test_without_a_proof_nothing_is_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(OllamaServer, "rendered", lambda *arguments: asked.append(arguments))
    registration = run("none", jinja=TRIMMING)
    assert registration.facts["rendering"] is None and registration.facts["needs"] is None and not asked


DIFFERENCE = {"conversation": "empty turns", "kind": "text", "training": "a", "server": "b"}


@pytest.mark.parametrize(
    ("proof", "counts", "reading", "value"),
    [
        ({"proven": True, "conversations": 12}, True, "passed", "12 conversations equal"),
        ({"proven": None, "why": "no xllamacpp"}, True, "warned", "not proven: no xllamacpp"),
        ({"proven": False, "why": "line 3"}, True, "failed", "line 3"),
        (
            {"proven": False, "conversations": 12, "differences": [DIFFERENCE]}, True, "failed",
            "1 of 12 conversations differ, first empty turns",
        ),
        (
            {"proven": False, "conversations": 12, "differences": [DIFFERENCE]}, False, "warned",
            "1 of 12 conversations differ, first empty turns",
        ),
    ],
)  # fmt: skip
def test_a_gguf_whose_template_renders_otherwise_is_held_back_where_it_would_be_served(
    store: Store, proof: dict[str, Any], counts: bool, reading: str, value: str
) -> None:
    facts = {"why": None, "conversations": 0, "differences": []} | proof
    fidelity = make(store, "fidelity", {"checks": [], "template": facts})
    registration = make(store, "registration", {"jinja_counts": counts})
    check = next(check for check in export_checks(fidelity, registration) if check.key == "template")
    assert (check.reading, check.value) == (reading, value)


def test_a_server_of_another_version_is_asked_again(run: Run, server: OllamaStandIn, store: Store) -> None:
    registration = run()
    settings = OllamaSettings(target="server", host=server.url)
    assert registration.facts["server"] == KEEPS and is_registered(registration, settings=settings)
    server.version = replace(server.version, text="0.35.0")
    assert not is_registered(registration, settings=settings)
    assert run().facts["server"] == "0.35.0"


def test_a_prompt_of_another_length_is_a_fault(run: Run, smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.add_tokens(["user\nHello"])
    registration = run("jinja", tokenizer=tokenizer)
    kinds = {difference["kind"] for difference in registration.facts["rendering"]["differences"]}
    assert kinds == {"tokens"}
    assert "the server reads a prompt as" in registration.facts["chat_fault"]


def test_what_a_server_leaves_out_of_its_counts_is_no_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt whose beginning it still has, some versions count the rest; of a cut answer llama.cpp may choke."""
    count, asked = OllamaServer.prompt_tokens, iter(range(100))

    def counted(server: OllamaServer, name: Any, probe: Any) -> int:
        number = next(asked)
        if number == 1:
            raise TemporaryError("Failed to parse input at pos 0")
        return count(server, name, probe) - (5 if number else 0)

    monkeypatch.setattr(OllamaServer, "prompt_tokens", counted)
    assert run("jinja", chat_format="alpaca").facts["rendering"]["differences"] == []
    assert next(asked) > 5


def test_chatml_that_knows_tools_is_not_taken_for_the_servers_own(run: Run) -> None:
    with pytest.raises(UserError, match="formats the chat with a template that is none of ours"):
        run("jinja", jinja=TOOLS, in_gguf=FORMATS["llama3"].jinja)
