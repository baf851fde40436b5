"""`make setup` with a stand-in for pip: where torch comes from, what is installed, and that pip's errors are seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.engine.paths import REPOSITORY

PYTHON = """#!/bin/sh
if [ "$1" != -m ]; then exec {python} "$@"; fi
mkdir -p "$3/bin"
cp {pip} "$3/bin/pip"
"""
PIP = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *"${{REFUSED:-nothing}}"*+cpu*) echo "pip's own words" >&2; exit 1;; esac
"""


class Setup:
    """`make` in a copy of the checkout's files that it reads."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.log, self.bin = directory, directory / "pip.log", directory / "bin"
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "tasks/export/converter-requirements.txt"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((REPOSITORY / name).read_bytes())
        pip = self.script("pip", PIP.format(log=self.log))
        self.python = self.script("python", PYTHON.format(python=sys.executable, pip=pip))
        self.script("nvidia-smi", "#!/bin/sh\nexit ${NO_GPU:-0}\n")

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def make(self, target: str, **environment: str) -> str:
        path = f"{self.bin}:{os.environ['PATH']}"
        command = ["make", "--no-print-directory", f"PYTHON={self.python}", target]
        done = subprocess.run(
            command,
            check=True,
            cwd=self.directory,
            env={"PATH": path, "NO_GPU": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.stdout

    def installed(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.is_file() else []


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI's torch is the CPU build")
def test_the_cpu_build_is_taken_where_it_is_found(setup: Setup) -> None:
    assert "trying PyTorch" not in setup.make("setup")
    torch, project, converter = setup.installed()
    assert torch.endswith("+cpu") and "index-url" not in torch
    assert ".[demo]" in project and "--constraint constraints.txt" in project
    assert "--require-hashes" in converter


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI's torch is the CPU build")
def test_where_there_is_none_pypis_build_follows_with_what_it_costs_and_pips_words(setup: Setup) -> None:
    printed = setup.make("setup", REFUSED="install")
    assert printed.count("pip's own words") == 2
    assert "PyPI's comes with CUDA: 2.5 GB more to download, 4 GB more on disk" in printed
    _, index, project, _ = setup.installed()
    assert "--timeout 10" in index and "--index-url" in index
    assert ".[demo]" in project, "the rest is installed all the same"


def test_with_a_gpu_torch_comes_from_pypi(setup: Setup) -> None:
    assert "torch with CUDA" in setup.make("setup", NO_GPU="0")
    assert not any("+cpu" in line for line in setup.installed())


def test_the_tests_set_up_adds_to_the_demos_and_each_is_done_once(setup: Setup) -> None:
    setup.make("setup")
    before = len(setup.installed())
    setup.make("setup-test")
    (added,) = setup.installed()[before:]
    assert ".[demo,cluster,dev,judge]" in added
    for target in ("setup", "setup-test"):
        setup.make(target)
    assert len(setup.installed()) == before + 1
    constraints = setup.directory / "constraints.txt"
    os.utime(constraints, (time.time() + 5,) * 2)
    setup.make("setup-test")
    assert len(setup.installed()) == 2 * (before + 1), "other versions are installed by all steps"
