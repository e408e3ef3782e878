"""Facial action units: the peak frame, what a face does in words, and the emotion that it hints at.

A detector (`extract.annotate.evidence.detectors`) gives an `AuTable`, the intensities of each frame.
Algorithm 1 of the paper picks the frame with the highest sum; what that frame shows becomes the
description of the visible expression (C_ved). Phrases and rules are data: action_units.json, or a user's
own file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator, model_validator

from cache.clip import Peak
from cache.errors import SchemaError, near_miss
from cache.schema import Model, decode

BUILTIN = Path(__file__).with_name("action_units.json")
"""The table that holds unless a user gives another."""
MAX_INTENSITY = 5.0
"""FACS grades A to E are 1 to 5."""
_CLAUSES_PER_SENTENCE = 3

Unit = Annotated[str, StringConstraints(pattern=r"^AU[0-9]{2}$")]
"""Name of an action unit with two digits: `AU06`."""
Intensity = Annotated[float, Field(ge=0.0, le=MAX_INTENSITY, allow_inf_nan=False)]


class FrameUnits(Model):
    """What a face does in one frame."""

    index: int = Field(ge=0)
    """Counted in decoded frames, from 0."""
    pts_s: float | None = Field(default=None, allow_inf_nan=False)
    """Time of the frame as the detector states it."""
    intensities: dict[Unit, Intensity]
    """0 (not seen) to 5 (as strong as it gets); detectors with another scale must convert."""
    present: tuple[Unit, ...] | None = None
    """Units that the detector says are there; None if it does not decide that."""
    confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    """How sure the detector is of the face."""

    @property
    def score(self) -> float:
        """Sum of the intensities, whatever their order."""
        return math.fsum(self.intensities.values())

    def peak(self, method: str, score: float | None = None) -> Peak:
        """Return this frame as a record's peak; the score is the sum of all units unless given."""
        return Peak(
            index=self.index,
            pts_s=self.pts_s,
            method=method,
            score=self.score if score is None else score,
        )


class AuTable(Model):
    """The units of one face over a clip."""

    frames: tuple[FrameUnits, ...]
    """Only frames where the face was found, in order."""
    n_frames: int | None = Field(default=None, ge=0)
    """Frames that the detector looked at, with and without a face; None if unknown."""
    face: int | None = None
    """Number of the face that was chosen, as the detector counts them."""
    n_faces: int | None = None
    """Faces that there were to choose from."""

    @model_validator(mode="after")
    def _in_order(self) -> AuTable:
        indices = [frame.index for frame in self.frames]
        if any(b <= a for a, b in pairwise(indices)):
            raise ValueError("frames must be in order, each index once")
        if self.n_frames is not None and indices and indices[-1] >= self.n_frames:
            raise ValueError(f"frame {indices[-1]} lies outside the {self.n_frames} frames")
        return self


def peak_frame(table: AuTable, without: Collection[str] = ()) -> FrameUnits | None:
    """Return the frame of strongest expression by the paper's Algorithm 1.

    The first frame with the highest sum of intensities. The highest sum so far starts at 0 and only a
    higher one replaces it, so a face that never moves has no peak.

    Args:
        table: Units per frame.
        without: Units to leave out of the sum, `AU45` (blinks) for example. The paper sums all.
    """
    highest, peak = 0.0, None
    for frame in table.frames:
        score = sum_without(frame.intensities, without)
        if score > highest:
            highest, peak = score, frame
    return peak


def sum_without(intensities: Mapping[str, float], without: Collection[str]) -> float:
    """Return the sum of intensities, some units left out."""
    return math.fsum(value for unit, value in intensities.items() if unit not in without)


class Band(Model):
    """A range of intensities that is described by the same words."""

    name: str = Field(min_length=1)
    least: Intensity
    """Lowest intensity that belongs to it; it reaches up to the next band."""


class UnitWords(Model):
    """How one action unit is called and described."""

    name: str = Field(min_length=1)
    """As FACS names it."""
    phrases: dict[str, tuple[str, ...]]
    """Band -> clauses that say what is seen, without capital or full stop: `the brows are lowered`."""


