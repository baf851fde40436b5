"""The stages of the fine-tuning pipeline, one a file, and the types that pass between them."""
