"""The whole flow on a tiny random model: every stage for real, through Prefect, and the command line's errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact as PrefectArtifact
from prefect.client.orchestration import get_client

from flows import chat
from flows.finetune import Finetuned, finetune, stages
from flows.support.command_line import run
from tasks.engine.artifacts import Artifact
from tasks.engine.paths import REPOSITORY
from tasks.engine.planning import planning
from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.names import ModelName
from tasks.ollama.next_commands import next_commands
from tasks.settings.presets import load_settings
from tests.support.pages import Page

Preset = Callable[..., str]
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def finetuned(make_preset: Preset, prefect_server: None) -> Finetuned:
    result = finetune(make_preset(), "grit")
    assert isinstance(result, Finetuned)
    return result


def test_the_flow_ends_with_a_registered_model(finetuned: Finetuned, workplace: Path) -> None:
    manifest = workplace / "ollama/manifests/registry.ollama.ai/library/tiny-grit/latest"
    assert json.loads(manifest.read_text())["layers"][0]["digest"] == f"sha256:{finetuned.gguf.files['model.gguf']}"
    commands = next_commands(finetuned.registration, finetuned.promotion)
    assert commands[0].endswith(" ollama serve") and commands[1:] == ["ollama run tiny-grit"]
    assert (
        f"Next: `{commands[0]}`, and in another terminal: `{commands[1]}`"
        in (finetuned.report.path / "report.md").read_text()
    )
    assert not list((workplace / "store/drafts").iterdir()), "nothing half-written is left"


def test_a_second_run_computes_nothing(finetuned: Finetuned, make_preset: Preset) -> None:
    preset = make_preset()
    with planning() as plan:
        stages(load_settings(preset, {"method": "grit"}))
    assert {state for _, state in plan.stages} == {"cached"}
    again = finetune(preset, "grit")
    assert again.gguf == finetuned.gguf
    assert again.report == finetuned.report


PLAN = """
import sys
from flows.finetune import stages
from tasks.engine.planning import planning
from tasks.settings.presets import load_settings
from tasks.engine.paths import REPOSITORY
with planning() as plan:
    stages(load_settings(sys.argv[1], {"method": "grit"}))
