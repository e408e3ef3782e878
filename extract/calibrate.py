"""What an extraction will take, from encoding some of its clips on this machine: nothing is committed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import Field

from cache.errors import ManifestError
from cache.schema import Model
from cache.spec import TokenSpec
from extract.config import WorkerConfig
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.faces import FaceSource, open_faces_for
from extract.inputs import request_of
from extract.plan import Plan, Unit
from extract.sources import MediaSource
from extract.workers.results import encoder_input
from extract.workers.unit import tokens_per_clip

N_CLIPS = 24


class Calibration(Model):
    """Seconds that clips of a plan took on one device."""

    device: str
    n_clips: int = Field(ge=0)
    """Clips that were decoded."""
    decode_cpu_s: float
    """CPU time of a decoder, per clip."""
    encode_s: dict[str, float]
    """Label -> time of the encoder, per clip that has the stream."""

    def encode_hours(self, plan: Plan) -> float:
        """Return the hours that one device encodes."""
        return (
            sum(
                sum(plan.misses[label].values()) * seconds
                for label, seconds in self.encode_s.items()
            )
            / 3600
        )

    def decode_hours(self, plan: Plan) -> float:
        """Return the hours that one core decodes."""
        return plan.n_missing * self.decode_cpu_s / 3600

    def hours(self, plan: Plan, n_workers: int = 1, n_decoders: int = 1) -> float:
        """Return the hours that the plan takes; decoding runs beside encoding.

        Args:
            plan: What there is to do.
            n_workers: Workers, each with a device like the calibrated one.
            n_decoders: Decoder processes of each.
        """
        return max(self.encode_hours(plan), self.decode_hours(plan) / n_decoders) / n_workers

    def unit_s(self, plan: Plan) -> float:
        """Return the seconds that one worker needs for the largest unit."""
        largest = max((len(unit.records) for unit in plan.units), default=0)
        return self.hours(plan) * 3600 * largest / max(1, plan.n_missing)


def calibrate(
    plan: Plan,
    bank: EncoderBank,
    source: MediaSource,
    config: WorkerConfig,
    n_clips: int = N_CLIPS,
) -> Calibration:
    """Decode and encode some clips of a plan, spread over it, in batches as a worker does.

    Args:
        plan: From `make_plan`.
        bank: Encoders; they are loaded.
        source: Where the media are.
        config: Bounds of decoding and size of batches.
        n_clips: How many clips, or all if there are fewer.

    Raises:
        ManifestError: None of the clips can be decoded.
    """
    chosen = _spread(plan, n_clips)
    faces = open_faces_for(plan.specs, config.faces)
    with (
        DecodePool(
            config.n_decoders,
            deadline_s=config.deadline_s,
            memory_bytes=config.memory_bytes,
            command=config.decoder_command,
            detector=None if faces is None else faces.detector,
        ) as pool,
        ThreadPoolExecutor(config.n_decoders) as threads,
    ):
        prepared = list(
            threads.map(lambda pick: _decode(pool, source, faces, pick[0], pick[1]), chosen)
        )
    inputs: dict[str, list[EncoderInput]] = {spec.spec_id: [] for spec in plan.specs}
    cpu_s = []
    for (unit, _), found in zip(chosen, prepared, strict=True):
        if isinstance(found, DecodeFailure):
            continue
        cpu_s.append(found.decode_cpu_s)
        for spec, stream in zip(unit.specs, found.streams, strict=True):
            if stream.status == "ok":
                inputs[spec.spec_id].append(encoder_input(found, stream))
    if not any(inputs.values()):
        raise ManifestError(
            f"none of {len(chosen)} clips of the plan could be decoded, so there is nothing to estimate "
            "from. Are the media below --media-root? --calibrate 0 plans without an estimate."
        )
    device = config.device
    return Calibration(
        device=device,
        n_clips=len(cpu_s),
        decode_cpu_s=float(np.mean(cpu_s)),
        encode_s={
            label: _seconds_per_clip(bank, spec, inputs[spec.spec_id], config.tokens_per_batch)
            for spec, label in zip(plan.specs, plan.labels, strict=True)
            if inputs[spec.spec_id]
        },
    )


def _spread(plan: Plan, n_clips: int) -> list[tuple[Unit, int]]:
    """Return clips at equal distances through the plan."""
    places = [(unit, i) for unit in plan.units for i in range(len(unit.records))]
    if len(places) <= n_clips:
        return places
    return [places[i * len(places) // n_clips] for i in range(n_clips)]


def _decode(
    pool: DecodePool, source: MediaSource, faces: FaceSource | None, unit: Unit, place: int
) -> Prepared:
    record = unit.records[place]
    requests = tuple(request_of(spec, record) for spec in unit.specs)
    order = None if faces is None else faces.of(record)
    with source.fetch(record) as path:
        job = DecodeJob(path, record.sha256, record.media, requests, faces=order)
        return pool.submit(job).result()


def _seconds_per_clip(
    bank: EncoderBank, spec: TokenSpec, given: Sequence[EncoderInput], batch_tokens: int
) -> float:
    """Time an encoder on clips, in batches as a worker makes them; the first call is left out."""
    size = max(1, batch_tokens // tokens_per_clip(spec))
    bank.encode(spec, given[:size])  # loads, allocates, chooses kernels
    began_s = time.perf_counter()
    for start in range(0, len(given), size):
        bank.encode(spec, given[start : start + size])
    return (time.perf_counter() - began_s) / len(given)
