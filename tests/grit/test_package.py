"""The package stands by itself."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import grit

PACKAGE = Path(str(grit.__file__)).parent


def test_it_imports_nothing_of_this_project_but_itself() -> None:
    allowed = {"accelerate", "grit", "peft", "safetensors", "torch", "transformers", "trl"}
    files = sorted(PACKAGE.glob("**/*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.partition(".")[0]
                assert root in allowed | sys.stdlib_module_names, f"{file.name} imports {name}"


def test_reading_the_configuration_and_the_variants_loads_no_heavy_library() -> None:
    heavy = "any(name in sys.modules for name in ('torch', 'trl', 'peft'))"
    code = f"import sys, grit.config, grit.variants; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ALONE = """
import sys

sys.modules |= dict.fromkeys(["prefect", "pydantic", "ollama", "datasets", "trl", "tasks", "flows"])  # not to be found
import grit, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

assert grit.__file__.startswith(sys.argv[1]), grit.__file__
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
manager = grit.GRITManager(model, grit.GRITConfig(kfac_min_samples=1))
grit.GritCallback(manager)
ids = torch.arange(12).reshape(2, 6)
model(input_ids=ids, labels=ids).loss.backward()
manager.step()
assert manager.factors_are_ready
"""


def test_it_can_be_installed_alone(tmp_path: Path) -> None:
    """Its wheel holds all of it, asks for no more than the whole project does, and works without the rest of it."""
    copy = shutil.copytree(PACKAGE, tmp_path / "grit", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    assert {file.name for file in (tmp_path / "site/grit").iterdir()} == {file.name for file in PACKAGE.glob("*.py")}
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    own = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    asked = own["dependencies"] + own["optional-dependencies"]["trl"]
    assert set(asked) <= set(project["dependencies"])
    assert {re.split("[<>=]", requirement)[0] for requirement in asked} == {
        "accelerate",
        "peft",
        "safetensors",
        "torch",
        "transformers",
        "trl",
    }
    code = [sys.executable, "-c", ALONE, str(tmp_path / "site")]
    done = subprocess.run(
        code,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path / "site",
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
