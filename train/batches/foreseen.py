"""A reader of tokens that are not stored yet: what clips will have, by what their containers state."""

from __future__ import annotations

import math

from cache.clip import Record
from cache.commit import Entry, Status
from cache.encoders import AUDIO_FRAMES_PER_S
from cache.spec import Stream, TokenSpec
from train.batches.reading import ViewReader
from train.config import Input, Preset

_HAS: dict[Stream, str] = {"audio": "has_audio", "video": "has_video", "image": "has_image"}


class Foreseen(ViewReader):
    """Knows of every record which inputs it will have and how long they are; reads none.

    A stream that the container does not deny is taken to be there and to be encoded without failure;
    sound of unknown length fills its window.
    """

    def __init__(self, preset: Preset) -> None:
        """Foresee the inputs of a preset; weights digests may be open."""
        self._preset = preset
        self.specs = preset.tokens.by_input()
        self._n_tokens = {name: shape[0] for name, shape in preset.view_shapes().items()}

    def _find(self, name: Input, record: Record) -> tuple[TokenSpec, Entry]:
        spec = self.specs[name]
        absent = getattr(record.seen_clip, _HAS[spec.stream]) is False
        n_valid = 0 if absent else _n_valid(spec, record)
        entry = Entry(
            key=record.token_key(spec),
            row=0,
            status=Status.ABSENT if absent else Status.OK,
            valid_len=n_valid,
        )
        return spec, entry


def _n_valid(spec: TokenSpec, record: Record) -> int:
    n, duration_s = spec.max_shape[0], record.seen_clip.duration_s
    if spec.stream != "audio" or duration_s is None or getattr(spec.encoder, "padded", False):
        return n
    return min(n, math.ceil(duration_s * AUDIO_FRAMES_PER_S))
