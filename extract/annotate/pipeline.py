"""An annotation from the outside: read what there is, plan, and write the annotated manifest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.clip import Record
from cache.errors import SchemaError, StoreError
from cache.manifest import Header, ManifestWriter, relative_root
from cache.place import is_url
from cache.schema import Model, decode_json
from cache.storage import LocalStorage
from extract.annotate.config import RESULTS
from extract.annotate.job import UNIT_CLIPS, AnnotationPlan, plan_annotation
from extract.annotate.journal import Journal
from extract.annotate.presets import Preset
from extract.annotate.results import RecordResult, Results, annotated
from extract.annotate.wording import Wordings
from extract.failures import AnyKind

MARK = "annotation.json"


class Asked(Model):
    """The latest request to a work folder, for those who look on."""

    manifest: str
    preset: Preset
    splits: tuple[str, ...] = ()
    limit: int | None = None
    settings: str = ""


@dataclass(frozen=True)
class Annotation:
    """What was asked for, and what is known of it."""

    records: Sequence[Record]
    preset: Preset
    wordings: Wordings
    settings: str
    results: Results
    plan: AnnotationPlan


def work_storage(where: str | Path) -> LocalStorage:
    """Return the storage of a work folder.

    Raises:
        SchemaError: It is no folder on a disk: answers are appended, which buckets cannot do.
    """
    if is_url(where):
        raise SchemaError(
            f"--work {where}: a work folder is on a disk, of this machine or of the cluster; answers are "
            "appended to files there. The media may be anywhere."
        )
    path = Path(where)
    if path.exists() and not path.is_dir():
        raise SchemaError(
            f"--work {where}: is a file. Give a folder; it is made if it is not there."
        )
    return LocalStorage(path.resolve())


def prepare(
    records: Sequence[Record],
    preset: Preset,
    work: Path,
    *,
    splits: Collection[str] = (),
    limit: int | None = None,
    retry: Collection[AnyKind] = (),
    unit_clips: int = UNIT_CLIPS,
) -> Annotation:
    """Compare a manifest with a work folder; write nothing.

    Raises:
        SchemaError: A prompt is not one.
        ManifestError: The media of a record were never looked at.
        StoreError: The work folder cannot be read.
    """
    wordings = Wordings(preset)
    settings = preset.digest(wordings.ids)
    results: Results = Journal(work / RESULTS, RecordResult)
    plan = plan_annotation(
        records, settings, preset.targets, results,
        splits=splits, limit=limit, retry=retry, unit_clips=unit_clips,
    )  # fmt: skip
    return Annotation(records, preset, wordings, settings, results, plan)


def write_annotated(out: Path, header: Header, media_root: Path | None, found: Annotation) -> int:
    """Write the manifest with what was found, whole or not at all; return how many records have it.

    Records that were not annotated stay as they are.

    Args:
        out: Where it goes.
        header: Of the manifest that was annotated.
        media_root: Where its media are; None leaves the header's own.
        found: What there is.
    """
    if media_root is not None:
        header = header.model_copy(update={"media_root": relative_root(media_root, out)})
    n = 0
    with ManifestWriter(out, header) as writer:
        for row, record in enumerate(found.records):
            key = found.plan.keys.get(row)
            result = None if key is None else found.results.get(key)
            n += result is not None
            if result is not None:
                adopts = found.preset.unlabelled == "adopt"
                space = header.space(record.corpus, "emotion") if adopts else None
                record = annotated(record, result, space)
            writer.write(record)
    return n


def note_asked(storage: LocalStorage, asked: Asked) -> None:
    """Keep what was asked for; raises StoreError if the folder cannot be written."""
    try:
        storage.replace(MARK, asked.model_dump_json(indent=2).encode())
    except OSError as error:
        raise StoreError(
            f"{storage.url}: cannot be written ({error.strerror or error}). Choose another --work folder."
        ) from error


def read_asked(storage: LocalStorage) -> Asked:
    """Return what was asked for last; raises SchemaError where nothing was."""
    try:
        data = storage.read(MARK)
    except FileNotFoundError:
        raise SchemaError(
            f"{storage.url}: no annotation was begun here. Begin with: emocache annotate MANIFEST --out "
            f"ANNOTATED.parquet --work {storage.url}"
        ) from None
    return decode_json(Asked, data, f"{storage.url}/{MARK}")
