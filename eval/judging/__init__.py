"""Reasoning scored by a judge model: EMER and MME-Emotion; and lexical overlap, which needs none."""
