"""A trained run, asked about single media files: what `emocache predict` and `emocache app` stand on.

    with LiveModel.load(Path("run")) as live:
        seen = live.look(Path("clip.mp4"), subtitle="I did not expect you.")
        live.ask(seen, "emotion", likelihoods=True).label
        for piece in live.stream(seen, "think"):
            print(piece, end="")

The prompt, the tokens and the reading of the reply are those of `emocache evaluate`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from cache.clip import Record
from cache.errors import MediaError, SchemaError, near_miss
from cache.labels import LabelField, LabelSpace
from cache.manifest import Header
from cache.spec import STREAMS
from eval.generate import (
    Item,
    TrainedRun,
    check_masked,
    load_run,
    read_reply,
    scored_ask,
    space_of,
)
from eval.live import subtitles
from eval.live.clip import DEADLINE_S, MAX_DURATION_S, ClipReader, SeenClip, hide
from eval.live.replies import LiveReply, ReplyStream, checked_labels, settled
from eval.predictions import ClipFacts, Prediction
from extract import tiny
from extract.config import Precision
from extract.encoders.bank import EncoderBank
from extract.faces import face_source
from train.batches.loading import to_device
from train.batches.reading import Views
from train.config import STREAM_OF, tasks_asked
from train.data import Group, PrefixBatch, Question, Renderer, collate, prefix_masks
from train.llm.backbone import context_length
from train.mixture import Ask
from train.prompt import RENDERER_VERSION, neutralise
from train.text.tasks import TASK_TABLE, TASKS, Task, check_task

if TYPE_CHECKING:
    from extract.annotate.evidence.transcribe import Transcriber

__all__ = ("ANY_CORPUS", "LiveModel", "LiveReply", "ReplyStream")

ANY_CORPUS = "clip"
"""First part of the uid of a clip that belongs to no corpus."""


@dataclass(frozen=True)
class _Asked:
    """A question about a clip, ready for the model."""

    record: Record
    ask: Ask
    space: LabelSpace | None
    """What is offered; None of a task without labels."""
    masked: tuple[str, ...]
    seen: SeenClip
    batch: PrefixBatch
    """One question, or with it the plain one whose labels are compared."""
    candidates: list[tuple[tuple[int, ...], ...]]
    """Of each question, the ids of what is compared."""


class LiveModel:
    """A run and its encoders. May be shared by threads: one is answered at a time, others wait."""

    def __init__(
        self, trained: TrainedRun, reader: ClipReader, transcriber: Transcriber | None = None
    ) -> None:
        """Use a loaded run and encoders; `load` makes them."""
        self.trained = trained
        self._reader = reader
        self._transcriber = transcriber
        self._renderer = Renderer(trained.preset, trained.tokenizer, trained.header)
        self._limit = context_length(trained.model.llm.get_base_model())
        self._spec_ids = {str(name): spec.spec_id for name, spec in reader.specs.items()}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        run: Path,
        *,
        device: str = "cpu",
        weights: Literal["final", "best"] = "final",
        stage: str | None = None,
        encoder_weights: Mapping[str, Path] | None = None,
        overrides: Sequence[str] = (),
        header: Header | None = None,
        precision: Precision = "float32",
        transcriber: Transcriber | None = None,
        n_decoders: int = 1,
        deadline_s: float = DEADLINE_S,
        faces: str | None = None,
    ) -> Self:
        """Load a finished run and the encoders that its tokens came from.

        Args:
            run: A folder that `train` finished.
            device: Torch device, of encoders and model.
            weights: Those at the end of a stage, or those of its best validation.
            stage: Which; None takes the last.
            encoder_weights: Encoder (`eva`), stream or spec_id -> checkpoint; a preset that brings its own
                needs none. Weights that differ from those of the run's tokens are refused.
            overrides: `key=value` settings that differ from the run's, for example `data.failed=mask`.
            header: Label spaces for an imported checkpoint, which has none.
            precision: Of the encoders' matrix products; as in the extraction that the run was trained on.
            transcriber: Who writes down what is said, where that is asked for.
            n_decoders: Clips that are decoded at once.
            deadline_s: Longest time for decoding one.
            faces: Where faces are, for a run that reads them: a folder of OpenFace's tables, or
                `module:attribute` of a detector (`extract.faces`). Without it these inputs fail.

        Raises:
            SchemaError: An unknown setting, a checkpoint for something unknown, or faces that are found by
                another than the run's.
            CheckpointError: Not a finished run, or a checkpoint that is missing or does not fit.
        """
        trained = load_run(run, device, overrides, weights, header, stage)
        preset = trained.preset
        kinds = {spec.encoder.kind for spec in preset.tokens.all()}
        bundled = {
            kind: Path(tiny.__file__).parent / name
            for kind, name in preset.bundled_weights.items()
            if kind in kinds
        }
        given = bundled | dict(encoder_weights or {})
        bank = EncoderBank(preset.tokens.all(), given, device, precision)
        source = None if faces is None else face_source(preset.tokens.all(), faces)
        reader = ClipReader(
            preset, bank, n_decoders=n_decoders, deadline_s=deadline_s, faces=source
        )
        return cls(trained, reader, transcriber)

    def close(self) -> None:
        """End the decoder processes."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- what can be asked

    @property
    def corpora(self) -> tuple[str, ...]:
        """Corpora that have label spaces of their own, in the run's order."""
        keys = self.trained.header.label_spaces
        return tuple(dict.fromkeys(k.partition("/")[0] for k in keys if "/" in k))

    @property
    def can_transcribe(self) -> bool:
        """Whether there is somebody to write down what is said."""
        return self._transcriber is not None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that can be asked: there are templates and, for one with labels, a label space."""
        fields = {key.rpartition("/")[2] for key in self.trained.header.label_spaces}
        pools = self._renderer.wording.pools.model_dump(by_alias=True)
        return tuple(
            task
            for task in TASKS
            if pools[task] and (TASK_TABLE[task].label or "") in ("", *fields)
        )

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """Those of `tasks` that the run was trained on, in the order of `TASKS`."""
        known = {task for stage in self.trained.preset.stages for task in tasks_asked(stage)}
        return tuple(task for task in self.tasks if task in known)

    def space(self, task: str, corpus: str | None = None) -> LabelSpace | None:
        """Return the labels that a task offers for clips of a corpus; None of a task without labels.

        Args:
            task: One of `TASKS`.
            corpus: One of `corpora`; None: the only one whose labels there are.

        Raises:
            SchemaError: An unknown task or corpus, several corpora to choose from, or no labels.
        """
        field = TASK_TABLE[check_task(task)].label
        if field is None:
            return None
        spaces = self._spaces(field)
        if corpus is None:
            if len({space.labels for space in spaces.values()}) == 1:
                return next(iter(spaces.values()))
            if not spaces:
                raise SchemaError(
                    f"task '{task}': the run has no labels for '{field}'. Give them with --labels."
                )
            known = "; ".join(f"{c or 'all'}: {', '.join(s.labels)}" for c, s in spaces.items())
            raise SchemaError(
                f"task '{task}': the run has several lists of labels. Choose one with --corpus, or give "
                f"your own with --labels. Known: {known}"
            )
        found = self.trained.header.space(corpus, field)
        if found is None:
            allowed = ", ".join(name for name in spaces if name) or "none"
            raise SchemaError(
                f"--corpus {corpus}: the run has no labels for '{field}' of it.{near_miss(corpus, spaces)} "
                f"Allowed: {allowed}. Or give the labels yourself with --labels."
            )
        return found

    def _spaces(self, field: LabelField) -> dict[str, LabelSpace]:
        """Return corpus ("" for whichever) -> label space of a field."""
        found = {}
        for key, space in self.trained.header.label_spaces.items():
            corpus, _, of = key.rpartition("/")
            if of == field:
                found[corpus] = space
        return found

    def corpus_of(self, task: str = "emotion") -> str:
        """Return whose clip a file counts as, where nothing else is said: the only corpus, else none."""
        field = TASK_TABLE[check_task(task)].label
        named = [name for name in (self._spaces(field) if field else self.corpora) if name]
        return named[0] if len(named) == 1 else ANY_CORPUS

    # ---------------------------------------------------------------- looking

    def look(
        self,
        path: Path,
        *,
        name: str | None = None,
        corpus: str | None = None,
        subtitle: str | None = None,
        subtitle_language: str | None = None,
        transcribe: bool = False,
        peak_index: int | None = None,
        max_duration_s: float = MAX_DURATION_S,
    ) -> SeenClip:
        """Decode and encode a file, as extraction would.

        Args:
            path: A video, sound or picture file.
            name: What to call it; None: the file's name without its ending, as indexing does. With the
                corpus it seeds the choice of the instruction's wording, as a record's uid does.
            corpus: Whose labels count; None: those of the only corpus that the run has.
            subtitle: What is said; blank is nothing.
            subtitle_language: `en`, `zh`, ...
            transcribe: Where there is no subtitle, write down what is heard.
            peak_index: Frame of strongest expression, for runs that encode it.
            max_duration_s: Longest clip.

        Raises:
            MediaError: There is no clip to ask about; see `ClipReader.read`.
            SchemaError: Nobody is there to transcribe, or does not know the language.
            EncoderError: The device failed.
        """
        if transcribe and self._transcriber is None:
            raise SchemaError(
                "nobody is there to transcribe: give --transcribe an openai-whisper checkpoint (.pt)."
            )
        seen = self._reader.read(
            path,
            corpus=self.corpus_of() if corpus is None else corpus,
            name=name,
            peak_index=peak_index,
            max_duration_s=max_duration_s,
        )
        if subtitle is not None and subtitle.strip():
            return self.with_subtitle(seen, subtitle, language=subtitle_language)
        if transcribe:
            assert self._transcriber is not None
            config = self.trained.preset.prompt
            return subtitles.transcribed(seen, config, self._transcriber, subtitle_language)
        return seen

    def with_subtitle(
        self, seen: SeenClip, subtitle: str, *, language: str | None = None, origin: str = "given"
    ) -> SeenClip:
        """Return a clip with another subtitle; nothing is decoded again.

        Args:
            seen: The clip.
            subtitle: What is said; blank takes the subtitle away.
            language: `en`, `zh`, ...; None takes the language in which the run reads subtitles.
            origin: Who says so, see `cache.clip.Subtitle`.
        """
        config = self.trained.preset.prompt
        return subtitles.with_subtitle(seen, config, subtitle, language, origin)

    # ---------------------------------------------------------------- asking

    def ask(
        self,
        seen: SeenClip,
        task: str = "emotion",
        *,
        corpus: str | None = None,
        options: Sequence[str] | None = None,
        masked: Collection[str] = (),
        max_new_tokens: int = 200,
        likelihoods: bool = False,
    ) -> LiveReply:
        """Ask about a clip; the reply is decoded greedily.

        Args:
            seen: The clip.
            task: One of `TASKS`.
            corpus: Whose labels are offered; None: as `look` was told.
            options: Labels to offer in place of them.
            masked: Streams that the model does not get.
            max_new_tokens: Longest reply.
            likelihoods: Compute them too, see `likelihoods`.

        Raises:
            SchemaError: An unknown task, stream or corpus, labels that are none, or a question longer than
                the language model's context.
            MediaError: The clip has nothing of what the task sees.
        """
        asked = self._asked(seen, task, corpus, options, masked, likelihoods=likelihoods)
        with self._lock:
            first, *others = self.trained.model.answer(
                **_arguments(asked.batch),
                max_new_tokens=[max_new_tokens] + [0] * (len(asked.candidates) - 1),
                stop_ids=self._renderer.turns.stop_ids,
                candidates=asked.candidates,
            )
        shares = others[0].likelihoods if others else first.likelihoods
        return self._reply(asked, self._text(first.ids), len(first.ids), shares)

    def stream(
        self,
        seen: SeenClip,
        task: str = "emotion",
        *,
        corpus: str | None = None,
        options: Sequence[str] | None = None,
        masked: Collection[str] = (),
        max_new_tokens: int = 200,
    ) -> ReplyStream:
        """Ask about a clip, and return the reply as it is written; see `ask`."""
        asked = self._asked(seen, task, corpus, options, masked)
        ids: list[int] = []

        def pieces() -> Iterator[str]:
            written = ""
            with self._lock:
                for token in self.trained.model.stream(
                    **_arguments(asked.batch),
                    max_new_tokens=max_new_tokens,
                    stop_ids=self._renderer.turns.stop_ids,
                ):
                    ids.append(token)
                    text = settled(self._text(ids))
                    if len(text) > len(written):
                        yield text[len(written) :]
                        written = text
            rest = self._text(ids)[len(written) :]
            if rest:
                yield rest

        return ReplyStream(pieces(), lambda: self._reply(asked, self._text(ids), len(ids)))

    def likelihoods(
        self,
        seen: SeenClip,
        task: str = "emotion",
        *,
        corpus: str | None = None,
        options: Sequence[str] | None = None,
        masked: Collection[str] = (),
    ) -> dict[str, float] | None:
        """Return how likely the model finds each offered label, among all that are offered.

        That is the probability of label and end of turn behind the prompt, as a share of the sum over
        all labels. It says nothing of how sure a generated reply is. A task that reasons before it names
        its label (`think`) has no such probability: it gets that of the plain task of the same label.

        Returns:
            None of a task that names no label, or any words. Of a task with several labels, each label is
            taken as the whole answer.

        Raises:
            As `ask`.
        """
        asked = self._asked(seen, task, corpus, options, masked, likelihoods=True)
        if not any(asked.candidates):
            return None
        with self._lock:
            found = self.trained.model.label_likelihoods(
                **_arguments(asked.batch), candidates=asked.candidates
            )
        assert asked.space is not None
        return dict(zip(asked.space.labels, found[-1], strict=True))

    def _asked(
        self,
        seen: SeenClip,
        task: str,
        corpus: str | None,
        options: Sequence[str] | None,
        masked: Collection[str],
        *,
        likelihoods: bool = False,
    ) -> _Asked:
        """Render a question and lay it out, as evaluation does.

        Raises:
            As `ask`.
        """
        chosen = check_task(task)
        for stream in masked:
            if stream not in STREAMS:
                raise SchemaError(
                    f"unknown stream {stream!r} to mask.{near_miss(stream, STREAMS)} Allowed: "
                    f"{', '.join(STREAMS)}"
                )
        check_masked(self.trained.preset, masked)
        record = self._record(seen, chosen, corpus, options is None)
        hidden = tuple(s for s in STREAMS if s in masked or s in TASK_TABLE[chosen].hides)
        read = {STREAM_OF[name] for name in self._reader.specs}
        if all(s in hidden or s in seen.absent for s in read):
            left = " and ".join(s for s in STREAMS if s in read - {*hidden}) or "nothing"
            raise MediaError(
                f"{record.media}: task '{chosen}' is shown {left} of a clip, and of this clip there is "
                "none. Ask another task, or mask less."
            )
        offered = None
        if options is not None and TASK_TABLE[chosen].label is not None:
            offered = checked_labels(options)
        ask = Ask(chosen, 0, offered)
        space = space_of(record, ask, self._renderer.wording)
        asks: list[Ask] = [ask]
        candidates: list[tuple[tuple[int, ...], ...]] = [()]
        scored = scored_ask(ask) if likelihoods else None
        if scored is not None and space is not None:
            ids = self._renderer.candidates(space.labels)
            asks, candidates = ([ask], [ids]) if scored == ask else ([ask, scored], [(), ids])
        questions = tuple(
            self._renderer.question(record, one, with_answer=False, vary=False) for one in asks
        )
        views = hide(seen.views, hidden)
        batch = self._batch(record, questions, views)
        return _Asked(record, ask, space, tuple(masked), seen, batch, candidates)

    def _record(self, seen: SeenClip, task: Task, corpus: str | None, needs_labels: bool) -> Record:
        """Return the record of a clip, as one of the corpus whose labels are offered."""
        field, name = TASK_TABLE[task].label, seen.record.corpus if corpus is None else corpus
        if needs_labels and field is not None:
            self_evident = corpus is None and self.trained.header.space(name, field) is None
            self.space(task, None if self_evident else name)
            if self_evident:
                name = next(iter(self._spaces(field)))
        if name == seen.record.corpus:
            return seen.record
        return seen.record.model_copy(update={"uid": f"{name}/{seen.name}"})

    def _batch(self, record: Record, questions: tuple[Question, ...], views: Views) -> PrefixBatch:
        preset = self.trained.preset
        masks = views.masks
        if not preset.data.mask_missing:
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        n_prefix = int(prefix_masks(preset, masks).sum())
        group = Group(record, questions, (), n_prefix)
        if self._limit is not None and group.longest > self._limit:
            raise SchemaError(
                f"{record.media}: the question takes {group.longest} positions ({n_prefix} of the clip), "
                f"more than the language model's context of {self._limit}. Shorten the subtitle or the "
                "list of labels."
            )
        device = next(self.trained.model.parameters()).device
        return to_device(collate(preset, [group], views), device)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.trained.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _reply(
        self, asked: _Asked, reply: str, n_tokens: int, shares: Sequence[float] | None = None
    ) -> LiveReply:
        """Read a reply."""
        record, space = asked.record, asked.space
        quoted = self._renderer.wording.quoted(record, asking=True) or ""
        style = self.trained.preset.prompt.style
        stated_s = None if record.clip is None else record.clip.duration_s
        prediction = Prediction(
            uid=record.uid,
            task=asked.ask.task,
            masked=asked.masked,
            reply=reply,
            **read_reply(reply, record, Item(asked.ask), self._renderer.wording),
            run=self.trained.info.run_id,
            spec_ids=self._spec_ids,
            pool_id=self._renderer.wording.pools.pool_id,
            renderer_version=RENDERER_VERSION,
            likelihoods=None
            if not shares or space is None
            else dict(zip(space.labels, shares, strict=True)),
            n_tokens=n_tokens,
            about=ClipFacts(
                language=record.language,
                duration_s=asked.seen.duration_s if stated_s is None else stated_s,
                subtitle=neutralise(quoted, style) or None,
                absent=tuple(asked.seen.absent),
                media=record.media,
            ),
        )
        return LiveReply(prediction, () if space is None else space.labels)


def _arguments(batch: PrefixBatch) -> dict[str, Any]:
    """Return what the model's answering methods take of a batch."""
    names = ("tokens", "masks", "text_ids", "order", "segments")
    return {name: value for name, value in batch.items() if name in names}
