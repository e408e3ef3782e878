"""Drawn faces for the demo corpus: one small vector face, steered by continuous parameters.

A face is a `Face`: five numbers of expression and the rest identity and framing. The demo corpus
draws the expression from one of three `LOOKS`; the pre-training of the tiny encoder draws every
number freely from `FACE_RANGES`.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Range = tuple[float, float]
"""Lowest and highest value of a parameter, drawn uniformly."""

FRAME_PX = 160
"""Default edge of a drawn frame in pixels."""

_OVERSAMPLE = 2  # drawn this many times larger, then averaged down: the antialiasing


@dataclass(frozen=True)
class Face:
    """Every continuous parameter of a drawn face; `FACE_RANGES` holds the range of each."""

    brow_height: float
    """-1 pressed onto the eyes, 0 at rest, 1 raised."""
    brow_slant: float
    """1: inner ends down (a frown), -1: inner ends up."""
    eye_open: float
    """0 nearly shut, 1 wide."""
    mouth_curve: float
    """-1 corners down, 1 corners up."""
    mouth_open: float
    """0 closed, 1 wide open."""
    skin: float
    """0 light, 1 dark."""
    hair: float
    """Position in the list of hair colours, 0 to 1, interpolated."""
    hair_length: float
    """0 short, 1 down to the chin."""
    head_x: float
    """Offset of the head from the centre, in frame widths."""
    head_y: float
    """Offset of the head from the centre, in frame heights."""
    head_scale: float
    """Half height of the head, in frame heights."""
    head_width: float
    """Half width of the head, in half heights."""
    tilt: float
    """Rotation of the head in radians, clockwise positive."""
    back_hue: float
    """Hue of the background, 0 to 1."""
    back_light: float
    """Lightness of the background, 0 to 1."""


FACE_RANGES: dict[str, Range] = {
    "brow_height": (-1.0, 1.0),
    "brow_slant": (-1.0, 1.0),
    "eye_open": (0.1, 1.0),
    "mouth_curve": (-1.0, 1.0),
    "mouth_open": (0.0, 1.0),
    "skin": (0.0, 1.0),
    "hair": (0.0, 1.0),
    "hair_length": (0.0, 1.0),
    "head_x": (-0.07, 0.07),
    "head_y": (-0.04, 0.07),
    "head_scale": (0.33, 0.41),
    "head_width": (0.72, 0.86),
    "tilt": (-0.12, 0.12),
    "back_hue": (0.0, 1.0),
    "back_light": (0.25, 0.85),
}
"""Range of every parameter. A look narrows only the five of expression."""

LOOKS: dict[str, dict[str, Range]] = {
    "wide": {
        "brow_height": (0.45, 1.0),
        "brow_slant": (-0.4, 0.1),
        "eye_open": (0.75, 1.0),
        "mouth_curve": (-0.25, 0.2),
        "mouth_open": (0.5, 1.0),
    },
    "drawn": {
        "brow_height": (-1.0, -0.35),
        "brow_slant": (0.4, 1.0),
        "eye_open": (0.3, 0.65),
        "mouth_curve": (-1.0, -0.4),
        "mouth_open": (0.0, 0.2),
    },
    "level": {
        "brow_height": (-0.2, 0.25),
        "brow_slant": (-0.2, 0.2),
        "eye_open": (0.35, 0.7),
        "mouth_curve": (0.15, 0.7),
        "mouth_open": (0.0, 0.2),
    },
}
"""The three looks of the demo corpus, each as ranges of the parameters of expression."""

_SKIN = ((253, 226, 202), (226, 172, 128), (166, 108, 72), (96, 62, 46))
_HAIR = ((32, 26, 26), (88, 54, 34), (150, 74, 38), (214, 172, 96), (176, 176, 180))


def sample_face(rng: np.random.Generator, narrowed: Mapping[str, Range] | None = None) -> Face:
    """Draw a face, each parameter uniformly and on its own.

    Args:
        rng: Where the numbers come from.
        narrowed: Ranges that replace those of `FACE_RANGES`, for example `LOOKS["wide"]`.

    Returns:
        The face.
    """
    ranges = {**FACE_RANGES, **(narrowed or {})}
    return Face(**{name: float(rng.uniform(*ranges[name])) for name in FACE_RANGES})


def face_values(face: Face) -> NDArray[np.float32]:
    """Return the parameters as `(15,)` float32, each scaled from its range to -1..1."""
    values = asdict(face)
    scaled = [2 * (values[n] - low) / (high - low) - 1 for n, (low, high) in FACE_RANGES.items()]
    return np.array(scaled, dtype=np.float32)


def moving_faces(face: Face, n_frames: int, fps: float, rng: np.random.Generator) -> list[Face]:
    """Let a face sway and talk a little: one face per frame, the expression kept.

    Args:
        face: The face at rest.
        n_frames: Number of frames.
        fps: Frames per second.
        rng: Where the rates and phases of the motion come from.

    Returns:
        `n_frames` faces.
    """
    rates_hz = rng.uniform(0.15, 0.6, size=4)
    phases = rng.uniform(0, 2 * math.pi, size=4)
    sway = np.sin(
        2 * math.pi * np.arange(n_frames)[:, None] / fps * rates_hz + phases
    )  # (n_frames, 4)
    return [
        replace(
            face,
            head_x=face.head_x + 0.012 * float(x),
            head_y=face.head_y + 0.008 * float(y),
            tilt=face.tilt + 0.03 * float(turn),
            mouth_open=max(0.0, face.mouth_open + 0.05 * float(talk)),
        )
        for x, y, turn, talk in sway
    ]


def draw_face(
    face: Face, rng: np.random.Generator | None = None, *, size_px: int = FRAME_PX
) -> NDArray[np.uint8]:
    """Draw one frame.

    Args:
        face: What to draw.
        rng: Source of a faint pixel noise; without it the frame is noiseless.
        size_px: Edge of the square frame in pixels.

    Returns:
        `(size_px, size_px, 3)` uint8 RGB.
    """
    edge = size_px * _OVERSAMPLE
    image = _background(face, edge)
    _Pen(image, face, edge).draw()
    pixels: NDArray[np.uint8] = np.asarray(image.reduce(_OVERSAMPLE))
    if rng is None:
        return pixels
    noise = rng.integers(-5, 6, size=(size_px, size_px, 1), dtype=np.int16)
    noisy: NDArray[np.uint8] = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return noisy


def face_landmarks(face: Face) -> NDArray[np.float32]:
    """Return where the expression sits: `(14, 2)` float32, x and y in frame widths and heights.

    Left then right: inner end, middle and outer end of the brow, top and bottom of the eye; then
    the corners of the mouth, the middle of the upper lip and of the lower lip.
    """
    points = []
    for side in (-1, 1):
        points += [_brow(face, side)[place] for place in (0, 2, 4)]
        x, y = _EYE
        points += [np.array([side * x, y + end * _eye_half(face)]) for end in (-1, 1)]
    upper, lower = _lips(face)
    points += [upper[0], upper[-1], upper[len(upper) // 2], lower[len(lower) // 2]]
    turn, origin = _frame(face)
    return (np.stack(points) @ turn + origin).astype(np.float32)


def openface_landmarks(face: Face) -> NDArray[np.float64]:
    """Return the 68 landmarks of OpenFace's layout: `(68, 2)`, x and y in frame widths and heights.

    In order the jaw from left to right (17), both brows (10), the bridge and base of the nose (9), both
    eyes (12), the outer line of the lips (12) and the inner one (8).
    """
    bend = np.linspace(0, math.pi, 17)
    parts = [np.stack([-face.head_width * np.cos(bend), np.sin(bend)], axis=1)]
    parts += [_brow(face, -1)[::-1], _brow(face, 1)]
    parts.append(np.stack([np.zeros(4), np.linspace(-0.1, 0.2, 4)], axis=1))
    parts.append(np.stack([np.linspace(-0.1, 0.1, 5), np.full(5, 0.26)], axis=1))
    turn = np.radians([180, 240, 300, 0, 60, 120])
    eye = np.stack([0.18 * np.cos(turn), _eye_half(face) * np.sin(turn)], axis=1)
    parts += [eye + np.array([side * _EYE[0], _EYE[1]]) for side in (-1, 1)]
    upper, lower = _lips(face)
    parts += [upper[::2], lower[10:1:-2]]
    parts += [upper[[1, 4, 6, 8, 11]], lower[[8, 6, 4]]]
    matrix, origin = _frame(face)
    return np.concatenate(parts) @ matrix + origin


def action_units(face: Face) -> dict[str, float]:
    """Return what the face does as OpenFace would say it: action unit -> intensity, 0 to 5."""
    raised = max(0.0, face.brow_height)
    drawn = {
        "AU01": raised,
        "AU02": raised * (1 - max(0.0, face.brow_slant)),
        "AU04": max(0.0, face.brow_slant),
        "AU05": max(0.0, face.eye_open - 0.7) / 0.3,
        "AU12": max(0.0, face.mouth_curve),
        "AU15": max(0.0, -face.mouth_curve),
        "AU25": face.mouth_open,
        "AU26": max(0.0, face.mouth_open - 0.2) / 0.8,
    }
    return {unit: 5 * min(1.0, strength) for unit, strength in drawn.items()}


def _frame(face: Face) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the matrix and the origin that take face coordinates to shares of the frame."""
    cos, sin = math.cos(face.tilt), math.sin(face.tilt)
    turn = np.array([[cos, sin], [-sin, cos]]) * face.head_scale
    return turn, np.array([0.5 + face.head_x, 0.5 + face.head_y])


