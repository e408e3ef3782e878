"""The frozen language model: loading it, and computing sequences that lie end to end."""
