"""Chat formats, from the tokenizer's template to the end of a turn."""
