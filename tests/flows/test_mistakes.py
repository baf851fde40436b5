"""Users' mistakes through the command line: one line that says what to do, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import compare
from flows.finetune import finetune, stages
from flows.support.command_line import run
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.runs.preflight import check_data
from tasks.settings.presets import load_settings

Preset = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nonsense"], "--preset nonsense: no such preset. Use one of demo, llama3-8b"),
        (["--training.max_steps", "-3"], "training.max_steps: Input should be greater than or equal to 1"),
        (["--training.max_steps", "3", "--training.warmup_steps", "3"], "warmup_steps (3) must be below max_steps (3)"),
        (["--training.max_step", "3"], "arguments: --training.max_step 3. Did you mean --training.max_steps?"),
        (["--ollama.target", "none", "--ollama.name", "no good"], "'no good' is no valid Ollama model name"),
        (["--lora.r", "1"], "lora.r: in a rank space of one dimension GRIT's preconditioner is a number"),
        (["--grit.ng_warmup_steps", "200"], "grit.ng_warmup_steps: GRIT would be off in all of the"),
        (["--method", "magic"], "method"),
        (["--ollama.parameters", "temprature=0"], "ollama.parameters: Ollama knows no temprature"),
        (["--chat.system", 'Say """.'], 'chat.system: a Modelfile cannot express """'),
        (["--scoring.tasks", "extractoin"], "scoring.tasks: extractoin: no such lm-eval task"),
        (["--ollama.name", "no good"], "ollama.name: 'no good' is no valid Ollama model name"),
        (["--ollama.name", f"it:{'x' * 70}"], "ollama.name: with the version's date and digest"),
        (
            ["--data.validation_fraction", "0", "--training.keep_best", "--training.eval_steps", "1"],
            "training: keep_best",
        ),
        (["--training.keep_best"], "early_stopping_patience need eval_tokens, or eval_steps below max_steps"),
        (
            ["--training.early_stopping_patience", "1", "--training.eval_tokens", "99999"],
            "supervised tokens, and 99999 pass between two validations. Use ",
        ),
        (["--training.backend", "unsloth"], "training.backend: Unsloth's fused kernels bypass"),
        (["--export.llama_cpp", "/nowhere"], "/nowhere: no convert_hf_to_gguf.py here"),
        (["--data.source", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--model.name", "/nowhere"], "/nowhere"),
        (["--chat.format", "llama3"], "chat.format: the model's vocabulary lacks <|eot_id|>"),
        (["--lora.target_modules", "embed_tokens"], "lora.target_modules: the model's output layer and embedding are"),
        (["--lora.target_modules", "c_attn"], "lora.target_modules: no linear layer"),
        (["--data.columns", "completion=answer"], "the columns are completion, prompt"),
        (["--data.max_length", "513"], "data.max_length: 513 tokens are more than the model's context of 512"),
        (
            ["--model.name", "org/name"],
            "org/name: the model is not whole in the Hub's local cache, and HF_HUB_OFFLINE forbids",
        ),
        (["--data.source", "org/rows"], "org/rows: the Hugging Face Hub cannot be reached"),
    ],
)
@pytest.mark.usefixtures("prefect_server")
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    store = workplace / "mistakes"
    preset = make_preset(store=str(store))
    first = [] if "--preset" in arguments else ["--preset", preset]
    assert run(finetune, stages, [*first, *arguments]) == 2
    printed = capfd.readouterr().err
    assert_one_line(printed, message)
    assert_nothing_half_written(store)


def test_what_the_settings_alone_tell_starts_no_flow(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a flow was started")

    preset = make_preset(store=str(workplace / "mistakes"))
    assert run(never, stages, ["--preset", preset, "--data.source", "missing.jsonl"]) == 2
    assert not (workplace / "mistakes").exists(), "found before the model was fetched"
    assert_one_line(capfd.readouterr().err, "missing.jsonl: no such file")


def assert_one_line(printed: str, message: str) -> None:
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def assert_nothing_half_written(store: Path) -> None:
    """What was whole before the mistake was found may stay; nothing follows from it."""
    kinds = {path.name for path in store.iterdir()} if store.exists() else set()
    assert kinds <= {"drafts", "locks", "logs", "results", "model", "source", "dataset", "vocabulary"}
    assert not list((store / "drafts").glob("*"))
    for kind in kinds - {"drafts", "locks", "logs", "results"}:
        assert all(len(path.name) == 16 for path in (store / kind).iterdir()), "artifacts are named by digest"
    shutil.rmtree(store, ignore_errors=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file holds no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "broken JSON at line 2"),
        ('{"prompt": "", "completion": "b"}\n{"prompt": "a", "completion": " "}', "every row is empty"),
        ('{"prompt": "a", "completion": "b"}\n["a", "b"]', "row 2 is list, not an object"),
        ('{"prompt": "a", "completion": 7}', "row 1, column completion: text is needed, found int 7"),
        ('{"prompt": "a", "completion": "b \\ud83d"}', "row 1: half of a character ('\\ud83d') that UTF-8 cannot"),
        ('{"question": "a", "answer": "b"}', "the columns are answer, question; needed are"),
    ],
)
@pytest.mark.usefixtures("prefect_server")
def test_bad_data_is_one_line_and_leaves_nothing(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path, store = workplace / "bad.jsonl", workplace / "mistakes"
    path.write_text(content, encoding="utf-8")
    preset = make_preset(store=str(store))
    assert run(finetune, stages, ["--preset", preset, "--data.source", str(path)]) == 2
    printed = capfd.readouterr().err
    assert_one_line(printed, message)
    assert str(path) in printed.strip().splitlines()[-1]
    assert printed.count(message) == 1 and not store.exists(), "found before anything was started or fetched"


@pytest.mark.usefixtures("prefect_server")
def test_bad_data_that_takes_long_to_read_is_found_by_the_flow(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.runs.preflight.QUICKLY_READ", 5)
    path, store = workplace / "bad.jsonl", workplace / "mistakes"
    path.write_text('{"question": "a", "answer": "b"}', encoding="utf-8")
    assert run(finetune, stages, ["--preset", make_preset(store=str(store)), "--data.source", str(path)]) == 2
    printed = capfd.readouterr().err
    assert_one_line(printed, "the columns are answer, question; needed are")
    assert (store / "source").is_dir(), "after the rows were brought"
    assert_nothing_half_written(store)


def test_rows_beyond_the_wanted_ones_may_be_bad(make_preset: Preset, workplace: Path) -> None:
    path = workplace / "long.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": 7}\n', encoding="utf-8")
    for kept in (1, 2):
        given = {"data": {"source": str(path), "max_rows": kept}}
        data = load_settings(make_preset(), given).data
        with nullcontext() if kept == 1 else pytest.raises(UserError, match="row 2, column completion"):
            check_data(data)


def _change_json(name: str, **values: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}))

    return change


def _no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    _change_json("tokenizer_config.json", chat_template=None)(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "no weights (*.safetensors)"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "the weights are pickle files"),
        (lambda d: [path.unlink() for path in d.glob("tokenizer*")], "no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
        (_change_json("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}), "trust_remote_code: true"),
        (_no_template, "no chat template"),
    ],
)
@pytest.mark.usefixtures("prefect_server")
def test_a_bad_model_is_one_line_and_leaves_nothing(
    make_preset: Preset,
    workplace: Path,
    tiny_model: Artifact,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    store, model = workplace / "mistakes", workplace / "bad-model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(tiny_model.path, model)
    spoil(model)
    preset = make_preset(store=str(store))
    assert run(finetune, stages, ["--preset", preset, "--model.name", str(model)]) == 2
    assert_one_line(capfd.readouterr().err, message)
    assert_nothing_half_written(store)


def test_the_error_is_the_last_line_also_with_a_server_of_its_own(make_preset: Preset, workplace: Path) -> None:
    preset = make_preset(store=str(workplace / "mistake"))
    command = [sys.executable, "-m", "flows.finetune", "--preset", preset, "--data.max_length", "513"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    message = "data.max_length: 513 tokens are more than the model's context of 512. Use at most 512."
    assert done.stderr == f"error: {message}\n"
    last = done.stdout.strip().splitlines()[-1]
    assert message in Path(last.removeprefix("Log:").strip()).read_text()


@pytest.mark.usefixtures("prefect_server", "full_disk")
def test_too_little_disk_is_found_before_anything_is_written(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    preset = make_preset(store=str(workplace / "small"))
    assert run(finetune, stages, ["--preset", preset]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {workplace / 'small'}: 0.0 GB are free and the run needs 0.6 GB (logs and small")
    assert "merged model 0.0" in last and "point `store` or `ollama.models` at a larger disk" in last
    assert [path.name for path in (workplace / "small").iterdir()] == ["logs"]


@pytest.mark.usefixtures("prefect_server", "full_disk")
def test_too_little_disk_is_found_also_where_only_the_fetched_model_tells_its_size(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.runs.waiting.parameters_of_source", lambda settings: None)
    store = workplace / "unknown"
    assert run(finetune, stages, ["--preset", make_preset(store=str(store))]) == 2
    assert_one_line(capfd.readouterr().err, "0.0 GB are free and the run needs 0.6 GB")
    assert {path.name for path in store.iterdir()} == {"locks", "logs", "results"}


@pytest.mark.usefixtures("prefect_server")
def test_a_server_that_does_not_answer_is_one_line(make_preset: Preset, capfd: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert run(finetune, stages, ["--preset", make_preset()]) == 2
    assert_one_line(capfd.readouterr().err, "http://127.0.0.1:9/api: no Prefect server answers. Start it, or unset")


@pytest.mark.usefixtures("prefect_server")
def test_a_place_that_cannot_take_the_model_is_found_before_anything_is_trained(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = workplace / "no-place"
    (workplace / "a-file").write_text("")
    words = ["--preset", make_preset(store=str(store)), "--ollama.models", str(workplace / "a-file" / "models")]
    assert run(finetune, stages, words) == 2
    message = f"{workplace}/a-file/models: cannot be written: Not a directory. Correct ollama.models"
    assert_one_line(capfd.readouterr().err, message)
    assert not (store / "adapter").exists()
    assert run(finetune, stages, [*words, "--plan", "--ollama.target", "server", "--ollama.host", "127.0.0.1:9"]) == 0
    assert "no Ollama server answers" in capfd.readouterr().out


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    "command", [lambda words: run(finetune, stages, words), compare.run], ids=["finetune", "compare"]
)
def test_a_model_too_large_for_a_cpu_is_refused_by_plan_and_run(
    command: Callable[[list[str]], int],
    make_preset: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tasks.runs.base_model.LARGE", 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["--preset", make_preset(store=str(tmp_path / "store"))]
    for more in ([], ["--plan"]):
        assert command([*words, *more]) == 2
        assert_one_line(capfd.readouterr().err, "parameters take days without a GPU, and this machine has none. Use")
    assert command([*words, "--plan", "--model.large_on_cpu"]) == 0
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"logs"}
