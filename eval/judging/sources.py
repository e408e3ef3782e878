"""What is judged: replies, reference descriptions, samples of MME-Emotion; from files of several kinds.

Replies come from a predictions file of ours, or from JSON lines, a JSON list or CSV with an id and a text
(`ID_FIELDS`, `REPLY_FIELDS`). References and samples come from such files too, or from a manifest.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from cache.errors import PredictionError, SchemaError, near_miss
from eval.judging.tasks import MmeKind, mme_task
from eval.predictions import read_predictions

logger = logging.getLogger(__name__)

ID_FIELDS = ("id", "video_id", "uid", "name", "filename")
REPLY_FIELDS = ("reply", "response", "prediction", "description", "text")
REFERENCE_FIELDS = ("description", "reference", "reason", "text")
LABEL_FIELDS = ("labels", "label", "truth", "answer", "emotion", "sentiment", "intent")
CLUE_FIELDS = ("clue", "audio_clue", "audio")
MEDIA_FIELDS = ("media", "video", "path")
_N_NAMED = 5


class Named(Protocol):
    """What has an id."""

    @property
    def id(self) -> str:
        """Of the clip."""
        ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Reply:
    """What a model wrote about a clip."""

    id: str
    text: str
    """Raw."""
    where: str
    """File and line."""
    n_tokens: int | None = None
    """By the run's tokenizer; None: not known."""


@dataclass(frozen=True)
class Replies:
    """The replies of one file."""

    by_id: dict[str, Reply]
    file: str
    """Name and digest."""
    run: str | None = None


@dataclass(frozen=True)
class Reference:
    """What people wrote about a clip."""

    id: str
    text: str
    where: str


@dataclass(frozen=True)
class Sample:
    """A question of MME-Emotion with its truth and evidence."""

    id: str
    kind: MmeKind
    truths: tuple[str, ...]
    where: str
    clue: str = ""
    """How the voice sounds, in words; empty: not told."""
    media: Path | None = None


@dataclass(frozen=True)
class Paired(Generic[T]):
    """References or samples, each with its reply, in the order of their file."""

    pairs: tuple[tuple[T, Reply], ...]
    missing: tuple[T, ...] = ()
    """Those without a reply."""
    reasons: dict[str, int] = field(default_factory=dict)
    """What was left out -> how many."""

    @property
    def offered(self) -> int:
        """How many there are with a reply, and without."""
        return len(self.pairs) + len(self.missing)


def read_replies(path: Path, asked: str | None = None) -> Replies:
    """Read what a model wrote.

    Args:
        path: A predictions file of ours, or rows with an id and a text.
        asked: Of our file, the task whose replies are judged; None: the only one.

    Raises:
        PredictionError: The file cannot be read, a row lacks its id or text, an id stands twice, or the
            file has replies of several tasks and none was chosen.
    """
    rows = _rows(path)
    if rows and {"uid", "schema_version", "parse"} <= rows[0][1].keys():
        return _our_replies(path, asked)
    if asked is not None:
        raise PredictionError(
            f"{path}: --asked {asked} chooses among the tasks of a predictions file of ours; this one "
            "tells no tasks. Leave the option out."
        )
    found: dict[str, Reply] = {}
    for where, row in rows:
        name = _id(row, where)
        text = _text(row, REPLY_FIELDS, where, may_be_empty=True)
        count = row.get("n_tokens")
        n_tokens = count if isinstance(count, int) and count >= 0 else None
        _once(found, Reply(name, text, where, n_tokens))
    if not found:
        raise PredictionError(f"{path}: no replies in it.")
    return Replies(found, stamp(path))


def _our_replies(path: Path, asked: str | None) -> Replies:
    predictions = read_predictions(path)
    tasks = list(dict.fromkeys(p.task for p in predictions))
    if asked is None and len(tasks) > 1:
        raise PredictionError(
            f"{path}: has replies to several tasks, {', '.join(tasks)}. Choose one with --asked."
        )
    if asked is not None and asked not in tasks:
        raise PredictionError(
            f"{path}: no replies to the task '{asked}'.{near_miss(asked, tasks)} There are: "
            f"{', '.join(tasks)}."
        )
    chosen = [p for p in predictions if asked in (None, p.task) and not p.masked]
    if n_masked := len(predictions) - len(chosen):
        logger.warning(
            "%s: %d of %d replies are not judged: masked clips, or another task",
            path.name,
            n_masked,
            len(predictions),
        )
    if not chosen:
        raise PredictionError(f"{path}: all replies are of masked clips; none is left to judge.")
    found: dict[str, Reply] = {}
    for number, one in enumerate(chosen, start=1):
        where = f"{path}, reply {number} ({one.benchmark or one.task})"
        known = found.get(one.uid)
        if known is not None and known.text == one.reply:
            continue  # the same reply counts for two benchmarks
        _once(found, Reply(one.uid, one.reply, where, one.n_tokens))
    runs = {p.run for p in chosen}
    return Replies(found, stamp(path), run=runs.pop() if len(runs) == 1 else None)


