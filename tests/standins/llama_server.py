"""llama-server as Ollama starts it, out of the package xllamacpp; `python -m tests.standins.llama_server FILE CONTEXT`.

It renders chats by the template in the GGUF, and serves until its input ends. In a process of its own: llama.cpp ends
its process at some faults in a file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tasks.engine.paths import REPOSITORY


class LlamaServer:
    """A running llama-server with one model.

    Args:
        gguf: the model file.
        context: tokens of a conversation, at most.

    Raises:
        RuntimeError: it cannot load the file.
    """

    def __init__(self, gguf: Path, context: int) -> None:
        command = [sys.executable, "-m", "tests.standins.llama_server", str(gguf), str(context)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"llama-server process has terminated: exit status {self.process.wait()}")

    def post(self, route: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer."""
        response = httpx.post(self.url + route, json=request, timeout=600)
        return response.status_code, response.json()

    def close(self) -> None:
        self.process.communicate()


def serve(gguf: str, context: int) -> None:
    """Serve a model until this process's input ends."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.n_ctx, parameters.n_parallel = context, 1
    parameters.n_gpu_layers, parameters.cpuparams.n_threads = 0, 1
    parameters.no_extra_bufts = True  # repacked weights would be computed with by AMX, at which some builds crash
    parameters.warmup = parameters.fit_params = parameters.ui = False
    server = xllamacpp.Server(parameters)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
