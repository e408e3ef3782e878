"""Checkpoints that others published, as runs of ours."""
