"""How any stage runs: artifacts, cache, locks, retries, errors, the log."""
