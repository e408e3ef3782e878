"""What an extraction is told and must find before it begins: options, media, store, workers' settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cache.errors import ManifestError, SchemaError
from eval.verbs.extract_options import EngineFlags, WorkOptions

if TYPE_CHECKING:
    from cache.clip import Record
    from cache.store import TokenStore
    from eval.verbs.arguments import Wanted
    from extract.config import WorkerConfig
    from extract.encoders.bank import EncoderBank
    from extract.engines.options import EngineOptions
    from extract.faces import FaceSource
    from extract.jobs.job import Job
    from extract.plan import Plan
    from extract.sources import MediaSource

logger = logging.getLogger(__name__)

ON_THIS_MACHINE = ("inline", "local")
"""Engines whose workers share this machine."""


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is written."""

    wanted: Wanted
    manifest: Path
    records: tuple[Record, ...]
    bank: EncoderBank
    media_root: str
    plan: Plan
    faces: FaceSource | None
    """Where the faces are of which tokens are missing."""


def prepare(work: WorkOptions) -> Prepared:
    """Check what was asked for, and compare the manifest with the store; write nothing."""
    from cache.manifest import media_root as root_of
    from cache.manifest import read_manifest
    from cache.place import is_url
    from eval.verbs.arguments import check_device, choice, compression_of, retry_kinds, wanted
    from extract.config import PRECISIONS
    from extract.encoders.bank import EncoderBank
    from extract.faces import face_source
    from extract.plan import make_plan

    _worker_fields(work)  # so that a value that does not fit is refused before anything is read
    asked = wanted(
        work.words or [],
        work.encoders or [],
        work.encoder_weights or [],
        work.with_file,
        work.specs_file,
    )
    retry = retry_kinds(work.retry or [], every=work.retry_failed)
    check_device(work.device, is_here=False)
    choice(work.precision, PRECISIONS, "--precision")
    compression_of(work.compression)
    manifest = read_manifest(work.manifest)
    # Only to learn which weights they are; workers load their own, on their own device.
    bank = EncoderBank(asked.specs, asked.weights, names=asked.names)
    plan = make_plan(
        manifest.records, bank.specs, store_if_any(work.store),
        retry=retry, unit_clips=work.unit_clips,
    )  # fmt: skip
    if work.media_root is None:
        root = str(root_of(manifest, work.manifest))
    else:
        root = work.media_root if is_url(work.media_root) else str(Path(work.media_root).resolve())
    missing = [spec for unit in plan.units for spec in unit.specs]
    faces = face_source(missing, work.faces)
    if missing and faces is None and work.faces is not None:
        logger.warning("--faces %s is not used: no tokens of faces are to be encoded.", work.faces)
    return Prepared(asked, work.manifest.resolve(), manifest.records, bank, root, plan, faces)


def store_if_any(where: str) -> TokenStore | None:
    """Open a store; None if there is nothing in its place yet.

    Raises:
        StoreError: Something else is there, or a store of a newer version.
    """
    from cache import layout
    from cache.place import open_storage
    from cache.storage import LocalStorage
    from cache.store import TokenStore

    storage = open_storage(where)
    if not isinstance(storage, LocalStorage) or storage.root.is_dir():
        names = {*storage.names(""), *storage.folders("")}
        if layout.MARKER not in names and names <= layout.OWN_NAMES:
            return None  # empty, or another process is creating it
    elif not storage.root.exists():
        return None
    return TokenStore.open(where)


