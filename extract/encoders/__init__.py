"""Frozen encoders, one file each, behind one protocol (`extract.encoders.base`)."""
