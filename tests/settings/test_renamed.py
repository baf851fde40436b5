"""Settings of earlier versions: refused with what they are called now, wherever they are given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from prefect import Flow
from pydantic import BaseModel

from flows.compare import CompareLine, compare
from flows.finetune import finetune
from flows.support.command_line import CommandLine, parse
from tasks.engine.errors import UserError
from tasks.settings.comparison import CompareSettings
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import load_settings
from tasks.settings.renamed import RENAMED

EVERY_VERSION = Path(__file__).with_name("every_version.txt")
"""A setting a line, with its possible values, of all versions: a line or a word is added, and none is taken out."""
MADE_UP = {
    "training.steps": "training.max_steps",
    "training.save_often": "training.save_steps",
    "lora.bias": "take it out: biases are not trained",
    "grit.variant=kfac2": "grit.variant=kfac",
    "evaluation.tasks": "scoring.tasks",
    "runs": "seeds",
    "methods=adam": "methods=baseline",
}


@pytest.fixture
def made_up_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for former, present in MADE_UP.items():
        monkeypatch.setitem(RENAMED, former, present)


def values(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for part in get_args(annotation):
            yield from values(part)


def settings_and_values(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """`name` of each setting, and `name=value` of each value that can be listed."""
    for name, field in section.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from settings_and_values(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
            yield from (f"{prefix}{name}={value}" for value in values(field.annotation))


def of_every_version() -> set[str]:
    lines = [line.split() for line in EVERY_VERSION.read_text(encoding="utf-8").splitlines()]
    return {name for name, *_ in lines} | {f"{name}={value}" for name, *values in lines for value in values}


PRESENT = {*settings_and_values(FinetuneSettings), *settings_and_values(CompareSettings)}


def test_what_any_version_had_is_still_there_or_has_a_row() -> None:
    assert len(PRESENT) > 150
    gone = of_every_version() - PRESENT
    assert gone == set(RENAMED), "add a row to RENAMED for each that is gone, and a line here for each row"


def test_what_is_there_is_listed_so_that_its_end_is_noticed() -> None:
    assert not PRESENT - of_every_version(), f"add to {EVERY_VERSION.name}: {sorted(PRESENT - of_every_version())}"


def test_every_present_name_of_a_row_exists(made_up_rows: None) -> None:
    assert {present for present in RENAMED.values() if " " not in present} <= PRESENT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"steps": 3}}, "training.steps: renamed to training.max_steps"),
        ({"lora": {"bias": "none"}}, "lora.bias: take it out: biases are not trained"),
        ({"grit": {"variant": "kfac2"}}, "grit.variant=kfac2: renamed to grit.variant=kfac"),
        ({"evaluation": {"tasks": []}}, "evaluation.tasks: renamed to scoring.tasks"),
        (
            {"training": {"steps": 3, "stepz": 3}},
            "training.steps: renamed to training.max_steps; training.stepz: unknown setting (got 3)",
        ),
    ],
)
def test_a_former_name_is_refused_with_the_present_one(
    given: dict[str, Any], message: str, made_up_rows: None, tmp_path: Path
) -> None:
    preset = tmp_path / "old.yaml"
    preset.write_text(yaml.safe_dump(given))
    end = f"{message}. `--help` lists every setting."
    for refused, where in (
        (lambda: load_settings(str(preset)), str(preset)),
        (lambda: load_settings("demo", given), "settings given beside "),
        (lambda: finetune.validate_parameters({"overrides": given}), "overrides"),
        (lambda: compare.validate_parameters({"overrides": given}), "overrides"),
    ):
        with pytest.raises(UserError) as error:
            refused()
        assert str(error.value).startswith(where) and str(error.value).endswith(f": {end}")


def test_a_dotted_override_is_refused_too(made_up_rows: None) -> None:
    with pytest.raises(UserError, match="training.steps: renamed to training.max_steps"):
        load_settings("demo", {"training.steps": 3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.steps", "3"], "training.steps: renamed to training.max_steps"),
        (["--training.steps=3", "--lora.r", "8"], "training.steps: renamed to training.max_steps"),
        (["--no-training.save_often"], "training.save_often: renamed to training.save_steps"),
        (["--evaluation.tasks", "[]"], "evaluation.tasks: renamed to scoring.tasks"),
    ],
)
def test_a_former_option_is_refused_with_the_present_one(words: list[str], message: str, made_up_rows: None) -> None:
    for options in (CommandLine, CompareLine):
        with pytest.raises(UserError) as error:
            parse(words, options)
        assert str(error.value).startswith(f"command line: {message}. ")


def test_a_former_value_of_an_option_is_refused_with_the_present_one(made_up_rows: None) -> None:
    preset, _, given = parse(["--grit.variant", "kfac2"])
    with pytest.raises(UserError, match="grit.variant=kfac2: renamed to grit.variant=kfac"):
        load_settings(preset, given)


@pytest.mark.parametrize(
    ("flow", "parameters", "message"),
    [
        (compare, {"comparison": {"runs": 3}}, "comparison: runs: renamed to seeds. "),
        (compare, {"comparison": {"methods": ["adam", "grit"]}}, "comparison: methods=adam: renamed to methods=base"),
        (finetune, {"overrides": {"training": {"max_steps": 0}}}, "overrides: training.max_steps: Input should be "),
    ],
)
def test_a_deployments_faulty_parameters_are_one_line(
    flow: Flow[..., Any], parameters: dict[str, Any], message: str, made_up_rows: None
) -> None:
    with pytest.raises(UserError) as error:
        flow.validate_parameters(parameters)
    assert str(error.value).startswith(message)
