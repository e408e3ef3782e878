"""One raw clip, asked here and now: `emocache predict` and the page of `emocache app`."""
