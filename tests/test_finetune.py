"""The whole flow on a tiny random model: every stage for real, through Prefect, and the command line's errors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact as PrefectArtifact

from flows import chat
from flows.command_line import parse, run
from flows.finetune import Finetuned, finetune, stages
from tasks.artifacts import Artifact
from tasks.errors import UserError
from tasks.presets import load_settings
from tasks.stage import planning

Preset = Callable[..., str]


@pytest.fixture(scope="module")
def finetuned(make_preset: Preset, prefect_server: None) -> Finetuned:
    return finetune(make_preset(), "grit")


def planned(preset: str, method: str = "grit", **overrides: Any) -> list[tuple[str, str]]:
    with planning() as plan:
        stages(load_settings(preset, {"method": method, **overrides}))
    return plan.stages


def states(preset: str, method: str = "grit", **overrides: Any) -> dict[str, str]:
    return dict(planned(preset, method, **overrides))


def test_the_flow_ends_with_a_registered_model(finetuned: Finetuned, workplace: Path) -> None:
    manifest = workplace / "ollama/manifests/registry.ollama.ai/library/tiny-grit/latest"
    assert json.loads(manifest.read_text())["layers"][0]["digest"] == f"sha256:{finetuned.gguf.files['model.gguf']}"
    assert finetuned.registration.facts["next"].endswith("ollama run tiny-grit")
    assert not list((workplace / "store/drafts").iterdir()), "nothing half-written is left"


def test_a_second_run_computes_nothing(finetuned: Finetuned, make_preset: Preset) -> None:
    preset = make_preset()
    assert set(states(preset).values()) == {"cached", "always runs", "if something changed"}
    again = finetune(preset, "grit")
    assert again.gguf == finetuned.gguf
    assert again.report == finetuned.report


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ({"export.gguf_type": "f16"}, "convert"),
        ({"scoring.max_new_tokens": 5}, "score"),
        ({"training.learning_rate": 2e-2}, "train"),
        ({"data.max_length": 32}, "fetch_data"),
    ],
)
def test_a_setting_recomputes_only_what_depends_on_it(
    finetuned: Finetuned, make_preset: Preset, overrides: dict[str, Any], first: str
) -> None:
    waiting = [name for name, state in planned(make_preset(), **overrides) if state == "to run"]
    assert waiting[0] == first


def test_another_ollama_name_computes_nothing(finetuned: Finetuned, make_preset: Preset) -> None:
    assert "to run" not in states(make_preset(), **{"ollama.name": "another"}).values()


def test_the_baseline_shares_all_but_the_training(finetuned: Finetuned, make_preset: Preset) -> None:
    stages_of_baseline = states(make_preset(), "baseline")
    assert stages_of_baseline["prepare_dataset"] == "cached"
    assert stages_of_baseline["train"] == "to run"
    assert stages_of_baseline == states(make_preset(), "baseline", **{"grit.power": 1.0}), (
        "GRIT's settings are no matter to it"
    )


class Page(HTMLParser):
    """Collects what a report must and must not hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures = 0
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.pictures += tag == "svg"
        self.loads += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_shows_what_its_data_says(finetuned: Finetuned) -> None:
    report = finetuned.report.path
    html = (report / "report.html").read_text()
    data = json.loads((report / "report.json").read_text())
    page = Page(html)
    assert page.pictures == 3
    assert page.loads == [], "nothing is loaded from elsewhere"
    assert len(html) < 3_000_000
    text = " ".join(page.text)
    assert data["verdict"]["text"] in text
    assert data["verdict"]["text"] in (report / "report.md").read_text()
    for row in data["comparison"]:
        assert f"{row['base']:.4f}" in text and f"{row['tuned']:.4f}" in text
    assert data["settings"]["training"]["max_steps"] == 3
    assert data["history"]["method"] == "grit" and data["steps"][-1]["grit"]["ready"] == 1


