"""From adapter to GGUF: merging, converting, quantising, measuring fidelity."""