class UnitTable(Model):
    """Names, phrases and rules of action units."""

    bands: tuple[Band, ...] = Field(min_length=1)
    """From weak to strong; what is weaker than the first is not mentioned."""
    units: dict[Unit, UnitWords]
    rest: tuple[str, ...] = Field(min_length=1)
    """Clauses for a face that does nothing worth mentioning."""
    present_from: Intensity = 1.0
    """Intensity from which a unit counts as present, where the detector does not say."""
    rules: dict[str, dict[str, tuple[Unit, ...]]]
    """Set of rules -> emotion -> units that must all be present."""

    @field_validator("bands")
    @classmethod
    def _ascend(cls, bands: tuple[Band, ...]) -> tuple[Band, ...]:
        if any(b.least <= a.least for a, b in pairwise(bands)):
            raise ValueError("bands must ascend in 'least'")
        return bands

    @model_validator(mode="after")
    def _is_whole(self) -> UnitTable:
        names = [band.name for band in self.bands]
        for unit, words in self.units.items():
            for name in words.phrases:
                if name not in names:
                    hint = near_miss(name, names)
                    raise ValueError(
                        f"units.{unit}: there is no band {name!r}; bands are {', '.join(names)}.{hint}"
                    )
            bad = [n for n in names if not any(p.strip() for p in words.phrases.get(n, ()))]
            if bad:
                raise ValueError(f"units.{unit} has no phrase for band {', '.join(bad)}")
        for chosen, rules in self.rules.items():
            for emotion, units in rules.items():
                if not units or len(set(units)) != len(units):
                    raise ValueError(f"rules.{chosen}.{emotion}: give each unit once, at least one")
        return self

    def band_of(self, intensity: float) -> str | None:
        """Return the band of an intensity; None below the first."""
        found = None
        for band in self.bands:
            if intensity >= band.least:
                found = band.name
        return found

    def rules_of(self, name: str) -> dict[str, tuple[str, ...]]:
        """Return a set of rules; raises SchemaError for an unknown name."""
        if name not in self.rules:
            raise SchemaError(
                f"there is no set of action unit rules {name!r}; there are {', '.join(self.rules)}."
                f"{near_miss(name, self.rules)}"
            )
        return self.rules[name]


def load_units(path: Path | None = None) -> UnitTable:
    """Read a table of units.

    Args:
        path: JSON of a user's own. It holds only what differs, down to the phrases of one band; null
            takes an entry away, a list takes the place of the built-in one. With bands of other names it
            gives all units.

    Raises:
        SchemaError: It cannot be read, or does not fit.
    """
    if path is None:
        return _builtin()
    try:
        own = json.loads(path.read_bytes())
    except OSError as error:
        raise SchemaError(
            f"{path}: the table of action units cannot be read ({error.strerror}). Check the path."
        ) from None
    except ValueError as error:
        raise SchemaError(f"{path}: not JSON ({error}). Compare it with {BUILTIN.name}.") from None
    if not isinstance(own, dict):
        raise SchemaError(f"{path}: holds {type(own).__name__}, a JSON object is needed.")
    data: dict[str, Any] = json.loads(BUILTIN.read_bytes())
    if _band_names(own) not in (None, _band_names(data)):
        data["units"] = {}  # phrases for other bands are of no use
    return decode(UnitTable, _merged(data, own), str(path))


def _band_names(data: dict[str, Any]) -> list[Any] | None:
    bands = data.get("bands")
    if not isinstance(bands, list):
        return None
    return [band.get("name") if isinstance(band, dict) else None for band in bands]