def test_prefects_pages_show_the_report_and_the_progress(finetuned: Finetuned) -> None:
    report, training = (PrefectArtifact.get(key) for key in ("report", "training"))
    assert report is not None and report.type == "markdown"
    assert report.data == (finetuned.report.path / "report.md").read_text()
    assert training is not None and training.type == "progress" and training.data == 100


def test_one_can_chat_with_what_was_made(
    finetuned: Finetuned, make_preset: Preset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Add 3 and 3.\n/clear\n" + "word " * 3000 + "\n"))
    preset = make_preset()
    assert chat.run(["--preset", preset, "--method", "grit"]) == 0
    printed = capfd.readouterr().out
    assert finetuned.gguf.facts["answer"]["prompt"] in printed
    first, second = printed.split(">>> ")[1:3]
    assert first.strip() and not second.strip()
    assert "longer than the model's context" in printed
    assert chat.run(["--preset", preset, "--method", "baseline"]) == 2
    assert "no run with these settings has finished" in capfd.readouterr().err


def test_plan_prints_and_runs_nothing(make_preset: Preset, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = make_preset(store=str(workplace / "unused"))
    assert run(finetune, stages, ["--preset", preset, "--plan", "--training.max_steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: 7" in printed
    assert "train" in printed and "to run" in printed
    assert "Disk: at most 0.5" in printed and "Time: training at most" in printed, "also before the model was fetched"
    assert not (workplace / "unused").exists()


def test_options_reach_every_setting() -> None:
    arguments = ["--preset", "x.yaml", "--plan", "--training.max_steps", "60", "--lora.target_modules", "q_proj"]
    preset, plan, given = parse([*arguments, "--model.trust_remote_code", "--data.columns", "output=answer"])
    assert (preset, plan) == ("x.yaml", True)
    assert load_settings("demo", given).training.max_steps == 60
    assert load_settings("demo", given).lora.target_modules == ("q_proj",)
    assert load_settings("demo", given).data.columns == {"output": "answer"}
    nothing = parse(["--chat.system", "null", "--training.eval_steps", "null"])[2]
    assert load_settings("demo", nothing).chat.system is None
    assert load_settings("demo", nothing).training.eval_steps is None
    with pytest.raises(UserError, match=r"unrecognized arguments: --training.max_step 6"):
        parse(["--training.max_step", "6"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "nonsense"], "--preset nonsense: no such preset. Use one of demo, llama3-8b"),
        (["--training.max_steps", "-3"], "training.max_steps: Input should be greater than or equal to 1"),
        (["--training.max_steps", "3", "--training.warmup_steps", "3"], "warmup_steps (3) must be below max_steps (3)"),
        (["--training.max_step", "3"], "command line: unrecognized arguments: --training.max_step 3"),
        (["--ollama.target", "none", "--ollama.name", "no good"], "'no good' is no valid Ollama model name"),
        (["--lora.r", "1"], "lora.r: in a rank space of one dimension GRIT's preconditioner is a number"),
        (["--method", "magic"], "method"),
        (["--ollama.parameters", "temprature=0"], "ollama.parameters: Ollama knows no temprature"),
        (["--chat.system", 'Say """.'], 'chat.system: a Modelfile cannot express """'),
        (["--scoring.tasks", "extractoin"], "scoring.tasks: extractoin: no such lm-eval task"),
        (["--ollama.name", "no good"], "ollama.name: 'no good' is no valid Ollama model name"),
        (["--training.backend", "unsloth"], "training.backend: Unsloth's fused kernels bypass"),
        (["--export.llama_cpp", "/nowhere"], "/nowhere: no convert_hf_to_gguf.py here"),
        (["--data.source", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--model.name", "/nowhere"], "/nowhere"),
        (["--chat.format", "llama3"], "chat.format: the model's vocabulary lacks <|eot_id|>"),
        (["--lora.target_modules", "c_attn"], "lora.target_modules: no linear layer"),
        (["--data.columns", "completion=answer"], "the columns are completion, prompt"),
        (["--data.max_length", "513"], "data.max_length: 513 tokens are more than the model's context of 512"),
        (["--model.name", "org/name"], "org/name: the Hugging Face Hub cannot be reached"),
        (["--data.source", "org/rows"], "org/rows: the Hugging Face Hub cannot be reached"),
    ],
)
@pytest.mark.usefixtures("prefect_server")
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    store = workplace / "mistakes"
    preset = make_preset(store=str(store))
    first = [] if "--preset" in arguments else ["--preset", preset]
    assert run(finetune, stages, [*first, *arguments]) == 2
    printed = capfd.readouterr().err
    assert_one_line(printed, said)
    assert_nothing_half_written(store)


def assert_one_line(printed: str, said: str) -> None:
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last


def assert_nothing_half_written(store: Path) -> None:
    """What was whole before the mistake was found may stay; nothing follows from it."""
    made = {path.name for path in store.iterdir()} if store.exists() else set()
    assert made <= {"drafts", "results", "model", "source", "dataset"}
    assert not list((store / "drafts").glob("*"))
    for kind in made - {"drafts", "results"}:
        assert all(len(path.name) == 16 for path in (store / kind).iterdir()), "artifacts are named by digest"
    shutil.rmtree(store, ignore_errors=True)


@pytest.mark.parametrize(
    ("content", "said"),
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
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    path, store = workplace / "bad.jsonl", workplace / "mistakes"
    path.write_text(content, encoding="utf-8")
    preset = make_preset(store=str(store))
    assert run(finetune, stages, ["--preset", preset, "--data.source", str(path)]) == 2
    printed = capfd.readouterr().err
    assert_one_line(printed, said)
    assert str(path) in printed.strip().splitlines()[-1]
    assert_nothing_half_written(store)


def _change_json(name: str, **values: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}))

    return change


def _no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    _change_json("tokenizer_config.json", chat_template=None)(directory)


@pytest.mark.parametrize(
    ("spoil", "said"),
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
    said: str,
) -> None:
    store, model = workplace / "mistakes", workplace / "bad-model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(tiny_model.path, model)
    spoil(model)
    preset = make_preset(store=str(store))
    assert run(finetune, stages, ["--preset", preset, "--model.name", str(model)]) == 2
    assert_one_line(capfd.readouterr().err, said)
    assert_nothing_half_written(store)


def test_the_error_is_the_last_line_also_with_a_server_of_its_own(make_preset: Preset, workplace: Path) -> None:
    preset = make_preset(store=str(workplace / "mistake"))
    command = [sys.executable, "-m", "flows.finetune", "--preset", preset, "--data.source", "missing.jsonl"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    said = "missing.jsonl: no such file. Correct data.source."
    assert done.stderr.strip().splitlines()[-1] == f"error: {said}"
    assert done.stderr.count(said) == 2, "once in Prefect's log, once at the end"
    assert not (workplace / "mistake" / "model").exists(), "found before the model was fetched"


@pytest.fixture
def full_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr("tasks.estimate.shutil.disk_usage", lambda path: usage._replace(free=10**6))


@pytest.mark.usefixtures("prefect_server", "full_disk")
def test_too_little_disk_is_found_before_anything_is_written(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    preset = make_preset(store=str(workplace / "small"))
    assert run(finetune, stages, ["--preset", preset]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {workplace / 'small'}: 0.0 GB are free and the run needs 0.6 GB (logs and small")
    assert "merged model 0.0" in said and "point `store` or `ollama.models` at a larger disk" in said
    assert not (workplace / "small").exists()


@pytest.mark.usefixtures("prefect_server", "full_disk")
def test_too_little_disk_is_found_also_where_only_the_fetched_model_tells_its_size(
    make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.estimate.parameters_of_source", lambda settings: None)
    store = workplace / "unknown"
    assert run(finetune, stages, ["--preset", make_preset(store=str(store))]) == 2
    assert_one_line(capfd.readouterr().err, "0.0 GB are free and the run needs 0.6 GB")
    assert {path.name for path in store.iterdir()} == {"results"}


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_no_matter_where_all_is_cached(finetuned: Finetuned, make_preset: Preset) -> None:
    assert finetune(make_preset(), "grit").gguf == finetuned.gguf
