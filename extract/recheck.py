"""Encode some clips again and compare them with what a store holds: `emocache store verify --deep`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cache.clip import Record, media_path
from cache.commit import ClipTokens, Status
from cache.errors import CorruptTokensError, StoreError
from cache.quantize import dequantize, quantize
from cache.spec import Stream, TokenSpec
from cache.store import TokenStore
from extract.encoders.bank import EncoderBank
from extract.faces import FaceSource
from extract.workers.results import encode_clip

TOLERANCE = 1e-2
"""Largest relative L2 difference that passes. The same machine and versions give 0; other versions or
devices differ in the last bits of float16. Another layer, weight or frame differs by far more."""
TOLERANCE_INT8 = 2e-2
"""The same for int8, where a small difference may round to the next step."""


@dataclass(frozen=True)
class Recheck:
    """One stream of one clip, stored and encoded anew."""

    uid: str
    stream: Stream
    spec_id: str
    relative_l2: float | None
    """L2 norm of the difference over that of the stored tokens; None if they cannot be compared."""
    max_abs: float | None
    """Largest difference of a value."""
    passed: bool
    reason: str | None = None
    """Why it did not pass."""


def recheck(
    store: TokenStore,
    records: Sequence[Record],
    bank: EncoderBank,
    media_root: Path,
    n_clips: int,
    seed: int = 0,
    faces: FaceSource | None = None,
) -> list[Recheck]:
    """Decode and encode clips again, as extraction does, and compare them with their stored tokens.

    Args:
        store: Where the tokens are.
        records: What to choose from: those with tokens under one of the bank's specs.
        bank: Loaded encoders; its specs must be those of the store.
        media_root: Folder that the records' media paths are relative to.
        n_clips: How many clips, or all if there are fewer.
        seed: The same seed chooses the same clips.
        faces: Where faces are, for specs that crop them.

    Returns:
        One for every stream that is ok, clip after clip.

    Raises:
        ManifestError: A media path leaves the media root.
        SpecMismatchError: The store holds tokens of other specs.
        StoreError: None of the records has tokens.
    """
    specs = [spec for spec in bank.specs if spec.spec_id in store.specs]
    if not specs:
        store.resolve(bank.specs[0])
    by_keys = {tuple(record.token_key(spec) for spec in specs): record for record in records}
    found = [(record, _ok_specs(store, specs, record)) for _, record in sorted(by_keys.items())]
    candidates = [(record, ok) for record, ok in found if ok]
    if not candidates:
        raise StoreError(
            f"{store.root}: none of the {len(records)} records has tokens of the given encoders. "
            "Give the manifest and the preset that the store was extracted with."
        )
    chosen = random.Random(seed).sample(candidates, min(n_clips, len(candidates)))
    return [
        result
        for record, ok in chosen
        for result in _recheck(store, record, ok, bank, media_root, faces)
    ]


def _ok_specs(store: TokenStore, specs: Sequence[TokenSpec], record: Record) -> list[TokenSpec]:
    entries = ((spec, store.index(spec).get(record.token_key(spec))) for spec in specs)
    return [spec for spec, entry in entries if entry is not None and entry.status is Status.OK]


def _recheck(
    store: TokenStore,
    record: Record,
    specs: Sequence[TokenSpec],
    bank: EncoderBank,
    media_root: Path,
    faces: FaceSource | None,
) -> list[Recheck]:
    clips = encode_clip(record, media_path(media_root, record), specs, bank, faces)
    return [_compare(store, spec, record, clip) for spec, clip in zip(specs, clips, strict=True)]


def _compare(store: TokenStore, spec: TokenSpec, record: Record, clip: ClipTokens) -> Recheck:
    if clip.tokens is None:
        why = clip.reason or f"the {spec.stream} stream is {clip.status.value} now"
        return _failed(record, spec, f"cannot be encoded again: {why}")
    assert isinstance(clip.tokens, np.ndarray), "encoders give floats"
    try:
        stored = np.asarray(store.read(spec, clip.key, record.uid).tokens, np.float64)
    except CorruptTokensError as error:
        return _failed(record, spec, str(error))
    fresh = _as_stored(clip.tokens, spec)
    if fresh.shape != stored.shape:
        return _failed(record, spec, f"shape {fresh.shape} now, {stored.shape} stored")
    difference = np.abs(fresh - stored)
    norm = float(np.linalg.norm(stored))
    relative = float(np.linalg.norm(difference)) / max(norm, float(np.finfo(np.float32).tiny))
    allowed = TOLERANCE_INT8 if spec.dtype == "int8" else TOLERANCE
    passed = relative <= allowed
    reason = None
    if not passed:
        reason = (
            f"relative difference {relative:.3g}, allowed {allowed}. Other library versions or decoders "
            "than `emocache store card` names, or the stored tokens are wrong"
        )
    largest = float(difference.max(initial=0))
    return Recheck(record.uid, spec.stream, spec.spec_id, relative, largest, passed, reason)


def _failed(record: Record, spec: TokenSpec, why: str) -> Recheck:
    return Recheck(record.uid, spec.stream, spec.spec_id, None, None, passed=False, reason=why)


def _as_stored(tokens: npt.NDArray[Any], spec: TokenSpec) -> npt.NDArray[np.float64]:
    """Return fresh tokens as they would be read back: rounded to the stored dtype."""
    if spec.dtype == "int8":
        return dequantize(quantize(tokens)).astype(np.float64)
    dtype = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    return tokens.astype(dtype).astype(np.float64)
