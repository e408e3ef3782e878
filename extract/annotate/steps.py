"""Algorithm 1 for one record: face, picture, sound and words to clues, clues to descriptions.

Nothing is invented: a stream that is not there gives an absent clue, a step that failed is recorded with
kind and reason, and the steps after it go on with what there is.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cache.clip import Peak, Record, Subtitle
from cache.commit import Status
from cache.errors import EmocacheError, SchemaError
from cache.labels import LabelField
from cache.schema import canonical_json
from extract.annotate.endpoints.answers import Answer
from extract.annotate.endpoints.endpoint import Failure as NoAnswer
from extract.annotate.endpoints.questions import MediaPart
from extract.annotate.evidence.action_units import (
    describe_face,
    peak_frame,
    present_units,
    pseudo_labels,
    sum_without,
)
from extract.annotate.evidence.detectors import (
    Detection,
    detect,
)
from extract.annotate.evidence.media import ClipMedia, Picture, Sound
from extract.annotate.presets import Role, SpeechOptions
from extract.annotate.results import RecordResult, Step, StepResult, absent, failed
from extract.annotate.tools import Clues, FaceClue, SpeechClue, Tools, load_transcriber
from extract.decode_pool import DecodeFailure
from extract.failures import TRANSIENT, Failure
from extract.jobs.blame import quarantine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from extract.annotate.evidence.transcribe import Transcriber

NO_PICTURES = "the clip has no pictures"
NO_SOUND = "the clip has no sound"
NO_FACE = "no face was found"
NO_MOVEMENT = "the face never moves"
NOBODY_SPEAKS = "nobody speaks"
NO_LABEL = "the record has no label that could guide it"
NO_CLUES = "there is no clue to describe"
"""Why a step is absent."""

T = TypeVar("T")


class Annotator:
    """Annotates records, any number at once, from one event loop."""

    def __init__(self, tools: Tools) -> None:
        """Use some tools."""
        self._tools = tools
        self._preset = tools.preset
        self._transcriber: Transcriber | None = None
        own = self._preset.units.table
        digest = hashlib.sha256(tools.units.model_dump_json().encode()).hexdigest()[:12]
        self._units_id = f"{'action-units' if own is None else own.stem}@{digest}"

    @property
    def seconds(self) -> dict[str, float]:
        """Step -> time that all records together spent in it so far, waits included."""
        return dict(self._tools.seconds)

    async def annotate(self, record: Record) -> RecordResult:
        """Return what all steps gave for a record.

        Raises:
            EmocacheError: No record can be annotated any more: an endpoint is down, the budget is used
                up, a tool is not installed.
        """
        async with self._file(record) as path:
            face = await self._timed("visual_expression", self._face, record, path)
            seen = record if face.peak is None else _at(record, face.peak)
            media = await self._timed("media", self._media, seen, path) if self._sends() else None
        steps = [face.step] if face.step is not None else []
        objective, tone, speech = await asyncio.gather(
            self._timed("visual_objective", self._objective, record, media),
            self._timed("audio_tone", self._tone, record, media),
            self._timed("subtitle", self._speech, record, media),
        )
        steps += [step for step in (objective, tone, speech.step) if step is not None]
        words = record.subtitle()
        if words is None and speech.subtitle is not None:
            words = speech.subtitle.text
        steps += await self._describe(record, steps, words, face.hints)
        return RecordResult(
            uid=record.uid,
            media=record.media,
            sha256=record.sha256,
            steps=tuple(steps),
            peak=_timed_by(media, face.peak),
            action_units=face.units,
            spoken=speech.subtitle,
            pseudo_labels=face.hints,
            time_s=time.time(),
        )

    # ---------------------------------------------------------------- media

    def _sends(self) -> bool:
        preset = self._preset
        return any((preset.visual_objective, preset.audio_tone, preset.speech))

    @asynccontextmanager
    async def _file(self, record: Record) -> AsyncIterator[Path | Failure]:
        """Give a record's file on this machine's disk, or why there is none."""
        fetched = self._tools.source.fetch(record)
        if not self._tools.source.is_remote:
            with fetched as path:
                yield path
            return
        async with AsyncExitStack() as stack:
            try:
                path = await self._timed("fetch", asyncio.to_thread, fetched.__enter__)
            except FileNotFoundError:
                root = self._tools.source.root
                yield Failure("missing", f"{record.media}: there is no such file below {root}")
                return
            except OSError as error:
                yield Failure("unreadable", f"{record.media} cannot be fetched: {error}")
                return
            stack.callback(fetched.__exit__, None, None, None)
            yield path

    async def _media(self, record: Record, path: Path | Failure) -> ClipMedia:
        if isinstance(path, Failure):
            return ClipMedia(Picture("failed", path), Sound("failed", path))
        media = await asyncio.wrap_future(self._tools.reader.submit(record, path))
        if media.evidence is not None:
            self._tools.on_evidence(record, media.evidence)
        else:
            failures = [part.failure for part in (media.picture, media.sound) if part.failure]
            if failures:
                self._tools.on_evidence(record, DecodeFailure(failures[0], 1))
        return media

    # ---------------------------------------------------------------- face

    async def _face(self, record: Record, path: Path | Failure) -> _Face:
        """Find the peak, and say what the face does there."""
        tools = self._tools
        if tools.detector is None:
            if not record.action_units:
                return _Face()
            return self._face_of(record, record.action_units, None, ("own", None))
        # A table is read as quickly as what is known of it, and may have been made anew.
        is_kept = self._preset.detector.kind != "openface-csv"
        key = self._clue_key(record, "face")
        known = await asyncio.to_thread(tools.clues.get, key) if is_kept else None
        clue = known.face if known is not None else None
        if clue is None:
            if isinstance(path, Failure):
                return _Face(failed("visual_expression", path))
            if record.sha256 in tools.guilty:
                return _Face(failed("visual_expression", quarantine(record).failure))
            found = await asyncio.get_running_loop().run_in_executor(
                tools.detecting, self._detect, record, path
            )
            if found.failure is not None:
                tools.on_evidence(
                    record,
                    DecodeFailure(found.failure, 1, found.exit_signal, found.output_tail),
                )
                return _Face(failed("visual_expression", found.failure))
            clue = self._clue_of(found)
            if is_kept:
                tools.clues.put(key, Clues(face=clue))
        if clue.frame is None:
            return _Face(absent("visual_expression", clue.reason or NO_FACE))
        peak = clue.frame.peak(clue.method, clue.score)
        hints = pseudo_labels(clue.present, tools.units, self._preset.units.rules)
        return self._face_of(record, clue.frame.intensities, peak, (clue.method, hints))

    def _detect(self, record: Record, path: Path) -> Detection:
        """Run the detector; OpenFace's dies alone, one of a user's own takes this process along."""
        tools = self._tools
        assert tools.detector is not None
        if self._preset.detector.kind in ("openface", "openface-csv"):
            return detect(tools.detector, record, path)
        tools.on_danger(record, True)
        try:
            return detect(tools.detector, record, path)
        finally:
            tools.on_danger(record, False)

    def _clue_of(self, found: Detection) -> FaceClue:
        if found.table is None:
            return FaceClue(status="absent", reason=NO_PICTURES)
        without = self._preset.units.without
        frame = peak_frame(found.table, without)
        if frame is None:
            reason = NO_MOVEMENT if found.table.frames else NO_FACE
            return FaceClue(status="absent", reason=reason)
        assert self._tools.detector is not None
        return FaceClue(
            status="ok",
            frame=frame,
            present=present_units(frame, self._tools.units),
            score=sum_without(frame.intensities, without),
            method=self._tools.detector.method,
        )

    def _face_of(
        self,
        record: Record,
        units: Mapping[str, float],
        peak: Peak | None,
        how: tuple[str, Sequence[str] | None],
    ) -> _Face:
        table = self._tools.units
        method, hints = how
        if hints is None:
            there = [unit for unit, value in units.items() if value >= table.present_from]
            hints = pseudo_labels(there, table, self._preset.units.rules)
        step = StepResult(
            step="visual_expression",
            status=Status.OK,
            text=describe_face(units, record.uid, table),
            model=method,
            prompt_id=self._units_id,
        )
        return _Face(step, peak, dict(units) if peak is not None else {}, tuple(hints))

    # ---------------------------------------------------------------- what models see and hear

    async def _objective(self, record: Record, media: ClipMedia | None) -> StepResult | None:
        if self._preset.visual_objective is None:
            return None
        assert media is not None
        picture = media.picture
        if picture.jpeg is None:
            return _without("visual_objective", picture.failure, NO_PICTURES)
        part = MediaPart.of("image/jpeg", picture.jpeg)
        return await self._ask("visual_objective", {"person": record.person}, (part,))

    async def _tone(self, record: Record, media: ClipMedia | None) -> StepResult | None:
        if self._preset.audio_tone is None:
            return None
        assert media is not None
        if media.sound.waveform is None:
            return _without("audio_tone", media.sound.failure, NO_SOUND)
        part = MediaPart.of("audio/wav", media.sound.wav(), seconds=media.sound.kept_s)
        slots = {"person": record.person, "language": record.language}
        return await self._ask("audio_tone", slots, (part,))

    async def _speech(self, record: Record, media: ClipMedia | None) -> _Speech:
        """Write down what is said, where the record does not tell."""
        options = self._preset.speech
        if options is None or record.subtitle() is not None:
            return _Speech()
        assert media is not None
        if media.sound.waveform is None:
            return _Speech(_without("subtitle", media.sound.failure, NO_SOUND))
        key = self._clue_key(record, "speech")
        known = await asyncio.to_thread(self._tools.clues.get, key)
        clue = known.speech if known is not None else None
        if clue is None:
            if record.sha256 in self._tools.guilty:
                return _Speech(failed("subtitle", quarantine(record).failure))
            found = await asyncio.get_running_loop().run_in_executor(
                self._tools.speaking, self._recognise, options, media.sound, record
            )
            if isinstance(found, Failure):
                return _Speech(failed("subtitle", found))
            clue = SpeechClue(subtitle=found)
            self._tools.clues.put(key, Clues(speech=clue))
        if clue.subtitle is None:
            return _Speech(absent("subtitle", NOBODY_SPEAKS))
        step = StepResult(
            step="subtitle",
            status=Status.OK,
            text=clue.subtitle.text,
            model=clue.subtitle.origin.removeprefix("asr:"),
        )
        return _Speech(step, clue.subtitle)

    def _recognise(
        self, options: SpeechOptions, sound: Sound, record: Record
    ) -> Subtitle | Failure | None:
        if self._transcriber is None:
            self._transcriber = load_transcriber(options)
        assert sound.waveform is not None
        self._tools.on_danger(record, True)
        try:
            return self._transcriber.transcribe(sound.waveform, record.language).subtitle
        except SchemaError as error:  # a language that the model does not know
            return Failure("undecodable", f"{record.media}: {error}")
        except EmocacheError:
            raise
        except Exception as error:  # noqa: BLE001  the per-clip boundary: recorded, never swallowed
            return Failure("unexpected", f"{record.media}: {type(error).__name__}: {error}")
        finally:
            self._tools.on_danger(record, False)

    # ---------------------------------------------------------------- descriptions

    async def _describe(
        self,
        record: Record,
        steps: Sequence[StepResult],
        words: str | None,
        hints: Sequence[str],
    ) -> list[StepResult]:
        """Put the clues together, once for each label that guides."""
        guides: list[tuple[LabelField | None, str | None]] = [
            (field, ", ".join(labels))
            for field in self._preset.targets
            if (labels := record.labels_of(field))
        ]
        if not guides:
            if self._preset.unlabelled == "skip":
                return [absent("multimodal", NO_LABEL)]
            guides = [(None, hints[0] if hints else None)]
        clues: dict[str, str | None] = {
            step.step: step.text for step in steps if step.text and step.step != "subtitle"
        }
        slots = {**clues, "person": record.person}
        if words:
            slots["subtitle"] = words
        needed = [
            step
            for step in steps
            if step.step in self._preset.need and step.status is Status.FAILED
        ]
        found = []
        for target, _ in guides:
            if needed:
                found.append(_unmade(needed[0], f"needs {needed[0].step}, which failed", target))
            elif not clues and not words:
                found.append(_nothing(steps, target))
        if found:
            return found
        return await self._timed(
            "multimodal",
            lambda: asyncio.gather(*(self._consolidate(t, guide, slots) for t, guide in guides)),
        )

    async def _consolidate(
        self, target: LabelField | None, guide: str | None, slots: Mapping[str, str | None]
    ) -> StepResult:
        wordings = self._tools.wordings
        filled = {**slots, "label": guide}
        draft = None
        if wordings.template is not None:
            draft = wordings.template.render(filled)[0]
        if self._preset.consolidate is None:
            assert wordings.template is not None
            return StepResult(
                step="multimodal",
                target=target,
                status=Status.OK,
                text=draft,
                model="template",
                prompt_id=wordings.template.id,
            )
        if guide is None:
            return absent("multimodal", NO_LABEL, target)
        return await self._ask("consolidate", {**filled, "draft": draft}, (), target)

    # ---------------------------------------------------------------- asking

    async def _ask(
        self,
        role: Role,
        slots: Mapping[str, str | None],
        media: tuple[MediaPart, ...],
        target: LabelField | None = None,
    ) -> StepResult:
        options = self._preset.roles[role]
        prompt = self._tools.wordings.of(role, target)
        step: Step = "multimodal" if role == "consolidate" else role
        question = prompt.question(
            options.model, slots, media, sampling=options.sampling(prompt.file.max_tokens)
        )
        answer = await asyncio.wrap_future(self._tools.askers[role].ask(question))
        if isinstance(answer, NoAnswer):
            reason = f"unanswered: {answer.kind}: {answer.reason}"
            return StepResult(
                step=step, target=target, status=Status.FAILED, reason=reason,
                model=options.model, prompt_id=prompt.id, requests=answer.attempts,
            )  # fmt: skip
        return _answered(step, target, answer)

    # ---------------------------------------------------------------- parts

    def _clue_key(self, record: Record, what: Literal["face", "speech"]) -> str:
        """Return what a clue of a clip is known by: the clip, and what decides what is found in it."""
        preset = self._preset
        if what == "face":
            told: dict[str, object] = {
                "detector": preset.detector.model_dump(
                    mode="json", include={"kind", "min_confidence", "options"}
                ),
                "without": preset.units.without,
                "present_from": self._tools.units.present_from,
            }
        else:
            assert preset.speech is not None
            told = preset.speech.model_dump(mode="json", exclude={"checkpoint", "device"})
            told |= {"checkpoint": preset.speech.checkpoint.name, "language": record.language}
            told["max_sound_s"] = preset.media.max_sound_s
        whole = {"what": what, "clip": record.sha256, **told}
        return hashlib.sha256(canonical_json(whole).encode()).hexdigest()

    async def _timed(self, what: str, begin: Callable[..., Awaitable[T]], *given: Any) -> T:
        # Begun here, not by the caller: what is cancelled before its turn leaves nothing that waits.
        began_s = time.monotonic()
        try:
            return await begin(*given)
        finally:
            self._tools.seconds[what] += time.monotonic() - began_s


@dataclass(frozen=True)
class _Face:
    """What came of the first step."""

    step: StepResult | None = None
    """None where nobody looks for faces and nothing is known of this one."""
    peak: Peak | None = None
    units: dict[str, float] = field(default_factory=dict)
    hints: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Speech:
    """What came of speech recognition; nothing where it was not needed."""

    step: StepResult | None = None
    subtitle: Subtitle | None = None


def _at(record: Record, peak: Peak) -> Record:
    return record.model_copy(update={"peak": peak})


def _timed_by(media: ClipMedia | None, peak: Peak | None) -> Peak | None:
    """Return a peak with its time as decoding tells it, where the frame was decoded: detectors guess."""
    if peak is None or media is None or media.picture.index != peak.index:
        return peak
    return peak.model_copy(update={"pts_s": media.picture.pts_s})


def _without(step: Step, failure: Failure | None, why: str) -> StepResult:
    return absent(step, why) if failure is None else failed(step, failure)


def _nothing(steps: Sequence[StepResult], target: LabelField | None) -> StepResult:
    """Return the description of a record of which nothing is known: failed if that may pass."""
    for step in steps:
        if step.status is Status.FAILED:
            return _unmade(step, f"there is no clue, {step.step} failed", target)
    return absent("multimodal", NO_CLUES, target)


def _unmade(because_of: StepResult, why: str, target: LabelField | None) -> StepResult:
    """Return a description that failed because another step did, in the same way."""
    reason = f"{because_of.kind}: {why}"
    return StepResult(step="multimodal", target=target, status=Status.FAILED, reason=reason)


def _answered(step: Step, target: LabelField | None, answer: Answer) -> StepResult:
    facts = {
        "step": step,
        "target": target,
        "model": answer.asked_model,
        "version": answer.model,
        "prompt_id": answer.prompt_id,
        "requests": answer.attempts,
        "tokens_in": answer.prompt_tokens or 0,
        "tokens_out": answer.completion_tokens or 0,
    }
    if not answer.ok:
        reason = f"{answer.outcome.value}: {answer.reason or 'no reason is given'}"
        return StepResult(status=Status.FAILED, reason=reason, **facts)
    text = answer.text
    if step == "multimodal":
        text = str(answer.value()["description"]) if _is_json(answer) else text
    return StepResult(status=Status.OK, text=" ".join(text.split()), **facts)


def _is_json(answer: Answer) -> bool:
    try:
        return isinstance(answer.value(), dict)
    except ValueError:
        return False


def may_pass(result: RecordResult) -> bool:
    """Return whether a failure of a record says more about the place than about the record."""
    passing = {*TRANSIENT, "unanswered"}
    return any(step.kind in passing for step in result.failures)
