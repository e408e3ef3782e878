"""From the store to the model: which records are used, what is read of them, batches ahead of time."""
