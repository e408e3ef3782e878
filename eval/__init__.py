"""Model to replies, scores and reports; the demo."""
