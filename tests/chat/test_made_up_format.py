"""A chat format is one row of the table, a Go template, and a name: with them everything knows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tasks.chat.formats import FORMATS, ChatTemplate, format_names
from tasks.chat.rendering import render
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.paths import checkout_directory
from tasks.fetch_data import fetch_data
from tasks.ollama.modelfile import ollama_model
from tasks.prepare_dataset import prepare_dataset
from tasks.register import register
from tasks.settings.export import OllamaSettings
from tasks.settings.finetune import ChatSettings, DataSettings
from tests.support.go_template import rendered
from tests.support.versions import write_gguf

AT_SIGNS = ChatTemplate(
    jinja=(
        "{% for m in messages %}{{ '@' + m['role'] + '\n' + m['content'] + '<|endoftext|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '@assistant\n' }}{% endif %}"
    ),
    end_of_turn="<|endoftext|>",
    stops=("@user", "@assistant"),
)
GO_TEMPLATE = "{{ range $m := .Messages }}@{{ $m.Role }}\n{{ $m.Content }}[[ end_of_turn ]]\n{{ end }}@assistant\n"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def dataset(
    tiny_model: Artifact, store: Store, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Artifact:
    """Rows prepared in the format."""
    checkout = tmp_path / "checkout"
    shutil.copytree(checkout_directory("modelfiles"), checkout / "modelfiles")
    (checkout / "modelfiles" / "at_signs.gotmpl").write_text(GO_TEMPLATE)
    monkeypatch.setattr("tasks.engine.paths.REPOSITORY", checkout)
    monkeypatch.setitem(FORMATS, "at_signs", AT_SIGNS)
    data = DataSettings(source=str(rows_file), max_length=64, validation_fraction=0.1)
    chat = ChatSettings().model_copy(update={"format": "at_signs"})
    source = fetch_data.function(data, 1, store=store)
    return prepare_dataset.function(source, tiny_model, data, chat, 1, store=store)


def test_rows_are_prepared_in_it(dataset: Artifact) -> None:
    example = json.loads((dataset.path / "card.json").read_text())["example"]
    assert example.startswith("@user\nAdd ") and example.endswith("<|endoftext|>\n")
    assert dataset.facts["ollama_template"] == "at_signs"
    assert dataset.facts["end_of_turn"] == "<|endoftext|>"


def test_ollama_renders_it_like_the_tokenizer(dataset: Artifact, go_render: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    template = ollama_model(dataset, OllamaSettings(), None).template
    assert rendered(go_render, template, CHAT) == render(tokenizer, CHAT, prompt=True)


def test_a_model_is_registered_with_its_stops(dataset: Artifact, store: Store, tmp_path: Path) -> None:
    with store.draft("gguf") as draft:
        write_gguf(draft.path / "model.gguf", 1)
    settings = OllamaSettings(target="store", models=tmp_path / "models")
    registration = register.function(
        draft.done(), dataset=dataset, settings=settings, name="it", license_name=None, store=store
    )
    modelfile = (registration.path / "Modelfile").read_text()
    stops = [line for line in modelfile.splitlines() if line.startswith("PARAMETER stop")]
    assert stops == [f'PARAMETER stop "{stop}"' for stop in ("@user", "@assistant", "<|endoftext|>", "<|im_end|>")]


def test_it_is_among_those_that_are_proposed(dataset: Artifact) -> None:
    unknown = dataset.model_copy(update={"facts": dataset.facts | {"ollama_template": None}})
    with pytest.raises(UserError, match=f"like none of {format_names('and')}"):
        ollama_model(unknown, OllamaSettings(template="go"), None)