_EYE = (0.34, -0.1)  # centre of the eye on the positive side, in face coordinates


def _eye_half(face: Face) -> float:
    """Return half the height of an eye."""
    return 0.03 + 0.15 * face.eye_open


def _brow(face: Face, side: int) -> NDArray[np.float64]:
    """Return the line of one brow from the inner to the outer end, `(5, 2)`."""
    along = np.linspace(0, 1, 5)
    rest = -0.42 - 0.13 * face.brow_height - 0.05 * np.sin(math.pi * along)
    y = rest + face.brow_slant * np.interp(along, [0, 1], [0.13, -0.07])
    return np.stack([side * (0.14 + 0.4 * along), y], axis=1)


def _lips(face: Face) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lines of the upper and of the lower lip, `(13, 2)` each."""
    along = np.linspace(-1, 1, 13)
    x = (0.32 - 0.1 * face.mouth_open) * along
    middle = 0.54 + 0.15 * face.mouth_curve * (0.5 - along**2)
    gape = 0.17 * face.mouth_open * np.sqrt(1 - along**2)
    return np.stack([x, middle - 0.6 * gape], axis=1), np.stack([x, middle + gape], axis=1)


def _blend(stops: tuple[tuple[int, int, int], ...], at: float) -> NDArray[np.float64]:
    """Interpolate a list of RGB colours at a position 0..1."""
    place = np.clip(at, 0, 1) * (len(stops) - 1)
    colours = np.array(stops, dtype=np.float64)
    return np.array([np.interp(place, np.arange(len(stops)), colours[:, c]) for c in range(3)])


def _ink(colour: NDArray[np.float64]) -> tuple[int, int, int]:
    """Turn a colour of floats into one that PIL takes."""
    red, green, blue = (int(v) for v in np.clip(colour, 0, 255))
    return red, green, blue


def _background(face: Face, edge: int) -> Image.Image:
    """Return a plain wall, a little lighter at the top."""
    ends = [
        [255 * v for v in colorsys.hls_to_rgb(face.back_hue, face.back_light + shift, 0.35)]
        for shift in (0.1, -0.1)
    ]
    column = np.linspace(ends[0], ends[1], 32)[:, None, :]  # (32, 1, 3)
    return Image.fromarray(column.astype(np.uint8)).resize((edge, edge), Image.Resampling.NEAREST)


_RING = np.linspace(0, 2 * math.pi, 36, endpoint=False)
_CIRCLE = np.stack([np.cos(_RING), np.sin(_RING)], axis=1)  # (36, 2)


class _Pen:
    """Draws in face coordinates: origin between nose and eyes, y down, 1 = half the head height."""

    def __init__(self, image: Image.Image, face: Face, edge: int) -> None:
        self._draw: Any = ImageDraw.Draw(image)
        self._face = face
        self._scale = face.head_scale * edge
        self._turn, self._origin = (edge * part for part in _frame(face))
        self._skin = _blend(_SKIN, face.skin)
        self._hair = _blend(_HAIR, face.hair)

    def draw(self) -> None:
        """Draw the head from back to front."""
        face, width = self._face, self._face.head_width
        self._oval((0, -0.12 + 0.2 * face.hair_length), (width + 0.12, 0.98), self._hair)
        for side in (-1, 1):
            self._oval((side * width, 0.02), (0.1, 0.17), 0.9 * self._skin)
        self._oval((0, 0), (width, 1.0), self._skin)
        self._fringe(width)
        for side in (-1, 1):
            self._eye(side)
            self._brow(side)
        self._line(np.array([[0.0, 0.02], [-0.07, 0.24], [0.05, 0.26]]), 0.035, 0.7 * self._skin)
        self._mouth()

    def _fringe(self, width: float) -> None:
        """Cover the top of the head, with the hair line curved across the forehead."""
        arc = np.linspace(math.pi * 1.06, math.pi * 1.94, 24)
        top = np.stack([np.cos(arc) * (width + 0.05), np.sin(arc) * 1.06], axis=1)
        x = np.linspace(top[-1, 0], top[0, 0], 12)
        line = np.stack([x, -0.62 + 0.35 * (x / width) ** 2 + 0.05 * np.sin(4 * x)], axis=1)
        self._fill(np.concatenate([top, line]), self._hair)

    def _eye(self, side: int) -> None:
        """Draw the white, the iris and the lid of one eye."""
        centre = (side * _EYE[0], _EYE[1])
        half = _eye_half(self._face)
        self._oval(centre, (0.2, half + 0.025), 0.45 * self._skin)
        self._oval(centre, (0.18, half), np.array([250.0, 250, 248]))
        self._oval(centre, (0.095, min(0.095, half)), np.array([62.0, 46, 40]))
        self._oval(centre, (0.045, min(0.045, half)), np.array([8.0, 8, 8]))

    def _brow(self, side: int) -> None:
        """Draw one brow: height moves it, slant turns it."""
        line = _brow(self._face, side)
        self._line(line, 0.075, 0.3 * self._skin + 0.15 * self._hair)

    def _mouth(self) -> None:
        """Draw the lips, and the dark between them when the mouth is open."""
        upper, lower = _lips(self._face)
        lip = 0.6 * self._skin * np.array([1.0, 0.62, 0.62])
        self._fill(np.concatenate([upper, lower[::-1]]), np.array([60.0, 16, 20]))
        self._line(upper, 0.06, lip)
        self._line(lower, 0.06, lip)

    def _place(self, points: NDArray[np.float64]) -> list[tuple[float, float]]:
        """Turn face coordinates `(N, 2)` into pixels."""
        placed = points @ self._turn + self._origin
        return [(x, y) for x, y in placed.tolist()]

    def _fill(self, points: NDArray[np.float64], colour: NDArray[np.float64]) -> None:
        self._draw.polygon(self._place(points), fill=_ink(colour))

    def _oval(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        colour: NDArray[np.float64],
    ) -> None:
        self._fill(_CIRCLE * np.array(radii) + np.array(centre), colour)

    def _line(self, points: NDArray[np.float64], width: float, colour: NDArray[np.float64]) -> None:
        self._draw.line(
            self._place(points),
            fill=_ink(colour),
            width=max(1, round(width * self._scale)),
            joint="curve",
        )
