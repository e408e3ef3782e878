"""Tiny checkpoints of the real encoder architectures, and the script that trains them."""
