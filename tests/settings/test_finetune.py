from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from grit.config import GRITConfig
from tasks.engine.errors import UserError
from tasks.ollama.names import model_name
from tasks.settings.finetune import FinetuneSettings, GritSettings, TrainingSettings
from tasks.settings.presets import load_settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.max_step": 3}, "training.max_step: unknown setting"),
        ({"trainning": {}}, "trainning: unknown setting"),
        ({"training.max_steps": -1}, "training.max_steps: Input should be greater than or equal to 1 (got -1)"),
        ({"training": {"max_steps": 5, "warmup_steps": 9}}, "warmup_steps (9) must be below max_steps (5)"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate: Input should be a finite number"),
        ({"data": {"validation_fraction": 0.6, "test_fraction": 0.5}}, "no row is left for training"),
        ({"method": "magic"}, "method: Input should be 'baseline' or 'grit'"),
        ({"store_uri": "s3://key:hush@bucket"}, "store_uri: no user name or password here"),
        ({"ollama.host": "me:hush@example.org:11434"}, "ollama.host: no user name or password here"),
        ({"lora.target_modules": []}, "lora.target_modules: Tuple should have at least 1 item"),
    ],
)
def test_impossible_settings_are_one_clear_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("demo", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_an_error_says_whether_the_preset_or_what_was_given_beside_it_is_at_fault(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {max_steps: no}\n")
    with pytest.raises(UserError) as caught:
        load_settings(str(path), {"training.learning_rate": 1e-3})
    assert caught.value.where == str(path)
    with pytest.raises(UserError) as caught:
        load_settings(str(path), {"training.max_steps": "6.5"})
    assert caught.value.where == f"settings given beside {path}"


@pytest.mark.parametrize("preset", ["nonsense", "../demo", "missing.yaml"])
def test_unknown_presets_are_refused(preset: str) -> None:
    with pytest.raises(UserError, match="no such preset"):
        load_settings(preset)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "holds no settings"), ("", "no settings")]
)
def test_broken_preset_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_settings(str(path))


def test_a_users_preset_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {max_steps: 7, warmup_steps: 1}\nstore: runs\n")
    overrides = {"training.learning_rate": "1e-3", "ollama": {"name": "mine-{method}"}}
    settings = load_settings(str(path), overrides)
    assert settings.training == TrainingSettings(max_steps=7, warmup_steps=1, learning_rate=1e-3)
    assert model_name(settings) == "mine-grit"
    assert settings.store == Path.cwd() / "runs"


@given(steps=st.integers(2, 10_000), rate=st.floats(1e-8, 1, allow_nan=False), seed=st.integers(0, 2**31))
def test_settings_survive_json(steps: int, rate: float, seed: int) -> None:
    settings = FinetuneSettings(seed=seed, training={"max_steps": steps, "warmup_steps": 1, "learning_rate": rate})
    assert FinetuneSettings.model_validate_json(settings.model_dump_json()) == settings


def test_grit_settings_are_those_of_the_package() -> None:
    package = {field.name: field.default for field in dataclasses.fields(GRITConfig)}
    assert package == GritSettings().model_dump()


def test_every_setting_is_documented() -> None:
    def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undocumented(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                names.append(prefix + name)
        return names

    assert undocumented(FinetuneSettings) == []
