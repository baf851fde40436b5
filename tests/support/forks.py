"""A process that imports once, and forks for each piece of work; imports of torch take seconds in each new process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.engine.paths import REPOSITORY


class ForkServer:
    """The process, as another one uses it.

    Args:
        module: a program that ends by calling `serve`.
        arguments: its command line.
        environment: variables that differ from this process's; the checkout is added to PYTHONPATH.
    """

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
        environment = os.environ | environment
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), str(REPOSITORY)])
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.lock = threading.Lock()

    def run(self, **work: Any) -> subprocess.CompletedProcess[str]:
        """Have a fork do something, given as JSON; returns its exit status and what it printed."""
        with self.lock, tempfile.TemporaryDirectory() as directory:
            printed = [Path(directory) / name for name in ("stdout", "stderr")]
            print(json.dumps({"printed": list(map(str, printed)), "work": work}), file=self.process.stdin, flush=True)
            status = self.process.stdout.readline()
            assert status, "the process that forks has ended"
            return subprocess.CompletedProcess([], int(status), *(file.read_text() for file in printed))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(work: Callable[..., None]) -> None:
    """Fork for each line that is read, and answer with the fork's exit status.

    Args:
        work: done in the fork, which ends with it.
    """
    answers = os.fdopen(os.dup(1), "w")
    gc.collect()
    gc.freeze()  # a fork that goes through what was imported would also copy its pages
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.flush()
        if (fork := os.fork()) == 0:
            for descriptor, file in enumerate(asked["printed"], start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            work(**asked["work"])
            return
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), file=answers, flush=True)