print({state for _, state in plan.stages}, {"torch", "transformers", "datasets"} & sys.modules.keys())
"""


def test_finding_all_cached_takes_no_heavy_library(finetuned: Finetuned, make_preset: Preset) -> None:
    command = [sys.executable, "-c", PLAN, make_preset()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "{'cached'} set()"


AFTER_TRAINING = {"train", "merge", "score tuned", "convert"}
AFTER_DATA = AFTER_TRAINING | {"prepare_dataset", "check_vocabulary", "score base"}


@pytest.mark.parametrize(
    ("setting", "value", "runs"),
    [
        ("ollama.name", "another", set()),
        ("ollama.parameters", {"temperature": 0.2}, set()),
        ("ollama.target", "none", set()),
        ("training.save_steps", 2, set()),
        ("training.save_minutes", 1.5, set()),
        ("export.gguf_type", "f16", {"convert"}),
        ("fidelity.rows", 2, set()),
        ("scoring.max_new_tokens", 5, {"score base", "score tuned"}),
        ("scoring.samples", 1, {"score base", "score tuned"}),
        ("training.learning_rate", 2e-2, AFTER_TRAINING),
        ("training.per_device_batch_size", 1, AFTER_TRAINING),
        ("lora.r", 8, AFTER_TRAINING),
        ("grit.power", 1.0, AFTER_TRAINING),
        ("model.dtype", "bfloat16", AFTER_TRAINING | {"score base"}),
        ("data.max_length", 32, AFTER_DATA),
        ("data.max_rows", 30, AFTER_DATA),
        ("chat.system", "Be brief.", AFTER_DATA),
        ("seed", 1, AFTER_DATA | {"fetch_data"}),
        ("method", "baseline", AFTER_TRAINING),
        ("model.large_on_cpu", True, set()),
        ("model.trust_remote_code", True, AFTER_DATA | {"fetch_model"}),
    ],
)
def test_a_setting_runs_again_what_depends_on_it_and_nothing_else(
    finetuned: Finetuned, make_preset: Preset, setting: str, value: Any, runs: set[str]
) -> None:
    overrides = {"method": "grit", setting: value}
    with planning() as plan:
        stages(load_settings(make_preset(), overrides))
    scored = iter(("score base", "score tuned"))
    states = {next(scored) if name == "score" else name: state for name, state in plan.stages}
    if "convert" in runs or setting.startswith("fidelity."):
        runs = runs | {"check_fidelity"}
    registers = {"register"} if "convert" in runs or setting.startswith("ollama.") else set()
    expected = runs | registers | {"promote", "write_report"}  # they record all settings
    assert {name for name, state in states.items() if state == "to run"} == expected


def test_the_baseline_is_no_matter_of_grits_settings(finetuned: Finetuned, make_preset: Preset) -> None:
    preset = make_preset()
    with planning() as plan:
        stages(load_settings(preset, {"method": "baseline"}))
    with planning() as other:
        stages(load_settings(preset, {"method": "baseline", "grit.power": 1.0}))
    assert plan.keys == other.keys


def test_what_has_not_changed_is_skipped_with_the_reason(
    finetuned: Finetuned, make_preset: Preset, workplace: Path
) -> None:
    def run_again(**sections: Any) -> Any:
        return finetune(make_preset(**sections), "grit", skip_unchanged=True, return_state=True)

    state = run_again()
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert "Nothing has changed since" in state.message and "tiny-grit" in state.message
    rows = (workplace / "rows.jsonl").read_text()
    (workplace / "rows.jsonl").write_text(rows + '{"prompt": "Add 40 and 40.", "completion": "The sum is 80."}\n')
    state = run_again()
    assert state.name == "Completed"
    assert isinstance(state.result(), Finetuned)
    assert run_again().name == "Skipped"
    (workplace / "rows.jsonl").write_text(rows)
    assert run_again().name == "Completed", "what is registered is now another model"
    assert run_again().name == "Skipped"
    next((workplace / "ollama/manifests").rglob("latest")).unlink()
    assert run_again().name == "Completed", "Ollama has lost the model"


def test_the_report_shows_what_its_data_says(finetuned: Finetuned) -> None:
    report = finetuned.report.path
    html = (report / "report.html").read_text()
    data = json.loads((report / "report.json").read_text())
    page = Page(html)
    assert page.pictures == 4
    assert page.loads == [], "nothing is loaded from elsewhere"
    assert len(html) < 3_000_000
    text = " ".join(page.text)
    assert data["verdict"]["text"] in text
    assert data["verdict"]["text"] in (report / "report.md").read_text()
    for row in data["comparison"]:
        assert f"{row['base']:.4f}" in text and f"{row['tuned']:.4f}" in text
    assert data["settings"]["training"]["max_steps"] == 3
    assert data["history"]["method"] == "grit" and data["steps"][-1]["grit"]["in_use"] == 1


def test_runs_are_named_by_stage_method_and_model(finetuned: Finetuned, tiny_model: Artifact) -> None:
    with get_client(sync_client=True) as client:
        assert f"grit {tiny_model.path.name}" in {run.name for run in client.read_flow_runs()}
        names = {run.name.removesuffix(f" grit {tiny_model.path.name}") for run in client.read_task_runs()}
    assert {"train", "score", "score (tuned)", "convert (tuned)"} <= names


def test_the_state_of_a_run_names_the_report_and_the_model_in_use(finetuned: Finetuned, make_preset: Preset) -> None:
    state = finetune(make_preset(), "grit", return_state=True)
    in_use = f"tiny-grit is {finetuned.registration.facts['model']} now."
    assert state.message == f"{in_use} Full report: {finetuned.report.path / 'report.html'}"


def test_prefects_pages_show_the_report_and_the_progress(finetuned: Finetuned) -> None:
    report, training = (PrefectArtifact.get(key) for key in ("report", "training"))
    assert report is not None and report.type == "markdown"
    assert report.data == (finetuned.report.path / "report.md").read_text()
    assert training is not None and training.type == "progress" and training.data == 100


def test_one_can_chat_with_what_was_made(
    finetuned: Finetuned, make_preset: Preset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.chat.MOST_TOKENS", 16)  # a random model ends no answer by itself
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


def test_a_second_run_shows_what_was_cached_and_where_all_else_was_logged(
    finetuned: Finetuned, make_preset: Preset, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(finetune, stages, ["--preset", make_preset()]) == 0
    printed, errors = capfd.readouterr()
    _begin, heading, *lines = printed.strip().splitlines()
    assert heading.split() == ["stage", "time", "result"]
    cached = [line.split()[0] for line in lines if " cached " in line]
    names = "fetch_model fetch_data prepare_dataset check_vocabulary score train merge score convert check_fidelity"
    assert cached == [*names.split(), "register", "promote", "write_report"]
    assert lines[-3] == f"Report: {finetuned.report.path / 'report.html'}"
    assert Path(lines[-2].removeprefix("Log:").strip()).parent == workplace / "store" / "logs"
    assert lines[-1] == f"Model:  tiny-grit is {finetuned.registration.facts['model']} now."
    assert not errors


def test_plan_prints_and_runs_nothing(make_preset: Preset, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = make_preset(store=str(workplace / "unused"))
    assert run(finetune, stages, ["--preset", preset, "--plan", "--training.max_steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: 7" in printed
    assert "train" in printed and "to run" in printed
    assert "Disk: at most 0.5" in printed and "Time: training at most" in printed, "also before the model was fetched"
    assert not (workplace / "unused").exists()


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_no_matter_where_all_is_cached(finetuned: Finetuned, make_preset: Preset) -> None:
    assert finetune(make_preset(), "grit").gguf == finetuned.gguf


def test_only_a_better_model_takes_the_place_of_the_one_in_use(
    make_preset: Preset, workplace: Path, prefect_server: None
) -> None:
    section = {"name": "careful-{method}", "target": "store", "models": str(workplace / "ollama")}
    place, in_use = OllamaDirectory(workplace / "ollama"), ModelName("careful-grit")

    def run_with(**overrides: Any) -> Finetuned:
        preset = make_preset(ollama=section, promotion={"rule": "better"})
        result = finetune(preset, "grit", overrides)
        assert isinstance(result, Finetuned)
        return result

    first = run_with()
    assert first.promotion.facts["promoted"], first.promotion.facts
    digest = place.digest(in_use)
    worse = run_with(training={"learning_rate": 1e-3})
    failed = {check["key"]: check["name"] for check in worse.promotion.facts["checks"] if check["reading"] == "failed"}
    words = f"Validation loss against {first.registration.facts['model']}, nats per token (8 rows)"
    assert failed["validation_loss:present"] == words
    assert "Not promoted" in (worse.report.path / "report.html").read_text()
    assert place.digest(in_use) == digest
    rows = (workplace / "rows.jsonl").read_text()
    (workplace / "rows.jsonl").write_text(rows + '{"prompt": "Add 41 and 41.", "completion": "The sum is 82."}\n' * 9)
    try:
        on_new_rows = run_with(training={"learning_rate": 1e-3})
    finally:
        (workplace / "rows.jsonl").write_text(rows)
    checks = {check["key"]: check for check in on_new_rows.promotion.facts["checks"]}
    assert checks["validation_loss:present"]["reading"] == "failed", "the one in use was scored on the new rows"
    assert place.digest(in_use) == digest


def test_no_secret_gets_anywhere_but_where_it_belongs(
    make_preset: Preset, workplace: Path, server: Any, prefect_server: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Searched: what is printed, all files of the run, Ollama's, and all that Prefect's server knows of it."""
    secrets = {"HF_TOKEN": "hf_OnlyForThisTest", "OLLAMA_API_KEY": "ollama-OnlyForThisTest"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tasks.ollama.server.ANSWER", 4)
    ollama = {"name": "secret", "target": "server", "host": server.url}
    preset = make_preset(store=str(workplace / "secret"), ollama=ollama)
    assert run(finetune, stages, ["--preset", preset, "--method", "baseline"]) == 0
    assert list(workplace.glob("secret/logs/*.log")), "what is printed is there"
    assert server.authorizations == {f"Bearer {secrets['OLLAMA_API_KEY']}"}, "it reaches the server, each time"
    texts = "".join(capfd.readouterr())
    files = [path for root in (workplace / "secret", server.models) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 20
    texts += "".join(path.read_bytes().decode("latin-1") for path in files)
    with get_client(sync_client=True) as client:
        for kind in ("flow_runs", "task_runs", "artifacts", "logs"):
            response = client.request("POST", f"/{kind}/filter", json={})
            response.raise_for_status()
            assert response.json(), kind
            texts += response.text
    assert not [value for value in secrets.values() if value in texts]
    assert "baseline" in texts
