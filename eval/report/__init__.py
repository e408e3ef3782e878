"""The report of a run: what is gathered for it, its figures, the page and its Markdown twin."""
