"""One training: its process, trainer, records, checkpoints and limits."""
