"""A tiny LLaMA-architecture chat model and tokenizer, and the script that trains them on text."""
