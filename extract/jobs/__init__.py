"""One plan, shared by any number of workers through the store."""
