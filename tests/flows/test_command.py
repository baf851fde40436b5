"""The command `llama3-grit`: what it lists, refuses and starts, and in which project and environment."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from flows.command import SUBCOMMANDS, main, project_and_words, start
from flows.support.pasting import PROGRAM, PROJECT, typed
from tasks.engine import paths
from tasks.engine.paths import MARKS, REPOSITORY
from tasks.settings.presets import load_settings

START = """
import json, resource, sys
from flows.command import start
status = start(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([status, used.ru_utime + used.ru_stime, sorted(name for name in sys.modules if "." not in name)]))
"""
AT_IMPORT = """
import json, os, sys
class Watching:
    def find_spec(name, path=None, target=None):
        if name == "prefect":
            print(json.dumps(dict(os.environ)))
            os._exit(0)
sys.meta_path.insert(0, Watching)
sys.stdout.reconfigure(line_buffering=True)
from flows.command import start
start(sys.argv[1:])
"""


def in_child(code: str, *words: str, cwd: Path, **environment: str) -> list[str]:
    """The lines that a new Python prints, which has none of Prefect's settings but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", PROJECT))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=kept | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )
    return done.stdout.splitlines()


def environment_of_prefect(*words: str, cwd: Path, **environment: str) -> dict[str, str]:
    """The environment when a subcommand imports Prefect; the child ends there."""
    (line,) = in_child(AT_IMPORT, *words, cwd=cwd, **environment)
    values: dict[str, str] = json.loads(line)
    return values


def test_help_lists_every_subcommand_and_imports_nothing_heavy(tmp_path: Path) -> None:
    *lines, last = in_child(START, "--help", cwd=tmp_path)
    status, seconds, modules = json.loads(last)
    assert status == 0 and seconds < 1
    assert not {"torch", "prefect", "pydantic", "httpx", "tasks"} & set(modules)
    assert lines[0] == "usage: llama3-grit [--project DIR] COMMAND ..."
    listed = [line.split(maxsplit=1) for line in lines if line.split(maxsplit=1)[:1] and line.split()[0] in SUBCOMMANDS]
    assert listed == [[name, subcommand.help] for name, subcommand in SUBCOMMANDS.items()]
    expected = {"finetune", "compare", "chat", "rollback", "prune", "serve", "down", "recover"}
    assert expected == set(SUBCOMMANDS)


def test_without_a_subcommand_the_help_comes_and_the_status_is_an_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert start([]) == 2
    assert capsys.readouterr().out.startswith("usage: llama3-grit ")


def test_without_an_installed_package_the_version_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("flows.command.version", missing)
    assert start(["--version"]) == 2
    assert capsys.readouterr().err.startswith("error: llama3-grit is not installed, ")


