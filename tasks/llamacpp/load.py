"""Loading a GGUF in llama.cpp; `python -m tasks.llamacpp.load FILE` only tries it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY

if TYPE_CHECKING:
    from llama_cpp import Llama


def load_gguf(file: Path, **options: Any) -> Llama:
    """Load a GGUF.

    Args:
        file: the model file.
        options: as `llama_cpp.Llama` takes them.

    Raises:
        ValueError, RuntimeError, AssertionError: llama.cpp cannot load it; what each is said of is not documented.
    """
    from llama_cpp import Llama

    _avoid_amx()
    return Llama(str(file), **{"verbose": False, **options})


def check_loads(file: Path, *, vocabulary_only: bool = False) -> None:
    """Load a GGUF in a process of its own, since llama.cpp ends its process at some faults in a file.

    Args:
        file: the model file.
        vocabulary_only: it has no weights.

    Raises:
        UserError: llama.cpp cannot load it.
    """
    done = run_module("tasks.llamacpp.load", str(file), *(["--vocabulary-only"] if vocabulary_only else []))
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
        why = faults[0].strip() if faults else f"exit {done.returncode}"
        fix = "Run again, and it is made anew; if that does not help, check the disk and the base model's files."
        raise UserError(f"llama.cpp cannot load the GGUF: {why}", where=file, fix=fix)


def run_module(module: str, *arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a module of the project in a process of its own.

    Args:
        module: its name.
        arguments: its command line.
        seconds: its time limit.

    Returns:
        The ended process, with what it printed.

    Raises:
        subprocess.TimeoutExpired: it has not ended by then, and was killed.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=seconds
    )


@functools.cache
def _avoid_amx() -> None:
    """Keep llama.cpp from Intel's AMX instructions, at which builds by some compilers crash (llama.cpp issue 20824).

    It uses them for weights that it repacks when it loads them, and `Llama` has no parameter that forbids this.
    """
    from llama_cpp import llama_cpp

    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info():
        return
    default = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = without_repacking


if __name__ == "__main__":
    load_gguf(Path(sys.argv[1]), n_ctx=8, vocab_only="--vocabulary-only" in sys.argv, verbose=True).close()
