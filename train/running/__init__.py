"""A run under way: its folder, its stages and processes, what it says of itself."""
