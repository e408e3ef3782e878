"""From trials to the table: statistics, page, Markdown, LaTeX, CSV, plots, the terminal."""
