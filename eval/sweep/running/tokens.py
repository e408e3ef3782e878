"""Encode what the rows of a sweep lack, in a process of its own: its crash is not the sweep's."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cache.errors import EmocacheError, StoppedError
from cache.files import write_text_aside
from cache.schema import Model, decode_json
from cache.spec import TokenSpec
from eval.sweep.running.at_work import TOKENS, Telling, end_with, holding, log_plainly, speak_to
from eval.sweep.running.trial import DONE, FAILED, STOPPED
from eval.sweep.state import work_file
from extract.config import Precision
from extract.engines.options import EngineOptions

if TYPE_CHECKING:
    from cache.clip import Record
    from cache.store import TokenStore
    from extract.config import WorkerConfig
    from extract.plan import Plan

logger = logging.getLogger(__name__)


class TokensPart(Model):
    """Records, and the specs that they lack."""

    manifest: str
    """Of these records alone."""
    specs: tuple[TokenSpec, ...]
    weights: dict[str, str]
    """spec_id -> checkpoint."""
    unit_clips: int

    def only(self, spec: TokenSpec) -> TokensPart:
        """Return the same for one of its specs."""
        weights = {spec.spec_id: self.weights[spec.spec_id]}
        return self.model_copy(update={"specs": (spec,), "weights": weights})


class TokensOrder(Model):
    """What the process that encodes is told: OUT/at-work/tokens.order.json."""

    schema_version: int = 1
    out: str
    store: str
    media_root: str
    faces: str | None = None
    """Where faces are, see `WorkerConfig.faces`."""
    parts: tuple[TokensPart, ...]
    rows: tuple[str, ...]
    """Which wait for these tokens."""
    device: str = "auto"
    precision: Precision = "float32"
    n_decoders: int | None = Field(default=None, gt=0)
    """Of each worker; None: by the device."""
    engine: EngineOptions = EngineOptions()


def write_tokens_order(order: TokensOrder) -> Path:
    """Write what the process that encodes is told; return the file."""
    path = work_file(Path(order.out), TOKENS, "order.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_aside(path, order.model_dump_json(indent=1) + "\n")
    return path


def waiting_rows(out: Path) -> tuple[str, ...]:
    """Return the rows that the last extraction was for."""
    path = work_file(out, TOKENS, "order.json")
    if not path.exists():
        return ()
    return decode_json(TokensOrder, path.read_bytes(), str(path)).rows


def tokens_child(order_file: str, alive: Connection) -> None:
    """Be the process that encodes; for multiprocessing. See `eval.sweep.running.trial.child`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(alive,), daemon=True).start()
    path = Path(order_file)
    sys.exit(encode(decode_json(TokensOrder, path.read_bytes(), str(path))))


def encode(order: TokensOrder) -> int:
    """Encode and commit all that an order names; return the exit code."""
    out = Path(order.out)
    with holding(out, TOKENS):
        telling = Telling(out, TOKENS)
        telling.begin("extract")
        speak_to(work_file(out, TOKENS, "log"))
        log_plainly()
        try:
            _Encoding(order, telling).run()
        except StoppedError as stop:
            logger.info("stopped: %s", stop)
            return STOPPED
        except KeyboardInterrupt:
            return STOPPED
        except EmocacheError as error:
            logger.error("%s", error)
            telling.progress(note=str(error), now=True)
            return FAILED
        telling.end()
        return DONE


class _Encoding:
    """The parts of an order, one after the other."""

    def __init__(self, order: TokensOrder, telling: Telling) -> None:
        self._order, self._telling = order, telling
        self._n_done = 0
        """Clips of the parts that are finished."""

    def run(self) -> None:
        from cache.manifest import read_manifest
        from cache.store import TokenStore
        from extract.plan import make_plan

        order = self._order
        store = TokenStore.open_or_create(order.store)
        work = []
        for part in order.parts:
            records = read_manifest(Path(part.manifest)).records
            plan = make_plan(records, part.specs, store, unit_clips=part.unit_clips)
            if plan.units:
                work.append((part, records, plan))
        self._telling.progress(n_total=sum(plan.n_missing for _, _, plan in work), now=True)
        for part, records, plan in work:
            self._encode(part, records, plan, store)
            self._n_done += plan.n_missing

    def _encode(
        self, part: TokensPart, records: Sequence[Record], plan: Plan, store: TokenStore
    ) -> None:
        from extract.engines.start import run_engine
        from extract.plan import open_job
        from extract.summary import Watch

        job = open_job(store, records, plan)
        engine, config = worker_options(self._order, part, job.job_id, job.generation)
        watch = Watch(job, lease_timeout_s=config.lease_timeout_s)
        planned = sum(len(unit.rows) for unit in job.plan.units)
        joined = max(0, planned - plan.n_missing)

        def look(_: Any) -> None:
            try:
                n_clips = watch.look(time.monotonic()).n_clips
            except EmocacheError as error:  # the work itself goes on
                logger.debug("cannot look at the job: %s", error)
                return
            self._telling.progress(n_done=self._n_done + max(0, n_clips - joined))

        run_engine(engine, config, job, look)
        store.refresh()
        left = job.undone()
        if left:
            raise StoppedError(f"{len(left)} of {len(job.plan.units)} units are left")
        for spec in plan.specs:
            store.write_snapshot(spec)  # so that the next reader opens the store quickly


def worker_options(
    order: TokensOrder, part: TokensPart, job_id: str, generation: int
) -> tuple[EngineOptions, WorkerConfig]:
    """Return what an engine and its workers are told of one part of an order."""
    from extract.config import WorkerConfig, n_cores
    from extract.run import new_session

    engine, device = order.engine, order.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not engine.gpus_per_worker:
        engine = engine.model_copy(update={"gpus_per_worker": 1})
    is_here = engine.kind in ("inline", "local")
    cores = n_cores() // engine.workers if is_here else engine.cpus_per_worker
    log_dir = None if engine.kind == "inline" else work_file(Path(order.out), TOKENS, "logs")
    return engine.model_copy(update={"log_dir": log_dir}), WorkerConfig(
        store=order.store,
        manifest=part.manifest,
        media_root=order.media_root,
        specs=part.specs,
        weights=part.weights,
        job_id=job_id,
        generation=generation,
        session=new_session(),
        engine=engine.kind,
        device=device,
        precision=order.precision,
        n_decoders=order.n_decoders or (1 if device == "cpu" else max(1, cores - 1)),
        faces=order.faces,
        log_dir=None if log_dir is None else str(log_dir),
    )
