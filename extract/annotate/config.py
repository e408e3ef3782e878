"""What a worker of an annotation is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from extract.annotate.presets import Preset
from extract.config import LoopConfig

ANSWERS, CLUES, RESULTS = "answers", "clues", "results"
"""Folders of a work folder, beside the job's."""


class AnnotationConfig(LoopConfig):
    """Everything that a worker that annotates needs. `store` is the work folder.

    Keys of endpoints are not among it: each worker takes them from its own environment.
    """

    work: Literal["annotation"] = "annotation"
    preset: Preset
    settings: str
    """Digest of what decides the texts; a worker that reads other prompts than these refuses."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Longest time for decoding one clip."""
    memory_bytes: int = Field(default=2 << 30, gt=0)
    """Most memory that decoding one clip may take."""
    attempts: int = Field(default=2, gt=0)
    """Times that a clip may crash, hang or exhaust its decoder before it is taken for the cause."""
    open_clips: int | None = Field(default=None, gt=0)
    """Clips that are worked on at once; None: enough to keep every endpoint busy."""

    @property
    def clips_at_once(self) -> int:
        """Clips that are worked on at once."""
        if self.open_clips is not None:
            return self.open_clips
        in_flight = sum(options.in_flight for options in self.preset.roles.values())
        return in_flight + 2 * self.n_decoders + 2