def read_references(path: Path, split: str | None = None) -> list[Reference]:
    """Read reference descriptions.

    Args:
        path: Rows with an id and a text, or a manifest (.parquet): the first multimodal description of
            each record, where there is one.
        split: Of a manifest, the records to take; None: all.

    Raises:
        PredictionError: The file cannot be read, a row lacks its id or text, or an id stands twice.
        SchemaError: A split of what has none, or one that the manifest does not have.
    """
    found: dict[str, Reference] = {}
    if path.suffix == ".parquet":
        for record in _records(path, split):
            for text in record.described("multimodal")[:1]:
                found[record.uid] = Reference(record.uid, text, f"{path}, {record.uid}")
    else:
        _refuse_split(path, split)
        for where, row in _rows(path):
            text = _text(row, REFERENCE_FIELDS, where)
            _once(found, Reference(_id(row, where), text, where))
    if not found:
        raise PredictionError(
            f"{path}: no descriptions in it, so there is nothing to compare with."
        )
    return list(found.values())


def read_samples(
    path: Path,
    *,
    task: str | None = None,
    media_root: Path | None = None,
    split: str | None = None,
) -> list[Sample]:
    """Read the samples of MME-Emotion.

    Args:
        path: Rows with id, task, labels, and where known clue and media; or a manifest (.parquet): the
            record's label, its description of the voice, its media.
        task: The task of all samples whose row names none.
        media_root: Folder of the media; None: that of the file, or the manifest's own.
        split: Of a manifest, the records to take; None: all.

    Raises:
        PredictionError: The file cannot be read, a row lacks id, task or label, has several labels for a
            task with one, or an id stands twice.
        SchemaError: An unknown task, a split of what has none.
    """
    kind = None if task is None else mme_task(task, "--task")
    if path.suffix == ".parquet":
        if kind is None:
            raise SchemaError(
                f"{path}: a manifest does not tell the task of MME-Emotion. Give it with --task."
            )
        return _samples_of_manifest(path, kind, media_root, split)
    _refuse_split(path, split)
    root = media_root or path.parent
    found: dict[str, Sample] = {}
    for where, row in _rows(path):
        named = row.get("task")
        if named is None and kind is None:
            raise PredictionError(f"{where}: no field 'task'. Name it, or give --task for all.")
        own = kind if named is None else mme_task(str(named), where)
        assert own is not None
        media = _first(row, MEDIA_FIELDS)
        sample = Sample(
            id=_id(row, where),
            kind=own,
            truths=_labels(row, own, where),
            where=where,
            clue=str(_first(row, CLUE_FIELDS) or ""),
            media=None if not media else root / str(media),
        )
        _once(found, sample)
    if not found:
        raise PredictionError(f"{path}: no samples in it.")
    return list(found.values())


def _samples_of_manifest(
    path: Path, kind: MmeKind, media_root: Path | None, split: str | None
) -> list[Sample]:
    from cache.clip import media_path
    from cache.manifest import media_root as root_of
    from cache.manifest import read_manifest

    root = media_root or Path(root_of(read_manifest(path), path))
    found = []
    for record in _records(path, split):
        truths = next((t for f in kind.fields if (t := record.labels_of(f))), ())
        if not truths:
            continue
        clues = record.described("audio_tone")
        found.append(
            Sample(
                record.uid,
                kind,
                truths,
                f"{path}, {record.uid}",
                clue=clues[0] if clues else "",
                media=media_path(root, record),
            )
        )
    if not found:
        raise PredictionError(f"{path}: no record has a label for the task '{kind.id}'.")
    return found


