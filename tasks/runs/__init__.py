"""What concerns a run as a whole: checks before it, estimates, records of finished runs, pruning."""