def check_here(device: str) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        SchemaError: It is not here.
    """
    from eval.verbs.arguments import check_device

    check_device(device)


def check_inputs(prepared: Prepared) -> MediaSource:
    """Refuse to fail every clip of a corpus whose media, or tables of faces, are elsewhere.

    Raises:
        ManifestError: More than half of a sample of the media, or of the tables, is not there.
        SchemaError: Two clips would take the same table.
    """
    from extract.sources import check_media, open_source

    source = open_source(prepared.media_root)
    todo = {row for unit in prepared.plan.units for row in unit.rows}
    found = check_media(source, [prepared.records[row] for row in sorted(todo)])
    if found.n_missing:
        text = (
            f"{found.n_missing:,} of {found.n_checked:,} media files checked are not below "
            f"{source.root}, first: {found.first}."
        )
        if 2 * found.n_missing > found.n_checked:
            raise ManifestError(
                f"{text} Give the folder that the manifest's media paths start from with --media-root."
            )
        logger.warning("%s They will be recorded as failed (missing).", text)
    _check_faces(prepared)
    return source


def _check_faces(prepared: Prepared) -> None:
    from extract.faces import check_tables

    if prepared.faces is None:
        return
    todo = {
        row
        for unit in prepared.plan.units
        if any(spec.crop is not None for spec in unit.specs)
        for row in unit.rows
    }
    found = check_tables(prepared.faces, [prepared.records[row] for row in sorted(todo)])
    if found.n_missing:
        text = (
            f"{found.n_missing:,} of {found.n_records:,} clips have no table of their face in "
            f"{prepared.faces.given}, first: {found.first}."
        )
        if 2 * found.n_missing > found.n_records:
            raise ManifestError(
                f"{text} Give the folder of OpenFace's tables, one CSV file per clip, with --faces; "
                "docs/extraction.md says how they are named."
            )
        logger.warning("%s Their face tokens will be recorded as failed (faces).", text)


def engine_options(run: EngineFlags, device: str) -> EngineOptions:
    """Return where workers shall run.

    Raises:
        SchemaError: An unknown engine, or a value that does not fit.
    """
    from cache.schema import decode
    from eval.verbs.arguments import choice, duration_s, size_bytes
    from extract.engines.options import EngineKind, EngineOptions

    kinds = get_args(EngineKind)
    if run.workers < 1:
        raise SchemaError(f"--workers {run.workers}: an extraction needs at least one worker.")
    gpus = run.gpus_per_worker
    if gpus is None:
        gpus = 0 if device == "cpu" else 1
    given = {
        "kind": choice(run.engine, kinds, "--engine"),
        "workers": run.workers,
        "min_workers": run.min_workers,
        "scheduler": run.scheduler,
        "walltime_s": _duration(run.walltime, "--walltime"),
        "gpus_per_worker": gpus,
        "cpus_per_worker": run.cpus_per_worker,
        "memory_bytes": None if run.memory is None else size_bytes(run.memory, "--memory"),
        "queue": run.queue,
        "account": run.account,
        "job_extra": tuple(run.job_extra or ()),
        "prologue": tuple(run.prologue or ()),
        "start_timeout_s": duration_s(run.start_timeout, "--start-timeout"),
        "log_dir": run.log_dir,
    }
    return decode(EngineOptions, given, "the engine")


def _duration(text: str | None, option: str) -> float | None:
    from eval.verbs.arguments import duration_s

    return None if text is None else duration_s(text, option)


def n_decoders_of(device: str, n_here: int, n_cores: int | None = None) -> int:
    """Return how many decoder processes a worker has by default.

    A GPU takes clips faster than one core decodes them; an encoder on a CPU needs the cores itself.

    Args:
        device: Where it encodes.
        n_here: Workers on one machine that share its cores.
        n_cores: Cores of one worker; None: its share of this machine's.
    """
    from extract.config import n_cores as cores_here

    if device == "cpu":
        return 1
    return max(1, (n_cores or cores_here() // n_here) - 1)


def drain_after_s_of(walltime: str | None) -> float | None:
    """Return when a worker begins to finish up, so that it ends within its walltime.

    Raises:
        SchemaError: There would be no time to work.
    """
    from extract.engines.options import MARGIN_S

    walltime_s = _duration(walltime, "--walltime")
    if walltime_s is None:
        return None
    if walltime_s <= MARGIN_S:
        raise SchemaError(
            f"--walltime {walltime}: is too short. A worker ends {MARGIN_S:.0f} s ahead of it, and needs "
            "time for a unit before that."
        )
    return walltime_s - MARGIN_S


def config_of(
    prepared: Prepared, work: WorkOptions, store: TokenStore, job: Job, **options: Any
) -> WorkerConfig:
    """Return what the workers are told."""
    from extract.run import new_session, worker_config

    return worker_config(
        job, prepared.bank, store,
        manifest=prepared.manifest, media_root=prepared.media_root, session=new_session(),
        faces=None if prepared.faces is None else prepared.faces.given,
        **_worker_fields(work), **options,
    )  # fmt: skip


def _worker_fields(work: WorkOptions) -> dict[str, Any]:
    """Return the fields of a worker's configuration that the user decides."""
    from eval.verbs.arguments import duration_s, size_bytes
    from extract.jobs.session import HEARTBEAT_S

    lease_timeout_s = duration_s(work.lease_timeout, "--lease-timeout")
    if not 0 < work.max_failure_share <= 1:
        raise SchemaError(
            f"--max-failure-share {work.max_failure_share:g}: must be above 0 and at most 1 (never stop)."
        )
    return {
        "device": work.device,
        "precision": work.precision,
        "compile": work.compile_encoders,
        "single_committer": work.single_committer,
        "deadline_s": duration_s(work.clip_deadline, "--clip-deadline"),
        "memory_bytes": size_bytes(work.clip_memory, "--clip-memory"),
        "batch_tokens": work.batch_tokens,
        "heartbeat_s": min(HEARTBEAT_S, lease_timeout_s / 4),
        "lease_timeout_s": lease_timeout_s,
        "max_failure_share": work.max_failure_share,
    }


def open_job_of(prepared: Prepared, work: WorkOptions) -> tuple[TokenStore, Job]:
    """Create the store if need be, and the job, or join the one that does the same work."""
    from cache.store import TokenStore
    from eval.verbs.arguments import compression_of
    from extract.plan import open_job

    store = TokenStore.open_or_create(
        work.store,
        compression=compression_of(work.compression),
        single_committer=work.single_committer,
    )
    return store, open_job(store, prepared.records, prepared.plan)


def config_without_job(
    prepared: Prepared, work: WorkOptions, engine: EngineOptions
) -> WorkerConfig:
    """Return what workers would be told, were there a job."""
    from extract.config import WorkerConfig

    bank = prepared.bank
    return WorkerConfig(
        store=_absolute(work.store),
        manifest=str(prepared.manifest),
        media_root=prepared.media_root,
        specs=bank.specs,
        weights={spec.spec_id: str(bank.path(spec)) for spec in bank.specs},
        job_id="JOB",
        generation=0,
        session="SESSION",
        engine=engine.kind,
        n_decoders=work.decoders or n_decoders_for(work, engine),
        faces=None if prepared.faces is None else prepared.faces.given,
        **_worker_fields(work),
    )


def _absolute(store: str) -> str:
    from cache.place import is_url

    return store if is_url(store) else str(Path(store).resolve())


def n_decoders_for(work: WorkOptions, engine: EngineOptions) -> int:
    """Return how many decoder processes each worker of an engine has by default."""
    if engine.kind in ON_THIS_MACHINE:
        return n_decoders_of(work.device, engine.workers)
    return n_decoders_of(work.device, 1, engine.cpus_per_worker)
