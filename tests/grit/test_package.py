"""The package stands by itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import grit


def test_it_imports_nothing_of_this_project_but_itself() -> None:
    allowed = {"accelerate", "grit", "peft", "safetensors", "torch", "transformers", "trl"}
    files = sorted(Path(str(grit.__file__)).parent.glob("**/*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.partition(".")[0]
                assert root in allowed | sys.stdlib_module_names, f"{file.name} imports {name}"


def test_reading_the_configuration_loads_no_heavy_library() -> None:
    code = "import sys, grit.config; sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
