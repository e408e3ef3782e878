"""Do what a plan says: decode each clip once, run every missing encoder, commit unit by unit."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache.clip import Record, file_sha256, media_path
from cache.commit import ClipTokens, Status
from cache.errors import MediaError
from cache.spec import Stream, TokenSpec
from cache.store import TokenStore
from cache.writer import is_storable
from extract.decode import Decoded, FrameRequest, decode
from extract.encoders.bank import EncoderBank
from extract.plan import Plan, Unit

logger = logging.getLogger(__name__)

_DECODED_AHEAD = 4
"""Clips that are decoded while one is encoded: enough to hide decoding, little memory."""


@dataclass
class ExtractReport:
    """What an extraction run did."""

    encoded: dict[Stream, Counter[Status]] = field(default_factory=dict)
    """Stream -> clips by status, of this run alone."""
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(uid, stream, reason)."""
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """(uid, stream, damage that decoding passed over)."""
    truncated: list[str] = field(default_factory=list)
    """Records whose audio is longer than the encoder's window."""
    n_units: int = 0
    n_bytes: int = 0
    """Size of the committed files."""

    def count(self, status: Status) -> int:
        """Clips and streams that ended with this status."""
        return sum(counts[status] for counts in self.encoded.values())


def extract(
    plan: Plan,
    bank: EncoderBank,
    store: TokenStore,
    media_root: Path,
    on_clip: Callable[[], None] | None = None,
) -> ExtractReport:
    """Encode and commit everything that a plan names.

    A clip that cannot be read or decoded is committed as failed, with the reason; the run goes on.
    Everything committed stays if the run is killed or interrupted, and the next run continues.

    Args:
        plan: From `make_plan`, on the bank's specs.
        bank: Loaded encoders.
        store: Where tokens go.
        media_root: Folder that the records' media paths are relative to.
        on_clip: Called after each clip.

    Raises:
        ManifestError: A media path leaves the media root.
        SpecMismatchError: An encoder answers the golden probe differently from before.
        StoreError: The store cannot be written.
    """
    report = ExtractReport()
    for unit in plan.units:  # refuse a hostile path before any work is done
        for record in unit.records:
            media_path(media_root, record)
    for spec in dict.fromkeys(s for unit in plan.units for s in unit.specs):
        store.check_probe(spec, bank.probe(spec))
    with (
        _a_core_for_decoding(),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool,
    ):
        try:
            for unit in plan.units:
                _extract_unit(unit, bank, store, media_root, pool, report, on_clip)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for spec in dict.fromkeys(s for unit in plan.units for s in unit.specs):
        store.write_snapshot(spec)  # so that the next reader opens the store quickly
    return report


@contextmanager
def _a_core_for_decoding() -> Iterator[None]:
    """Let torch use all cores but one: its threads spin, and slow down many times if one is taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extract_unit(
    unit: Unit,
    bank: EncoderBank,
    store: TokenStore,
    media_root: Path,
    pool: ThreadPoolExecutor,
    report: ExtractReport,
    on_clip: Callable[[], None] | None,
) -> None:
    done: dict[str, list[ClipTokens]] = {spec.stream: [] for spec in unit.specs}
    for record, found in _decode_ahead(unit, media_root, pool):
        for spec in unit.specs:
            clip = encode_clip(unit, spec, record, found, bank)
            done[spec.stream].append(clip)
            if clip.status is Status.FAILED:
                report.failures.append((record.uid, spec.stream, clip.reason or ""))
            if clip.remark is not None:
                report.remarks.append((record.uid, spec.stream, clip.remark))
            if clip.truncated:
                report.truncated.append(record.uid)
        if on_clip is not None:
            on_clip()
    for spec in unit.specs:
        clips = done[spec.stream]
        index = store.index(spec)
        after = {unit_id for c in clips for unit_id in index.failed_in(c.key)}
        commit = store.commit(spec, clips, bank.provenance(spec), after)
        report.encoded.setdefault(spec.stream, Counter()).update(e.status for e in commit.clips)
        report.n_bytes += commit.n_bytes
    report.n_units += 1


def _decode_ahead(
    unit: Unit, media_root: Path, pool: ThreadPoolExecutor
) -> Iterator[tuple[Record, Decoded | str]]:
    """Yield each record with its decoded clip, or with the reason why there is none."""
    waiting: deque[tuple[Record, Future[Decoded | str]]] = deque()
    remaining = iter(unit.records)
    while True:
        while len(waiting) < _DECODED_AHEAD and (record := next(remaining, None)) is not None:
            task = pool.submit(decode_clip, record, media_path(media_root, record), unit.specs)
            waiting.append((record, task))
        if not waiting:
            return
        record, future = waiting.popleft()
        yield record, future.result()


def decode_clip(record: Record, path: Path, specs: Sequence[TokenSpec]) -> Decoded | str:
    """Decode a clip, or return why it cannot be decoded."""
    try:
        if file_sha256(path) != record.clip.sha256:
            return (
                f"{record.media} is not the file that was indexed (its digest differs). "
                "Index the folder again, or restore the file."
            )
        return decode(
            path,
            want_audio=any(spec.stream == "audio" for spec in specs),
            frame_choices=[
                FrameRequest(spec.frames.kind, spec.frames.n_frames, record.peak_index)
                for spec in specs
                if spec.frames is not None
            ],
        )
    except MediaError as error:
        return str(error)
    except OSError as error:
        return f"{record.media} cannot be read: {error.strerror or error}"
    except Exception as error:  # the per-clip boundary: recorded, never swallowed
        logger.warning("%s: unexpected %s", record.uid, type(error).__name__, exc_info=True)
        return f"unexpected {type(error).__name__}: {error}"


def encode_clip(
    unit: Unit, spec: TokenSpec, record: Record, found: Decoded | str, bank: EncoderBank
) -> ClipTokens:
    """Encode a decoded clip under one spec of a unit; what cannot be encoded is failed, with the reason."""
    if isinstance(found, str):
        return ClipTokens(record.token_key(spec), Status.FAILED, reason=found)
    choice = None
    if spec.frames is not None and found.choices:
        # Choices stand in the order of the requests: one per spec that has frames.
        pictures = [s for s in unit.specs if s.frames is not None]
        choice = found.choices[pictures.index(spec)]
    clip = bank.encode(spec, record, found, choice)
    if clip.tokens is not None and not is_storable(clip.tokens, spec):
        return ClipTokens(
            clip.key,
            Status.FAILED,
            reason=f"the {spec.stream} encoder gave NaN or infinity as {spec.dtype}",
        )
    return clip
