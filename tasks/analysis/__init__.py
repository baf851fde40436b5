"""What a comparison computes from the outputs of its runs."""
