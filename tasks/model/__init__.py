"""What a base model is: its files, its sources, NF4."""
