"""Media that the tests make: pictures that carry their own number, known sounds."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

N_BITS = 8


def stamped(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Draw a picture that carries its number in its top row of 12-pixel blocks."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(x + 3 * number) % 256, (2 * y + number) % 256, (x + y) % 256], -1)
    picture = picture.astype(np.uint8)
    for bit in range(N_BITS):
        picture[:12, 12 * bit : 12 * bit + 12] = 255 if number >> bit & 1 else 0
    return picture


def stamp_of(picture: np.ndarray) -> int:
    """Read the number back."""
    return sum(int(picture[3:9, 12 * bit + 6].mean() > 128) << bit for bit in range(N_BITS))


def sine(hz: float, seconds: float, rate: int, channels: int) -> np.ndarray:
    """Return (channels, N) float32 of amplitude 0.5."""
    t = np.arange(round(seconds * rate)) / rate
    return np.tile((0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32), (channels, 1))


def write(
    path: Path,
    *,
    video: str | None = "libx264",
    options: dict[str, str] | None = None,
    n: int = 60,
    first_pts: int = 0,
    rotation: tuple[int, bool] | None = None,
    pix_fmt: str = "yuv420p",
    audio: str | None = None,
    sound: np.ndarray | None = None,
    rate: int = 44100,
) -> Path:
    """Encode n stamped pictures at 25 per second, a sound, or both."""
    with av.open(str(path), "w") as container:
        v: Any = None
        a: Any = None
        if video:
            if video not in av.codecs_available:
                pytest.skip(f"this build of PyAV has no encoder {video}")
            v = container.add_stream(video, rate=25, options=options or {})
            v.width, v.height, v.pix_fmt = 96, 64, pix_fmt
            v.codec_context.thread_count = 1
            if rotation:
                v.set_display_rotation(rotation[0], hflip=rotation[1])
        if audio:
            if audio not in av.codecs_available:
                pytest.skip(f"this build of PyAV has no encoder {audio}")
            a = container.add_stream(audio, rate=rate)
            a.layout = "stereo"
        for i in range(n if v else 0):
            frame = av.VideoFrame.from_ndarray(stamped(i), format="rgb24")
            frame.pts, frame.time_base = first_pts + i, Fraction(1, 25)
            container.mux(v.encode(frame))
        if v:
            container.mux(v.encode())
        if a and sound is not None:
            for start in range(0, sound.shape[1], 1024):
                block = np.ascontiguousarray(sound[:, start : start + 1024])
                piece = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
                piece.sample_rate, piece.pts = rate, start
                piece.time_base = Fraction(1, rate)
                container.mux(a.encode(piece))
            container.mux(a.encode())
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """Write (N,) or (N, channels) int16."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def write_clip(path: Path, seed: int = 0, seconds: float = 1.0) -> Path:
    """Write a small H.264 + AAC clip whose bytes differ by seed."""
    sound = sine(200 + 50 * seed, seconds, 44100, 2)
    return write(path, n=round(25 * seconds), first_pts=0, audio="aac", sound=sound)
