"""Algorithm 1 of the paper: clips to clues, clues to descriptions, and how people check them."""
