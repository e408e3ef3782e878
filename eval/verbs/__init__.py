"""The command line: a file per verb, with its options and what it says."""
