"""One worker: from a claimed unit to committed tokens."""
