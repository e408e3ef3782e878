"""Scores to look at: tables, figures and pages over benchmarks, and the comparison of runs."""