@cache
def _builtin() -> UnitTable:
    return decode(UnitTable, json.loads(BUILTIN.read_bytes()), BUILTIN.name)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return `old` with the entries of `new`, objects within objects too; null takes an entry away."""
    found = dict(old)
    for key, value in new.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            found[key] = _merged(old[key], value)
        else:
            found[key] = value
    return found


def unit_phrases(
    intensities: Mapping[str, float], uid: str, table: UnitTable | None = None
) -> dict[str, str]:
    """Return a phrase for each unit that is strong enough, the strongest first.

    The phrase is chosen among its band's by the uid and the unit: the same for every run, another for
    the next clip. Units that the table does not know are left out.

    Args:
        intensities: Unit -> 0 to 5.
        uid: Of the record.
        table: Phrases; None: the built-in ones.
    """
    table = table or _builtin()
    found = {}
    for unit, intensity in sorted(intensities.items(), key=lambda item: (-item[1], item[0])):
        band = table.band_of(intensity)
        if band is not None and unit in table.units:
            found[unit] = _choice(table.units[unit].phrases[band], f"{uid} {unit}")
    return found


def describe_face(
    intensities: Mapping[str, float], uid: str, table: UnitTable | None = None
) -> str:
    """Return English sentences about what a face does, the strongest movement first.

    A face without a movement that is strong enough is described as being at rest.

    Args:
        intensities: Unit -> 0 to 5, of the peak frame.
        uid: Of the record; decides between phrases of equal meaning.
        table: Phrases; None: the built-in ones.
    """
    table = table or _builtin()
    clauses = list(unit_phrases(intensities, uid, table).values())
    if not clauses:
        clauses = [_choice(table.rest, f"{uid} rest")]
    groups = [
        clauses[start : start + _CLAUSES_PER_SENTENCE]
        for start in range(0, len(clauses), _CLAUSES_PER_SENTENCE)
    ]
    return " ".join(_sentence(group) for group in groups)


def _choice(phrases: tuple[str, ...], key: str) -> str:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return phrases[int.from_bytes(digest[:8], "big") % len(phrases)]


def _sentence(clauses: list[str]) -> str:
    if len(clauses) > 2:
        text = f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
    else:
        text = " and ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


def present_units(frame: FrameUnits, table: UnitTable | None = None) -> tuple[str, ...]:
    """Return the units that are there: those the detector names, else those that are strong enough."""
    if frame.present is not None:
        return tuple(sorted(frame.present))
    least = (table or _builtin()).present_from
    return tuple(sorted(unit for unit, value in frame.intensities.items() if value >= least))


def pseudo_labels(
    present: Iterable[str], table: UnitTable | None = None, rules: str = "merr"
) -> tuple[str, ...]:
    """Return the emotions whose units are all there.

    Those that need more units come first, as they are the more specific; equals keep the order of the
    table. A hint for choosing and checking clips, not a label.

    Args:
        present: Units that are there (`present_units`).
        table: Rules; None: the built-in ones.
        rules: Which set: `merr` (four emotions, as the MERR data were chosen) or `facs`.

    Raises:
        SchemaError: There is no such set.
    """
    there = set(present)
    found = [
        (emotion, units)
        for emotion, units in (table or _builtin()).rules_of(rules).items()
        if there.issuperset(units)
    ]
    return tuple(emotion for emotion, _ in sorted(found, key=lambda item: -len(item[1])))


@dataclass(frozen=True)
class UnitFrequency:
    """How often one unit is present among records, and how strong it is then."""

    n: int
    """Records in which it is present."""
    share: float
    """Of all records that were counted."""
    mean: float
    """Mean intensity where it is present."""


def unit_frequencies(
    many: Iterable[Mapping[str, float]], least: float | None = None
) -> dict[str, UnitFrequency]:
    """Count units over records, at their peak frames.

    Args:
        many: `Record.action_units` of each; records without any count as looked at, so leave out those
            that nobody annotated.
        least: Intensity from which a unit is present; None: the built-in table's.

    Returns:
        By unit, in the order of their names; units that are nowhere present are left out.
    """
    least = _builtin().present_from if least is None else least
    n_all = 0
    values: dict[str, list[float]] = {}
    for intensities in many:
        n_all += 1
        for unit, value in intensities.items():
            if value >= least:
                values.setdefault(unit, []).append(value)
    return {
        unit: UnitFrequency(len(found), len(found) / n_all, math.fsum(found) / len(found))
        for unit, found in sorted(values.items())
    }
