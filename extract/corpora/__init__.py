"""Dataset folders to records."""