def pair(
    wanted: Sequence[T], replies: Replies, what: str, *, allow_missing: bool = False
) -> Paired[T]:
    """Give each reference or sample its reply.

    An id fits if it is equal, or if it is what follows the corpus in a uid `<corpus>/<id>` and no other
    uid ends so.

    Args:
        wanted: With an `id` each.
        replies: Of the model.
        what: How messages call one of them.
        allow_missing: Leave out and count what has no reply.

    Raises:
        PredictionError: One has no reply.
    """
    by_source: dict[str, list[Reply]] = {}
    for reply in replies.by_id.values():
        by_source.setdefault(reply.id.partition("/")[2], []).append(reply)
    pairs: list[tuple[T, Reply]] = []
    missing: list[T] = []
    used: set[str] = set()
    for one in wanted:
        name = one.id
        found = replies.by_id.get(name)
        if found is None and len(by_source.get(name, ())) == 1:
            [found] = by_source[name]
        if found is None:
            found = replies.by_id.get(name.partition("/")[2])
        if found is None:
            missing.append(one)
        else:
            pairs.append((one, found))
            used.add(found.id)
    if missing and (not allow_missing or not pairs):
        first, names = next(iter(replies.by_id)), [one.id for one in missing]
        raise PredictionError(
            f"{len(missing)} of {len(wanted)} {what}s have no prediction, first {_named(names)} "
            f"(predictions are called for example {first!r}).{near_miss(names[0], replies.by_id)} Hand "
            "in the whole file, or give --allow-missing to leave them out, which the result then tells."
        )
    extra = [name for name in replies.by_id if name not in used]
    if extra:
        logger.warning(
            "%d predictions have no %s and are not judged, first %s",
            len(extra),
            what,
            _named(extra),
        )
    reasons = {"no prediction": len(missing), f"prediction without {what}": len(extra)}
    return Paired(tuple(pairs), tuple(missing), {name: n for name, n in reasons.items() if n})


def stamp(path: Path) -> str:
    """Return the name of a file and the first digits of its SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{path.name}, sha256 {digest[:16]}"


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a table with where each stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot be read ({error.strerror}). Give JSON lines, a JSON list or CSV."
        ) from error
    except UnicodeDecodeError as error:
        raise PredictionError(
            f"{path}: no UTF-8 text ({error.reason}, byte {error.start})."
        ) from None
    if path.suffix.lower() == ".csv":
        return list(_csv_rows(path, text))
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except json.JSONDecodeError as error:
            raise PredictionError(f"{path}: no JSON list ({error}).") from None
        return [_row(item, f"{path}, item {i}") for i, item in enumerate(listed, start=1)]
    # split at line feeds alone: a reply may hold U+2028
    lines = enumerate(text.split("\n"), start=1)
    return [_json_row(line, f"{path}, line {i}") for i, line in lines if line.strip()]


def _json_row(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        return _row(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise PredictionError(f"{where}: no JSON ({error.msg}).") from None


def _row(item: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(item, dict):
        raise PredictionError(f"{where}: a JSON object is needed, got {type(item).__name__}.")
    return where, item


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise PredictionError(f"{where}: has not as many cells as the header.")
        yield where, {name.strip(): cell for name, cell in row.items()}


def _records(path: Path, split: str | None) -> Iterable[Any]:
    from cache.manifest import read_manifest

    manifest = read_manifest(path)
    return manifest.records if split is None else manifest.select(split)


def _refuse_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise SchemaError(f"--split {split}: only a manifest has splits; {path} is a table.")


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _id(row: Mapping[str, Any], where: str) -> str:
    found = _first(row, ID_FIELDS)
    if found is None:
        raise PredictionError(
            f"{where}: no id. One of {', '.join(ID_FIELDS)} is needed; the row has {', '.join(row)}."
        )
    return str(found).strip()


def _text(
    row: Mapping[str, Any], names: Sequence[str], where: str, *, may_be_empty: bool = False
) -> str:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise PredictionError(
            f"{where}: no text. One of {', '.join(names)} is needed; the row has {', '.join(row)}."
        )
    text = row[name]
    if not isinstance(text, str):
        raise PredictionError(f"{where}: '{name}' is {json.dumps(text)[:40]}; a text is needed.")
    if not text.strip() and not may_be_empty:
        raise PredictionError(f"{where}: '{name}' is empty; a description is needed.")
    return text


def _labels(row: Mapping[str, Any], kind: MmeKind, where: str) -> tuple[str, ...]:
    found = _first(row, LABEL_FIELDS)
    given = found if isinstance(found, list) else [found]
    if not given or not all(isinstance(label, str) for label in given):
        raise PredictionError(
            f"{where}: no label. One of {', '.join(LABEL_FIELDS)} is needed, a text or a list of texts."
        )
    if kind.several and not isinstance(found, list):
        given = str(found).replace(";", ",").split(",")
    labels = tuple(dict.fromkeys(label.strip() for label in given if label.strip()))
    if not labels or (len(labels) > 1 and not kind.several):
        raise PredictionError(
            f"{where}: task '{kind.id}' has {'labels' if kind.several else 'one label'}, got "
            f"{list(labels)}."
        )
    return labels


def _once(found: dict[str, Any], one: Any) -> None:
    known = found.setdefault(one.id, one)
    if known is not one:
        raise PredictionError(
            f"{one.where}: the id {one.id!r} stands there twice, before at {known.where}. Keep one of "
            "them."
        )


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_N_NAMED])
    return shown + (", ..." if len(names) > _N_NAMED else "")
