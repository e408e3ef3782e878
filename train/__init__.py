"""Tokens to a tuned model: fusion, modal adapters and LoRA on a frozen language model."""
