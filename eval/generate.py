"""A trained run and cached tokens to replies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cache.clip import Record
from cache.errors import CheckpointError, SchemaError, near_miss
from cache.labels import LabelSpace
from cache.manifest import Header
from cache.spec import STREAMS
from cache.store import TokenStore
from eval.parse import ParseHow, parse_labels, parse_reply
from eval.predictions import ClipFacts, Prediction
from train.batches.loading import to_device
from train.batches.reading import ViewReader
from train.checkpoint import best_folder, load_trained
from train.config import Preset, configure
from train.data import Group, PrefixBatch, Renderer, collate
from train.llm.backbone import context_length
from train.mixture import Ask
from train.model import EmotionLlama, build
from train.packing import Grouper
from train.prompt import RENDERER_VERSION, neutralise
from train.running.run import RunInfo, read_run
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, check_task
from train.text.wording import Wording


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded."""

    preset: Preset
    info: RunInfo
    model: EmotionLlama
    tokenizer: Any
    header: Header
    """Holds what it names: the label spaces of the run, and those that the run lacks of the manifest that it
    is asked about."""
    folder: Path | None = None
    """Of the trained parts; None of a model that was never saved."""


def load_run(
    run: Path,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    weights: Literal["final", "best"] = "final",
    header: Header | None = None,
    stage: str | None = None,
) -> TrainedRun:
    """Load the model of a run as it is behind one of its stages.

    Args:
        run: A folder that `train` finished.
        device: Torch device.
        overrides: `key=value` settings that differ from the run's, for example `data.failed=drop`.
        weights: Those at the end of the stage, or those of its best validation.
        header: Of the manifest that the run will be asked about, for label spaces that the run does not
            bring: of other corpora, or all of an imported checkpoint.
        stage: Name of a finished stage; None takes the last.

    Raises:
        SchemaError: An unknown setting.
        CheckpointError: Not a run, no finished stage, another stage than the run has finished, or a
            checkpoint that does not fit.
    """
    preset, info = read_run(run)
    preset = configure(preset, overrides)
    folder = _folder(run, info, stage, weights)
    spaces = {**({} if header is None else header.label_spaces), **info.label_spaces}
    if not spaces:
        raise CheckpointError(
            f"{run}: an imported checkpoint without labels of its own, and the manifest has none. Index "
            "with --labels, so that there is something to name."
        )
    model, tokenizer = build(preset)
    load_trained(model, folder)
    return TrainedRun(
        preset,
        info,
        model.eval().to(device),
        tokenizer,
        Header(media_root=".", label_spaces=spaces),
        folder,
    )


def _folder(run: Path, info: RunInfo, stage: str | None, weights: Literal["final", "best"]) -> Path:
    """Return the folder of the trained parts that are asked for."""
    if not info.finished:
        raise CheckpointError(
            f"{run}: no stage is finished yet. Continue it with the same `emocache train` command."
        )
    if stage is not None and stage not in info.finished:
        raise CheckpointError(
            f"{run}: no stage '{stage}' is finished.{near_miss(stage, info.finished)} Finished: "
            f"{', '.join(info.finished)}."
        )
    asked = run / (stage or info.finished[-1])
    folder = asked / "final" if weights == "final" else best_folder(asked)
    if folder is None:
        raise CheckpointError(
            f"{asked}: it never validated, so there is no best. Use the final weights, or train with "
            "records in data.val_split."
        )
    return folder


def check_masked(preset: Preset, masked: Collection[str]) -> None:
    """Refuse to mask what a run does not read: its replies would be those without a mask.

    Raises:
        SchemaError: It reads none of these streams.
    """
    read = tuple(s for s in STREAMS if s in {spec.stream for spec in preset.tokens.all()})
    if masked and not {*masked} & {*read}:
        raise SchemaError(
            f"the run reads no {' and no '.join(masked)}, so there is nothing to mask. It reads: "
            f"{', '.join(read)}."
        )


@dataclass(frozen=True)
class Item:
    """One question about a clip, and what its reply counts for."""

    ask: Ask
    benchmark: str | None = None
    merged: Mapping[str, str] = field(default_factory=dict)
    """Truth of the corpus -> the truth that counts."""


@dataclass(frozen=True)
class AskedClip:
    """A record with all that it is asked about: questions behind one prefix."""

    record: Record
    items: tuple[Item, ...]
    group: Group
    """The rendered questions: those of the items, then those that are asked for likelihoods alone."""
    offered: tuple[tuple[str, ...], ...]
    """Of each question the labels whose likelihoods are computed; empty: of none."""
    scored_by: tuple[int | None, ...]
    """Of each item the question whose likelihoods it gets."""


