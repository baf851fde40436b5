"""From files to tokens: reading, shapes, splits, tokenization, the data card."""
