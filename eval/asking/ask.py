"""A run, asked about MMEVerse-Bench: resumable, in parts if wanted, always the same file in the end.

::

    OUT/asked.json                    what is asked: other settings are refused
    OUT/skipped.jsonl                 items that are not asked about, each with the reason
    OUT/predictions-1-of-4.jsonl      replies of a part, appended batch by batch
    OUT/predictions.jsonl             all replies; with one part, appended too, and put in order at the end

Batches are those of the plan, whoever asks them and however often it was killed: a batch of which a line
is missing is computed again as a whole, so that no number depends on what happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cache.clip import file_sha256
from cache.errors import PredictionError, SchemaError
from cache.files import create_once, write_aside
from cache.manifest import Manifest
from cache.schema import Model, decode_json
from cache.spec import differences
from cache.store import TokenStore
from eval.asking.journal import Journal, in_order, read_journal
from eval.asking.plan import Plan, keys_of, plan_benchmarks
from eval.generate import Asker, TrainedRun
from eval.predictions import Key

PREDICTIONS_FILE = "predictions.jsonl"
SKIPPED_FILE = "skipped.jsonl"
SETTINGS_FILE = "asked.json"


class AskedSettings(Model):
    """All that replies depend on."""

    schema_version: Literal[1] = 1
    run: str
    weights: str
    """Stage and folder of the trained parts."""
    weights_sha256: dict[str, str]
    """File of the trained parts -> digest."""
    preset: dict[str, Any]
    """Of the run, without what changes no reply: training, execution."""
    spec_ids: dict[str, str]
    pool_id: str
    renderer_version: int
    benchmarks: tuple[str, ...]
    reasoning: bool
    likelihoods: bool
    max_new_tokens: int
    batch_size: int
    sample: int | None
    plan: str
    """Digest of the questions, their records and their batches."""


def ask_benchmarks(
    trained: TrainedRun,
    store: TokenStore,
    manifest: Manifest,
    names: Sequence[str],
    out: Path,
    *,
    reasoning: bool = False,
    likelihoods: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 200,
    shard: tuple[int, int] = (0, 1),
    sample: int | None = None,
    on_replies: Callable[[int], None] | None = None,
) -> Path | None:
    """Ask a run about sets of MMEVerse-Bench, or go on where an earlier call ended.

    Args:
        trained: The model.
        store: Tokens of the specs that the run was trained on.
        manifest: Records that name the sets that score them.
        names: Ids of sets.
        out: Folder, made if needed.
        reasoning: Ask the joint task of a label (think, then name), where there is one.
        likelihoods: Score every offered label too; see `Asker`.
        batch_size: Clips per batch.
        max_new_tokens: Longest reply.
        shard: (i, n): ask batches i, i + n, ... of the plan. Any numbers may be mixed, also of parts.
        sample: Items of each set.
        on_replies: Called with the number of replies that are there, or have come since the last call.

    Returns:
        The predictions file, complete; None while batches of other parts are missing.

    Raises:
        SchemaError: An unknown set, an impossible shard.
        ManifestError: A set without records.
        CacheMissError: A clip was never extracted, or an absent or failed stream is to be refused.
        PredictionError: The folder holds replies to other questions (lists what differs), or cannot
            be written.
    """
    part, n_parts = shard
    if not 0 <= part < n_parts:
        raise SchemaError(f"shard {part}/{n_parts}: give I/N with I from 0 to N - 1.")
    asker = Asker(trained, store, max_new_tokens=max_new_tokens, likelihoods=likelihoods)
    plan = plan_benchmarks(
        asker,
        manifest,
        names,
        trained.preset.data,
        reasoning=reasoning,
        batch_size=batch_size,
        sample=sample,
    )
    settings = AskedSettings(
        weights=_weights(trained),
        weights_sha256=_weights_digests(trained),
        preset=trained.preset.model_dump(mode="json", exclude={"stages", "execution"}),
        benchmarks=tuple(names),
        reasoning=reasoning,
        likelihoods=likelihoods,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sample=sample,
        plan=plan.digest,
        **asker.origin,
    )
    _settle(out, settings, plan)
    with Journal(_journal_of(out, shard), plan.order) as journal:
        known = {**_answered(out, plan), **journal.lines}
        mine = plan.batches[part::n_parts]
        n_done = sum(key in known for batch in mine for clip in batch for key in keys_of(clip))
        if on_replies is not None and n_done:
            on_replies(n_done)
        left = [b for b in mine if any(key not in known for clip in b for key in keys_of(clip))]
        for predictions in asker.batches(left):
            fresh = [p for p in predictions if p.key not in known]
            journal.append(fresh)
            if on_replies is not None:
                on_replies(len(fresh))
        return _finish(out, plan)


def _journal_of(out: Path, shard: tuple[int, int]) -> Path:
    part, n_parts = shard
    return out / (PREDICTIONS_FILE if n_parts == 1 else f"predictions-{part}-of-{n_parts}.jsonl")


def _answered(out: Path, plan: Plan) -> dict[Key, bytes]:
    """Return what any part answered: key -> line; cut and damaged lines are their writers' to mend."""
    found: dict[Key, bytes] = {}
    try:
        for path in sorted([*out.glob("predictions-*-of-*.jsonl"), out / PREDICTIONS_FILE]):
            found.update(read_journal(path, frozenset(plan.order))[0])
    except OSError as error:
        raise PredictionError(
            f"{out}: the replies so far cannot be read ({error.strerror or error}). Mend the disk, and "
            "run the same command again."
        ) from error
    return found


def _finish(out: Path, plan: Plan) -> Path | None:
    """Put all replies in order into one file, if all are there."""
    lines = _answered(out, plan)
    if len(lines) < len(plan.order):
        return None
    path, whole = out / PREDICTIONS_FILE, in_order(lines, plan.order)
    if not path.exists() or path.read_bytes() != whole:
        with write_aside(path) as aside:
            aside.write_bytes(whole)
    return path


def _settle(out: Path, settings: AskedSettings, plan: Plan) -> None:
    """Write down what is asked, or refuse to go on with anything else."""
    path = out / SETTINGS_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(out.glob("predictions*.jsonl")):
            raise PredictionError(
                f"{out}: holds predictions, but no {SETTINGS_FILE} that says what was asked. Give another "
                "--out, or move them away."
            )
        create_once(path, settings.model_dump_json(indent=2).encode() + b"\n")
        known = decode_json(AskedSettings, path.read_bytes(), str(path))
        found = differences(settings, known)
        if found:
            told = "; ".join(
                f"{name}: {_short(b)} there, {_short(a)} now" for name, (a, b) in found.items()
            )
            raise PredictionError(
                f"{out}: holds replies to other questions ({told}). Give another --out, or the same "
                "settings."
            )
        skipped = b"".join(item.model_dump_json().encode() + b"\n" for item in plan.skipped)
        if not (out / SKIPPED_FILE).exists() or (out / SKIPPED_FILE).read_bytes() != skipped:
            with write_aside(out / SKIPPED_FILE) as aside:
                aside.write_bytes(skipped)
    except OSError as error:
        raise PredictionError(
            f"{out}: cannot be written ({error.strerror or error}). Give a folder that can: --out"
        ) from error


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _weights(trained: TrainedRun) -> str:
    folder = trained.folder
    return "" if folder is None else f"{folder.parent.name}/{folder.name}"


def _weights_digests(trained: TrainedRun) -> Mapping[str, str]:
    folder = trained.folder
    if folder is None:
        return {}
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }
