"""Ablations as one file: rows of settings, planned, extracted, trained, scored and laid out together."""
