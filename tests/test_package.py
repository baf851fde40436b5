"""The project as a wheel: it holds every module and every file that they read, and says what only a checkout has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.engine.paths import REPOSITORY

PACKAGES = ("flows", "grit", "tasks")
READ = {".py", ".j2", ".txt"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is unpacked; what lies there comes before the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "copy"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True, timeout=300)
    (wheel,) = directory.glob("*.whl")
    shutil.unpack_archive(wheel, directory / "site", "zip")
    return directory / "site"


def test_the_wheel_holds_every_module_and_template(site: Path) -> None:
    def files(root: Path) -> set[str]:
        paths = (path for package in PACKAGES for path in (root / package).rglob("*"))
        return {str(path.relative_to(root)) for path in paths if path.suffix in READ}

    assert files(site) == files(REPOSITORY)
    assert "tasks/report/templates/report.html.j2" in files(site)
    assert "tasks/comparison/forgetting.txt" in files(site)
    assert not list(site.rglob("tests")), "tests are no part of it"


def test_the_wheel_holds_the_license_and_names_it(site: Path) -> None:
    (information,) = site.glob("*.dist-info")
    assert (information / "licenses/LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    lines = (information / "METADATA").read_text(encoding="utf-8").splitlines()
    assert "License-Expression: MIT" in lines and "License-File: LICENSE" in lines


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from tasks.settings.presets import load_settings as f; a = ['demo']", "presets"),
        (
            "from tasks.runs.preflight import check_settings as f; from tasks.settings.finetune import *\n"
            "import tasks.runs.preflight as p; p.find_converter = lambda _: None\n"
            "a = [FinetuneSettings(data=DataSettings(source='generated:extraction'))]",
            "modelfiles",
        ),
    ],
)
def test_outside_of_a_checkout_the_error_says_so(site: Path, tmp_path: Path, code: str, missing: str) -> None:
    code = f"{code}\nimport tasks; print(tasks.__file__)\ntry: f(*a)\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    where, error = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert error == (
        f"UserError {site / missing}: only a checkout has this directory, and this is an installed package. "
        "Work in a checkout of the project, installed with `make setup` or `pip install --editable .`."
    )
