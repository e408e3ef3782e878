"""What of MMEVerse-Bench is asked, in which batches: all of it decided before anything is asked.

A record that several sets score is one clip with several questions behind one prefix. Clips are sorted by
length, the longest first, so that what does not fit in memory fails at once, and cut into batches. The plan
follows from run, store, manifest and settings alone: whoever continues, or asks another part, has the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache.clip import Record
from cache.commit import Status
from cache.errors import ManifestError, near_miss
from cache.labels import LabelField
from cache.manifest import Manifest
from cache.schema import Model, canonical_json
from eval.benchmarks import Benchmark, benchmark
from eval.generate import AskedClip, Asker, Item
from eval.predictions import Key
from train.batches.reading import ViewReader, usable
from train.config import DataConfig
from train.mixture import Ask
from train.text.instructions import draw
from train.text.tasks import TASK_TABLE, Task, check_task


class SkippedItem(Model):
    """An item of a set that is not asked about."""

    uid: str
    benchmark: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Batches of clips with their questions, and what is left out."""

    batches: tuple[tuple[AskedClip, ...], ...]
    skipped: tuple[SkippedItem, ...]
    order: tuple[Key, ...]
    """Keys of all predictions to come, as the manifest has the records and the call the sets."""

    @property
    def digest(self) -> str:
        """SHA-256 over every question's text ids, record and place: equal plans ask the same."""
        found = hashlib.sha256()
        for batch in self.batches:
            for clip in batch:
                asked = [
                    [
                        item.benchmark,
                        item.ask.task,
                        *map(list, (q.prompt.head_ids, q.prompt.tail_ids)),
                    ]
                    for item, q in zip(clip.items, clip.group.questions, strict=False)
                ]
                shown = [clip.group.n_prefix, list(clip.group.hidden), list(clip.offered), asked]
                found.update(clip.record.model_dump_json().encode())
                found.update(canonical_json(shown).encode())
            found.update(b"|")
        found.update(canonical_json([s.model_dump() for s in self.skipped]).encode())
        return found.hexdigest()


def plan_benchmarks(
    asker: Asker,
    manifest: Manifest,
    names: Sequence[str],
    data: DataConfig,
    *,
    reasoning: bool = False,
    batch_size: int = 16,
    sample: int | None = None,
) -> Plan:
    """Decide what to ask.

    Args:
        asker: Knows run and store.
        manifest: Records that name the sets that score them.
        names: Ids of sets.
        data: What is done with absent and failed streams.
        reasoning: Ask the joint task of a label, where there is one.
        batch_size: Clips per batch.
        sample: Items of each set, drawn by their uids: the same in every set that scores a record.

    Raises:
        SchemaError: An unknown set; a question that does not fit the language model's context.
        ManifestError: A set that no record is scored by, or one twice.
        CacheMissError: A clip was never extracted, or an absent or failed stream is to be refused.
    """
    rows = [benchmark(name) for name in names]
    if len(set(names)) != len(names):
        twice = next(name for name, n in Counter(names).items() if n > 1)
        raise ManifestError(f"benchmark '{twice}' is asked for twice; name each set once.")
    wanted = {row.id: _chosen(manifest, row, sample) for row in rows}
    skipped: list[SkippedItem] = []
    asked: list[tuple[Record, list[Benchmark]]] = []
    for record in manifest.records:
        own = [row for row in rows if record.uid in wanted[row.id]]
        for row in own:
            if not record.labels_of(row.field):
                reason = f"no truth: the record has nothing in '{row.field}'"
                skipped.append(SkippedItem(uid=record.uid, benchmark=row.id, reason=reason))
        if left := [row for row in own if record.labels_of(row.field)]:
            asked.append((record, left))
    kept = {record.uid for record in usable([record for record, _ in asked], asker.reader, data)}
    clips = []
    for record, own in asked:
        if record.uid in kept:
            clips.append(asker.clip(record, [_item(row, reasoning) for row in own]))
            continue
        reason = _why_unusable(record, asker.reader, data)
        skipped += [SkippedItem(uid=record.uid, benchmark=row.id, reason=reason) for row in own]
    by_length = sorted(
        clips, key=lambda clip: -clip.group.n_positions
    )  # sorted() keeps ties in order
    return Plan(
        tuple(
            tuple(by_length[start : start + batch_size])
            for start in range(0, len(by_length), batch_size)
        ),
        tuple(skipped),
        tuple(key for clip in clips for key in keys_of(clip)),
    )


def keys_of(clip: AskedClip) -> Iterator[Key]:
    """Yield what identifies the predictions about a clip, see `Prediction.key`."""
    for item in clip.items:
        yield clip.record.uid, item.ask.task, (), item.benchmark or ""


def joint_task(field: LabelField) -> Task | None:
    """Return the task that asks for reasoning and the label of a field; None: there is none."""
    for task, row in TASK_TABLE.items():
        if row.joint and row.label == field:
            return task
    return None


def _item(row: Benchmark, reasoning: bool) -> Item:
    task = joint_task(row.field) if reasoning else None
    return Item(Ask(task or check_task(row.task), 0, row.options), row.id, row.merged)


def _chosen(manifest: Manifest, row: Benchmark, sample: int | None) -> frozenset[str]:
    """Return the uids of the records that a set scores, or of some of them."""
    uids = [record.uid for record in manifest.records if row.id in record.benchmarks]
    if not uids:
        known = sorted({name for record in manifest.records for name in record.benchmarks})
        raise ManifestError(
            f"no record of the manifest is scored by benchmark '{row.id}'."
            f"{near_miss(row.id, known)} It has records of: {', '.join(known) or 'none'}."
        )
    if sample is not None:
        uids = sorted(uids, key=lambda uid: draw("sample", uid))[:sample]
    return frozenset(uids)


def _why_unusable(record: Record, reader: ViewReader, data: DataConfig) -> str:
    """Say why `usable` leaves a record out."""
    statuses = reader.statuses(record)
    for status, choice in ((Status.ABSENT, data.absent), (Status.FAILED, data.failed)):
        streams = sorted(stream for stream, found in statuses.items() if found is status)
        if streams and choice == "drop":
            return f"{', '.join(streams)} {status.value}, and data.{status.value} is 'drop'"
    return "no stream has tokens"