class Asker:
    """Asks one run about records of one store; batches of questions become predictions."""

    def __init__(
        self,
        trained: TrainedRun,
        store: TokenStore,
        *,
        max_new_tokens: int = 200,
        likelihoods: bool = False,
    ) -> None:
        """Read what questions are made of.

        Args:
            trained: The model.
            store: Tokens of the specs that the run was trained on.
            max_new_tokens: Longest reply; the reference uses 200.
            likelihoods: Score every offered label too, where the labels are closed. Of a joint task, whose
                answer begins with reasoning, the likelihoods are those of the recognition task, asked beside.
        """
        self._trained, self._likelihoods = trained, likelihoods
        self._max_new_tokens = max_new_tokens
        self.reader = ViewReader(store, trained.preset)
        self.renderer = Renderer(trained.preset, trained.tokenizer, trained.header)
        limit = context_length(trained.model.llm.get_base_model())
        self._grouper = Grouper(trained.preset, self.reader, self.renderer, limit)
        self._device = next(trained.model.parameters()).device

    @property
    def origin(self) -> dict[str, Any]:
        """Fields of a prediction that say where it came from."""
        return {
            "run": self._trained.info.run_id,
            "spec_ids": {str(name): spec.spec_id for name, spec in self.reader.specs.items()},
            "pool_id": self.renderer.wording.pools.pool_id,
            "renderer_version": RENDERER_VERSION,
        }

    def clip(
        self, record: Record, items: Sequence[Item], masked: Collection[str] = ()
    ) -> AskedClip:
        """Render the questions about a record; all must see the same streams.

        Args:
            record: With tokens in the store.
            items: Questions.
            masked: Streams that the model does not get.

        Raises:
            ManifestError: No label space for a question that brings no options.
            SchemaError: A sequence is longer than the context.
        """
        asks = [item.ask for item in items]
        scored_by: list[int | None] = []
        for item in items:
            scored = scored_ask(item.ask) if self._likelihoods else None
            if scored is not None and scored not in asks:
                asks.append(scored)
            scored_by.append(None if scored is None else asks.index(scored))
        hides = TASK_TABLE[asks[0].task].hides
        hidden = tuple(s for s in STREAMS if s in masked or s in hides)
        group = self._grouper.group(record, asks, hidden, with_answer=False)
        spaces = [
            space_of(record, ask, self.renderer.wording) if number in scored_by else None
            for number, ask in enumerate(asks)
        ]
        offered = tuple(() if space is None else space.labels for space in spaces)
        return AskedClip(record, tuple(items), group, offered, tuple(scored_by))

    def batches(
        self, batches: Sequence[Sequence[AskedClip]], masked: Collection[str] = ()
    ) -> Iterator[list[Prediction]]:
        """Yield the predictions of one batch after the other, of each in the order of clips and items.

        The tokens of the next batch are read while the model works on one.
        """
        with ThreadPoolExecutor(1, "emocache-read") as reading:
            waiting = [reading.submit(self._read, clips) for clips in batches[:1]]
            for number, clips in enumerate(batches):
                batch = waiting.pop().result()
                waiting = [reading.submit(self._read, c) for c in batches[number + 1 : number + 2]]
                yield self._ask(clips, to_device(batch, self._device), masked)

    def _read(self, clips: Sequence[AskedClip]) -> PrefixBatch:
        groups = [clip.group for clip in clips]
        views = self.reader.read([clip.record for clip in clips], [g.hidden for g in groups])
        return collate(self._trained.preset, groups, views)

    def _ask(
        self, clips: Sequence[AskedClip], batch: PrefixBatch, masked: Collection[str]
    ) -> list[Prediction]:
        limits: list[int] = []
        candidates: list[tuple[tuple[int, ...], ...]] = []
        for clip in clips:
            n_silent = len(clip.offered) - len(clip.items)
            limits += [*[self._max_new_tokens] * len(clip.items), *[0] * n_silent]
            candidates += map(self.renderer.candidates, clip.offered)
        found = self._trained.model.answer(
            tokens=batch["tokens"],
            masks=batch["masks"],
            text_ids=batch["text_ids"],
            order=batch["order"],
            segments=batch["segments"],
            max_new_tokens=limits,
            stop_ids=self.renderer.turns.stop_ids,
            candidates=candidates,
        )
        predictions = []
        for clip in clips:
            answers, found = found[: len(clip.offered)], found[len(clip.offered) :]
            for number, (item, scored) in enumerate(zip(clip.items, clip.scored_by, strict=True)):
                likelihoods = None
                if scored is not None:
                    shares = answers[scored].likelihoods or ()
                    likelihoods = dict(zip(clip.offered[scored], shares, strict=True))
                predictions.append(
                    self._prediction(clip, item, answers[number].ids, likelihoods, masked)
                )
        return predictions

    def _prediction(
        self,
        clip: AskedClip,
        item: Item,
        ids: Sequence[int],
        likelihoods: dict[str, float] | None,
        masked: Collection[str],
    ) -> Prediction:
        reply = str(self._trained.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Prediction(
            uid=clip.record.uid,
            task=item.ask.task,
            masked=tuple(masked),
            reply=reply,
            **read_reply(reply, clip.record, item, self.renderer.wording),
            **self.origin,
            benchmark=item.benchmark,
            split=clip.record.split,
            likelihoods=likelihoods,
            n_tokens=len(ids),
            about=self.facts(clip.record),
        )

    def facts(self, record: Record) -> ClipFacts:
        """Return what reports show of a record and slice by."""
        quoted = self.renderer.wording.quoted(record, asking=True) or ""
        style = self._trained.preset.prompt.style
        return ClipFacts(
            language=record.language,
            duration_s=None if record.clip is None else record.clip.duration_s,
            subtitle=neutralise(quoted, style) or None,
            absent=tuple(s for s in self.reader.streams if s not in self.reader.streams_of(record)),
            media=record.media,
        )


def scored_ask(ask: Ask) -> Ask | None:
    """Return the question whose labels are scored beside one: itself, or the recognition task of its label.

    None: it names no label, or any words.
    """
    asked = TASK_TABLE[ask.task].label
    if asked is None or asked == "emotion_ov":
        return None
    for task, row in TASK_TABLE.items():
        if row.label == asked and not row.joint:
            return replace(ask, task=task)
    return None


def space_of(record: Record, ask: Ask, wording: Wording) -> LabelSpace | None:
    """Return the labels that a question offers, with the corpus's aliases of them; None: it names none.

    Raises:
        ManifestError: The record's corpus has no label space, and the question brings no options.
    """
    asked = TASK_TABLE[ask.task].label
    if asked is None:
        return None
    if ask.options is None:
        return wording.space(record, asked)
    own = wording.known_space(record, asked)
    aliases = {} if own is None else own.aliases
    return LabelSpace(
        name=asked,
        labels=ask.options,
        aliases={alias: label for alias, label in aliases.items() if label in ask.options},
        open=asked == "emotion_ov",
    )


def generate(
    trained: TrainedRun,
    store: TokenStore,
    records: Sequence[Record],
    *,
    task: str = "emotion",
    masked: Collection[str] = (),
    max_new_tokens: int = 200,
    batch_size: int = 16,
    likelihoods: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Ask the model about every record, greedily, in batches.

    Args:
        trained: The model.
        store: Tokens of the specs that the run was trained on.
        records: Whom to ask about; none may be without tokens.
        task: One of `TASKS`.
        masked: Streams that the model does not get.
        max_new_tokens: Longest reply; the reference uses 200.
        batch_size: Records per batch.
        likelihoods: See `Asker`.
        on_batch: Called with the number of records done.

    Yields:
        One prediction per record, in order.
    """
    asker = Asker(trained, store, max_new_tokens=max_new_tokens, likelihoods=likelihoods)
    item = Item(Ask(check_task(task), 0))
    clips = [asker.clip(record, [item], masked) for record in records]
    packs = [clips[start : start + batch_size] for start in range(0, len(clips), batch_size)]
    for predictions in asker.batches(packs, masked):
        yield from predictions
        if on_batch is not None:
            on_batch(len(predictions))


def read_reply(reply: str, record: Record, item: Item, wording: Wording) -> dict[str, Any]:
    """Return the fields of a prediction that hold what was named and what is true."""
    asked = TASK_TABLE[item.ask.task].label
    space = space_of(record, item.ask, wording)
    if asked is None or space is None:  # a description is text and names nothing
        how: ParseHow = "off_list" if reply else "empty"
        return {"label": None, "parse": how, "truth": None}
    truths = tuple(dict.fromkeys(item.merged.get(t, t) for t in record.labels_of(asked)))
    if asked not in SEVERAL_LABELS:
        one = parse_reply(reply, space.labels, space.aliases)
        return {"label": one.label, "parse": one.how, "truth": next(iter(truths), None)}
    found = parse_labels(reply, space.labels, space.aliases, is_open=space.open)
    return {
        "label": None,
        "labels": found.labels,
        "unread": found.unread,
        "parse": found.how,
        "truth": None,
        "truths": truths,
    }
