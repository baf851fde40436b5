"""The chat at a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

LOOP = "import flows.chat\nwhile True: print(repr(flows.chat.ask()), flush=True)"


def read_until(terminal: int, pattern: str) -> str:
    """What the terminal shows, until that ends in a pattern; an OSError where the program ends before."""
    shown = ""
    while not re.search(rf"(?s:{pattern})\Z", shown):
        shown += os.read(terminal, 1024).decode()
    return shown


def test_pasted_lines_are_one_message_and_arrows_move() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", LOOP], stdin=theirs, stdout=theirs, env=environment) as chat:
        try:
            os.close(theirs)
            read_until(ours, ">>> ")
            os.write(ours, b"\x1b[200~first\nsecond\x1b[201~\n")  # as terminals mark what is pasted
            assert r"'first\nsecond'" in read_until(ours, "'\r\n.*>>> ")
            os.write(ours, b"ab\x1b[Dc\n")
            assert "'acb'" in read_until(ours, "'\r\n.*>>> ")
        finally:
            chat.kill()
    os.close(ours)
