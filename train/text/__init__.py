"""What is asked about a clip, in which words: tasks, templates, turns of a chat."""
