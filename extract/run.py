"""Do what a plan says, in this process: what the demo and a notebook need. Engines do more."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache.clip import Record
from cache.store import TokenStore
from extract.config import WorkerConfig, n_cores
from extract.encoders.bank import EncoderBank
from extract.faces import check_tables, face_source
from extract.jobs.job import Job
from extract.plan import Plan, open_job
from extract.summary import JobSummary, summarise
from extract.workers.worker import work


def new_session() -> str:
    """Return a name for one start of an extraction, unique and short."""
    return uuid.uuid4().hex[:12]


def worker_config(
    job: Job,
    bank: EncoderBank,
    store: TokenStore,
    *,
    manifest: str | Path,
    media_root: str | Path,
    session: str,
    **options: Any,
) -> WorkerConfig:
    """Return what workers of a job are told.

    Args:
        job: From `open_job`.
        bank: Encoders whose weights are resolved.
        store: Where tokens go.
        manifest: What the job was planned on.
        media_root: Folder or URL that the records' media paths are relative to.
        session: From `new_session`.
        options: Further fields of `WorkerConfig`.
    """
    return WorkerConfig(
        store=store.root,
        manifest=str(manifest),
        media_root=str(media_root),
        specs=bank.specs,
        weights={spec.spec_id: str(bank.path(spec)) for spec in bank.specs},
        job_id=job.job_id,
        generation=job.generation,
        session=session,
        **options,
    )


def extract(
    plan: Plan,
    records: Sequence[Record],
    bank: EncoderBank,
    store: TokenStore,
    media_root: str | Path,
    *,
    on_clip: Callable[[], None] | None = None,
    **options: Any,
) -> JobSummary | None:
    """Encode and commit everything that a plan names, in this process.

    A clip that cannot be read or decoded is committed as failed, with the reason; the run goes on.
    Everything committed stays if the run is killed or interrupted, and the next run continues.

    Args:
        plan: From `make_plan`, on these records and the bank's specs.
        records: The manifest's.
        bank: Encoders.
        store: Where tokens go.
        media_root: Folder or URL that the records' media paths are relative to.
        on_clip: Called after each decoded clip.
        options: Further fields of `WorkerConfig`.

    Returns:
        What was done; None if there was nothing to do.

    Raises:
        ManifestError: A media path leaves the media root.
        SchemaError: Specs crop faces, and `faces` does not say where these are.
        SpecMismatchError: An encoder answers the golden probe differently from before.
        StoreError: The store cannot be written.
        ExtractionStopped: Most clips of late failed.
        KeyboardInterrupt: Ctrl-C; what was encoded is committed.
    """
    if not plan.units:
        return None
    faces = face_source((spec for unit in plan.units for spec in unit.specs), options.get("faces"))
    options["faces"] = None if faces is None else faces.given
    if faces is not None:
        crops = [unit for unit in plan.units if any(spec.crop is not None for spec in unit.specs)]
        check_tables(faces, [record for unit in crops for record in unit.records])
    job = open_job(store, records, plan)
    options.setdefault("n_decoders", max(1, n_cores() // 2))
    config = worker_config(
        job, bank, store, manifest="", media_root=media_root, session=new_session(), **options
    )
    work(config.model_dump_json(), records=records, bank=bank, on_clip=on_clip)
    for spec in plan.specs:
        store.write_snapshot(spec)  # so that the next reader opens the store quickly
    store.refresh()
    if job.undone():
        raise KeyboardInterrupt
    return summarise(job, session=config.session)
