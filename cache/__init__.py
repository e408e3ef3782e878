"""The token store, its contract and its vocabulary: all that extraction and training share."""
