"""Models behind OpenAI-compatible endpoints: questions, answers that are kept, limits and costs."""
