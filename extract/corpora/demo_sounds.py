"""Synthesised voices for the demo corpus: a wordless melody, steered by continuous parameters.

A voice is a `Voice`: seven numbers of expression, the rest timbre and surroundings. The demo
corpus draws the expression from one of three `SOUNDS`; the pre-training of the tiny encoder draws
every number freely from `VOICE_RANGES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from extract.corpora.demo_faces import Range

SAMPLE_RATE_HZ = 16000
"""Sample rate of the synthesised sound."""

_SHARPEST_HZ = 7000.0  # no harmonic above this, well below half the sample rate
_TABLE = 2048  # samples in the wave table of one period


@dataclass(frozen=True)
class Voice:
    """Every continuous parameter of a voice; `VOICE_RANGES` holds the range of each."""

    pitch: float
    """Base pitch as log2(Hz): 7 is 128 Hz, 8 is 256 Hz."""
    pitch_slope: float
    """Glide of each note in octaves; positive rises."""
    loudness_db: float
    """RMS level of the notes relative to full scale, in dB."""
    tempo_hz: float
    """Notes per second."""
    brightness: float
    """0 nearly a sine, 1 rich in harmonics."""
    roughness: float
    """0 smooth, 1 strongly beating and breathy."""
    irregularity: float
    """0 an even beat, 1 notes of very unequal length and force."""
    timbre: float
    """-1 odd harmonics only, 1 all harmonics alike."""
    melody: float
    """Spread of the notes around the base pitch, in octaves."""
    noise_db: float
    """RMS level of the background hiss relative to full scale, in dB."""


VOICE_RANGES: dict[str, Range] = {
    "pitch": (6.7, 9.0),
    "pitch_slope": (-0.6, 0.8),
    "loudness_db": (-38.0, -10.0),
    "tempo_hz": (1.0, 8.0),
    "brightness": (0.0, 1.0),
    "roughness": (0.0, 1.0),
    "irregularity": (0.0, 1.0),
    "timbre": (-1.0, 1.0),
    "melody": (0.0, 0.25),
    "noise_db": (-65.0, -50.0),
}
"""Range of every parameter. A sound narrows only the seven of expression."""

SOUNDS: dict[str, dict[str, Range]] = {
    "bright": {
        "pitch": (8.1, 8.8),
        "pitch_slope": (0.3, 0.8),
        "loudness_db": (-24.0, -17.0),
        "tempo_hz": (4.5, 7.0),
        "brightness": (0.6, 1.0),
        "roughness": (0.0, 0.15),
        "irregularity": (0.05, 0.3),
    },
    "even": {
        "pitch": (6.8, 7.6),
        "pitch_slope": (-0.08, 0.08),
        "loudness_db": (-36.0, -28.0),
        "tempo_hz": (1.0, 2.2),
        "brightness": (0.0, 0.35),
        "roughness": (0.0, 0.15),
        "irregularity": (0.0, 0.1),
    },
    "rough": {
        "pitch": (7.1, 8.2),
        "pitch_slope": (-0.4, 0.1),
        "loudness_db": (-17.0, -11.0),
        "tempo_hz": (5.0, 8.0),
        "brightness": (0.4, 0.9),
        "roughness": (0.6, 1.0),
        "irregularity": (0.5, 1.0),
    },
}
"""The three sounds of the demo corpus, each as ranges of the parameters of expression."""


@dataclass(frozen=True)
class Sound:
    """A synthesised sound with the tracks that a local regression may aim at."""

    samples: NDArray[np.float32]
    """`(N,)` float32 at 16 kHz, within -1..1."""
    pitch: NDArray[np.float32]
    """`(N,)` float32: log2(Hz) at each sample."""
    envelope: NDArray[np.float32]
    """`(N,)` float32: force of the note at each sample, 0 between notes, about 1 within."""


def sample_voice(rng: np.random.Generator, narrowed: Mapping[str, Range] | None = None) -> Voice:
    """Draw a voice, each parameter uniformly and on its own.

    Args:
        rng: Where the numbers come from.
        narrowed: Ranges that replace those of `VOICE_RANGES`, for example `SOUNDS["even"]`.

    Returns:
        The voice.
    """
    ranges = {**VOICE_RANGES, **(narrowed or {})}
    return Voice(**{name: float(rng.uniform(*ranges[name])) for name in VOICE_RANGES})


def voice_values(voice: Voice) -> NDArray[np.float32]:
    """Return the parameters as `(10,)` float32, each scaled from its range to -1..1."""
    values = asdict(voice)
    scaled = [2 * (values[n] - low) / (high - low) - 1 for n, (low, high) in VOICE_RANGES.items()]
    return np.array(scaled, dtype=np.float32)


def synthesise(voice: Voice, duration_s: float, rng: np.random.Generator) -> Sound:
    """Sing one wordless phrase.

    Args:
        voice: How it sounds.
        duration_s: Length in seconds.
        rng: Source of the melody, of the unevenness and of the noise.

    Returns:
        The samples and their pitch and envelope tracks, `(N,)` each, N = duration x 16000.
    """
    n_samples = round(duration_s * SAMPLE_RATE_HZ)
    pitch, envelope = _score(voice, n_samples, rng)
    time_s = np.arange(n_samples) / SAMPLE_RATE_HZ
    wobble = voice.roughness * 0.04 * np.sin(2 * math.pi * rng.uniform(35, 55) * time_s)
    phase = np.cumsum(2.0 ** (pitch + wobble)) / SAMPLE_RATE_HZ  # in periods
    table = _period(voice, highest_hz=2.0 ** float(pitch.max()))
    tone = table[(phase % 1.0 * _TABLE).astype(np.intp)]
    beating = 0.5 + 0.5 * np.sin(2 * math.pi * rng.uniform(45, 75) * time_s)
    breath = rng.standard_normal(n_samples, dtype=np.float32)
    rough = voice.roughness
    voiced = envelope * (tone * (1 - 0.85 * rough * beating) + 0.5 * rough * breath)
    power = float(np.mean(voiced[envelope > 0.3] ** 2))
    voiced *= 10 ** (voice.loudness_db / 20) / math.sqrt(power)
    hiss = 10 ** (voice.noise_db / 20) * rng.standard_normal(n_samples, dtype=np.float32)
    return Sound(
        samples=np.clip(voiced + hiss, -1, 1).astype(np.float32),
        pitch=pitch.astype(np.float32),
        envelope=envelope.astype(np.float32),
    )


def _score(
    voice: Voice, n_samples: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lay out the notes: pitch in log2(Hz) and envelope 0..1, `(N,)` float64 each."""
    pitch = np.full(n_samples, voice.pitch)
    envelope = np.zeros(n_samples)
    beat = SAMPLE_RATE_HZ / voice.tempo_hz  # samples per even note
    start = rng.uniform(0, 0.3) * min(beat, SAMPLE_RATE_HZ / 4)
    while start < n_samples:
        length = beat * math.exp(0.75 * voice.irregularity * rng.uniform(-1, 1))
        force = 1 - 0.6 * voice.irregularity * rng.uniform(0, 1)
        note = slice(int(start), min(n_samples, int(start + length)))
        if note.stop <= note.start:
            break
        along = np.arange(note.stop - note.start) / length  # 0..1 through the note
        base = voice.pitch + voice.melody * rng.uniform(-1, 1)
        pitch[note] = base + voice.pitch_slope * (np.minimum(along / 0.8, 1) - 0.5)
        rise = np.minimum(along * length / (0.015 * SAMPLE_RATE_HZ), 1)
        fall = np.clip((0.85 - along) / 0.25, 0, 1)
        envelope[note] = force * rise * fall
        start += length
    return pitch, envelope


def _period(voice: Voice, *, highest_hz: float) -> NDArray[np.float64]:
    """Return one period of the tone at unit RMS, `(2048,)` float64."""
    n_harmonics = max(1, min(16, int(_SHARPEST_HZ / highest_hz)))
    order = np.arange(1, n_harmonics + 1)
    level = np.power(order, -(3.0 - 2.2 * voice.brightness), dtype=np.float64)
    level[1::2] *= 0.5 * (1 + voice.timbre)
    angle = 2 * math.pi * np.arange(_TABLE) / _TABLE
    period: NDArray[np.float64] = level @ np.sin(order[:, None] * angle)
    unit_rms: NDArray[np.float64] = period / math.sqrt(float(np.mean(period**2)))
    return unit_rms
