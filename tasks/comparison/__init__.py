"""The stages of `flows.compare` that `flows.finetune` does not have, one a file."""
