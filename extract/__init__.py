"""Media to tokens: decode a clip once, run the frozen encoders, commit to a token store."""
