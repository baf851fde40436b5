"""The flows: how the stages are chained, and their command lines."""

import os

# Nothing leaves the machine unless the user turns it on. Set before Prefect is imported.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PREFECT_LOGGING_COLORS", "false")  # a command's log is a file
os.environ.setdefault("TQDM_MININTERVAL", "1")  # seconds; else a bar fills the log