@pytest.mark.parametrize(("module", "words"), [("flows.chat", ["chat"]), ("flows.prune", ["prune"])])
def test_ctrl_c_anywhere_is_one_line(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.command.leave", sys.exit)  # it would close stderr
    for place in ("run", "Store" if module == "flows.prune" else "load_settings"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ending:
            patch.setattr(f"{module}.{place}", press)
            main(words)
        assert (ending.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_what_is_logged_after_a_command_is_not_shown(tmp_path: Path) -> None:
    code = """
import atexit, logging, sys
logging.basicConfig(stream=sys.stdout)
atexit.register(logging.error, "last words")
from flows.command import main
main(["--help"])
"""
    assert not [line for line in in_child(code, cwd=tmp_path) if "last words" in line]


def test_a_command_leaves_the_log_of_this_process_as_it_is() -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert logging.getLogger("prefect").isEnabledFor(logging.ERROR)


def test_a_wrong_project_of_the_environment_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PROJECT, str(tmp_path))
    assert start(["chat"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {PROJECT}={tmp_path}: no checkout of the project. ")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["--version"]) == 0
    assert capsys.readouterr().out == f"llama3-grit {version('llama3-grit')}\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["fintune", "--plan"], "fintune: no such command. Did you mean finetune?"),
        (["xyzzy"], f"xyzzy: no such command. List them: {typed('--help')}"),
        (["finetune", "--project"], "--project: expected one argument. Name the directory of a checkout."),
        (["--project", "{tmp}", "chat"], "--project {tmp}: no checkout of the project. Name the directory that"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([word.replace("{tmp}", str(tmp_path)) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and error.replace("{tmp}", str(tmp_path)) in line


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_help_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        start([name, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: llama3-grit {name} [-h]")


def test_finetune_says_what_it_does_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(["finetune", "--help"])
    assert "Without any option, the demo is fine-tuned by GRIT." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["demo"], "finetune --preset demo --method grit"),
        (["compare-demo"], "compare --preset demo --methods baseline,grit --seeds 3"),
        (["chat"], "chat --preset demo --method grit"),
        (["serve"], "serve"),
        (["serve", "PORT=4300"], "serve --port 4300"),
        (["down", "PORT=4300"], "down"),
        (["clean-artifacts"], "prune"),
    ],
)
def test_make_calls_the_command(target: list[str], words: str) -> None:
    make = ["make", "--dry-run", "--no-print-directory", "--directory", str(REPOSITORY), *target]
    last = subprocess.run(make, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ").splitlines()[-1]
    assert f"{last.rstrip()} ".startswith(f".venv/bin/llama3-grit {words} ")


def test_the_pages_name_no_other_subcommand() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *REPOSITORY.glob("docs/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = re.findall(r"(?:bin/|`|^)llama3-grit ([a-z]+)(?![\w-])", text, re.MULTILINE)
    assert len(named) > 20 and set(named) <= set(SUBCOMMANDS)


def test_a_subcommand_gets_the_words_after_its_name_and_gives_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Sequence[str]] = []

    def run(words: Sequence[str]) -> int:
        given.append(words)
        return 143

    monkeypatch.setattr("flows.chat.run", run)
    assert start(["chat", "--preset", "x.yaml", "--plan"]) == 143
    assert given == [["--preset", "x.yaml", "--plan"]]


WORDS = ["--data.columns", "completion=a b", "-x", "-1", "--lora.r=8", "", "--proj", "é", "--training.keep_best"]


@pytest.mark.parametrize("option", [["--project", "DIR"], ["--project=DIR"]])
@pytest.mark.parametrize("place", [0, 1, 3, 10])
def test_the_project_may_be_named_anywhere_and_other_words_stay_in_order(option: list[str], place: int) -> None:
    words = ["finetune", *WORDS]
    assert project_and_words([*words[:place], *option, *words[place:]]) == ("DIR", words)


def test_the_project_may_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROJECT, "THERE")
    assert project_and_words(["chat"]) == ("THERE", ["chat"])
    assert project_and_words(["chat", "--project", "HERE"]) == ("HERE", ["chat"])


def test_another_projects_code_does_the_work(tmp_path: Path) -> None:
    other, here = tmp_path / "other", tmp_path / "here"
    for mark in MARKS:
        (other / mark).parent.mkdir(parents=True, exist_ok=True)
        (other / mark).touch()
    (other / "flows/__init__.py").touch()
    (other / "flows/command.py").write_text(f"import os, sys\nprint(sys.argv, os.environ['{PROJECT}'], __file__)\n")
    here.mkdir()
    (here / "flows.py").write_text("raise SystemExit('the current directory is no place for code')\n")
    (printed,) = in_child(START, "chat", "--project", "../other", "--preset", "a b", cwd=here)
    file = f"{other}/flows/command.py"
    assert printed == f"{[file, 'chat', '--preset', 'a b']} {other} {file}"


def test_from_another_directory_presets_are_found_and_outputs_lie_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.support.command_line import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("store: outputs\ndata: {source: rows.jsonl}\n", encoding="utf-8")
    assert load_settings("demo").store == REPOSITORY / ".artifacts"
    own = load_settings("own.yaml")
    assert (own.store, own.data.source) == (REPOSITORY / "outputs", "rows.jsonl")
    preset, _, given = parse(["--preset", "own.yaml", "--store", "here", "--ollama.models", "models"])
    settings = load_settings(preset, given)
    assert (settings.store, settings.ollama.models) == (tmp_path / "here", tmp_path / "models")


@pytest.mark.parametrize(("words", "store"), [([], "project/.artifacts"), (["--store", "x"], "elsewhere/x")])
def test_prune_tidies_the_projects_store_unless_another_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], store: str
) -> None:
    for mark in MARKS:
        (tmp_path / "project" / mark).mkdir(parents=True)
    waste = {name: tmp_path / name / "gguf/0123456789abcdef" for name in ("project/.artifacts", "elsewhere/x")}
    for directory in waste.values():
        directory.mkdir(parents=True)
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("STORE", "/nowhere")  # another program's
    assert start(["prune", "--hours", "0", "--yes", *words]) == 0
    assert [name for name, directory in waste.items() if not directory.exists()] == [store]


def test_serve_sets_up_a_server_of_the_checkout_before_prefect_is_imported(tmp_path: Path) -> None:
    values = environment_of_prefect(
        "serve", "--port", "4300", cwd=tmp_path, PREFECT_API_URL="http://127.0.0.1:4200/api"
    )
    assert values["PREFECT_HOME"] == str(REPOSITORY / ".prefect")
    assert values["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert values["PREFECT_SERVER_API_PORT"] == "4300"
    assert values["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert (values["DO_NOT_TRACK"], values["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")


def test_a_run_takes_prefects_environment_as_it_is_and_tells_nobody(tmp_path: Path) -> None:
    values = environment_of_prefect("finetune", "--plan", cwd=tmp_path, PREFECT_HOME=str(tmp_path))
    assert (values["DO_NOT_TRACK"], values["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")
    assert values["PREFECT_HOME"] == str(tmp_path) and "PREFECT_API_URL" not in values


@pytest.mark.parametrize("command", ["down", "recover", "serve"])
def test_the_server_that_was_started_is_found_on_its_port(tmp_path: Path, command: str) -> None:
    (tmp_path / "server.url").write_text("http://127.0.0.1:4321/api")
    values = environment_of_prefect(command, cwd=tmp_path, PREFECT_HOME=str(tmp_path))
    assert values["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"


def test_recover_looks_at_the_server_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "server.url").write_text("http://127.0.0.1:4321/api")
    given = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://elsewhere/api"}
    assert environment_of_prefect("recover", cwd=tmp_path, **given)["PREFECT_API_URL"] == "http://elsewhere/api"


def test_a_printed_command_runs_where_it_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pasted = f"{typed('serve', ['--port', '4300'])} --help"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["/bin/sh", "-c", pasted], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(f"usage: {PROGRAM} serve ")
