"""Manifests to look at: counts, tables, figures, a page, one record."""
