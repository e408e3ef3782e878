"""The page on which people rate annotations, and the server behind it."""
