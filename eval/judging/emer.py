"""EMER: how far descriptions of emotion overlap with people's, as a judge model rates it (section 5.2).

Clue overlap takes one question per clip: reference and description side by side. Label overlap takes
three: each text is condensed to its emotion words, and the two sets are rated. Both are means over clips
of ratings from 1 to 10.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.judging.numbers import repeated
from eval.judging.panel import JudgeOptions, OnAnswers, Panel, Said
from eval.judging.prompts import EMER_ROLES, JudgePrompt, Role, Slot, judge_prompts
from eval.judging.replies import LOWEST, rating_of, without_tags, words_of
from eval.judging.results import EmerClip, EmerScore, Judge, Unread
from eval.judging.sources import Paired, Reference, pair, read_references, read_replies, stamp
from extract.annotate.endpoints.answers import AnswerCache
from extract.annotate.endpoints.questions import Question

QUESTIONS_PER_CLIP = 4
EMPTY = "(the model wrote nothing)"
"""What the judge reads in place of an empty description."""
NO_WORDS = "none"
_SIZES = {100: "v1", 332: "v2"}
"""Clips of the two releases of EMER."""


@dataclass
class _Ratings:
    """What was read so far."""

    reasons: Counter[str] = field(default_factory=Counter)
    unread: list[Unread] = field(default_factory=list)

    def text(self, said: Said, clip: str, repeat: int, role: Role) -> str | None:
        """Return an answer's text, or note why there is none."""
        if said.text is None:
            self._note(said.unread(clip, repeat, role))
        return said.text

    def rating(self, said: Said, clip: str, repeat: int, prompt: JudgePrompt) -> float | None:
        """Return an answer's rating, or note why there is none."""
        text = self.text(said, clip, repeat, prompt.role)
        if text is None:
            return None
        found = rating_of(text, prompt.file.field or "")
        if found.value is None:
            self._note(said.unread(clip, repeat, prompt.role, found.how))
            return None
        if found.how == "first":
            self.reasons["rating without its field, first number taken"] += 1
        if found.value < LOWEST:
            self.reasons["rating below 1"] += 1
        return found.value

    def _note(self, unread: Unread) -> None:
        self.unread.append(unread)
        self.reasons[f"{unread.role}: {unread.reason}"] += 1


def judge_emer(
    predictions: Path,
    references: Path,
    options: JudgeOptions,
    *,
    name: str | None = None,
    asked: str | None = None,
    split: str | None = None,
    allow_missing: bool = False,
    on_answers: OnAnswers | None = None,
) -> EmerScore:
    """Rate the descriptions of a file.

    Args:
        predictions: See `read_replies`.
        references: See `read_references`.
        options: Who judges, and how.
        name: Whose descriptions; None: the run, or the file's name.
        asked: Of a predictions file with several tasks, the one to judge.
        split: Of a manifest, the records to take.
        allow_missing: Leave out and count references without a prediction.
        on_answers: Called with the number of questions that were answered since.

    Raises:
        PredictionError: The files do not fit each other; see `pair`.
        EndpointError: The judge cannot be asked; what it answered is kept.
        BudgetError: The cap is reached; likewise.
    """
    replies = read_replies(predictions, asked)
    paired = pair(
        read_references(references, split), replies, "reference", allow_missing=allow_missing
    )
    prompts = judge_prompts(options.prompts, EMER_ROLES)
    ratings = _Ratings(Counter(paired.reasons))
    ratings.reasons["empty reply"] += sum(not r.text.strip() for _, r in paired.pairs)
    with Panel(options.endpoint, AnswerCache(options.answers), options.retry, on_answers) as panel:
        clips = _judge(paired, prompts, options, panel, ratings)
        judge = Judge(
            model=options.model,
            versions=panel.versions(options.model),
            prompts=tuple(sorted(prompt.id for prompt in prompts.values())),
            temperature=options.temperature,
        )
    return EmerScore(
        name=name or replies.run or predictions.stem,
        judge=judge,
        repeats=options.repeats,
        clue=repeated([clip.clue for clip in clips], options.repeats),
        label=repeated([clip.label for clip in clips], options.repeats),
        offered=paired.offered,
        reasons={reason: n for reason, n in ratings.reasons.items() if n},
        unread=tuple(ratings.unread),
        clips=tuple(clips),
        notes=_notes(judge, paired, ratings),
        run=replies.run,
        file=replies.file,
        references=stamp(references),
    )


def n_questions(n_clips: int, repeats: int) -> int:
    """Return how many questions a judging asks, those answered before included."""
    return QUESTIONS_PER_CLIP * n_clips * repeats


def _judge(
    paired: Paired[Reference],
    prompts: dict[Role, JudgePrompt],
    options: JudgeOptions,
    panel: Panel,
    ratings: _Ratings,
) -> list[EmerClip]:
    said = panel.ask(_first_questions(paired, prompts, options))
    words: dict[tuple[str, int, str], str | None] = {}
    for reference, _ in paired.pairs:
        for r in range(options.repeats):
            for side in ("true", "words"):
                key = (reference.id, r, side)
                text = ratings.text(said[key].whole(), reference.id, r, "emer-words")
                words[key] = None if text is None else words_of(text) or NO_WORDS
    told = panel.ask(_label_questions(paired, prompts["emer-label"], options, words))
    clips = []
    for reference, _ in paired.pairs:
        own, rounds = reference.id, range(options.repeats)
        clips.append(
            EmerClip(
                id=own,
                clue=tuple(
                    ratings.rating(said[own, r, "clue"], own, r, prompts["emer-clue"])
                    for r in rounds
                ),
                label=tuple(
                    ratings.rating(told[own, r], own, r, prompts["emer-label"])
                    if (own, r) in told
                    else None
                    for r in rounds
                ),
                true_words=tuple(words[own, r, "true"] for r in rounds),
                words=tuple(words[own, r, "words"] for r in rounds),
            )
        )
    return clips


def _first_questions(
    paired: Paired[Reference], prompts: dict[Role, JudgePrompt], options: JudgeOptions
) -> Iterator[Question]:
    for reference, reply in paired.pairs:
        description = without_tags(reply.text) or EMPTY
        for r in range(options.repeats):
            asks: tuple[tuple[str, Role, dict[str, Slot]], ...] = (
                ("clue", "emer-clue", {"reference": reference.text, "description": description}),
                ("true", "emer-words", {"description": reference.text}),
                ("words", "emer-words", {"description": description}),
            )
            for side, role, slots in asks:
                yield prompts[role].question(
                    options.model,
                    slots,
                    temperature=options.temperature,
                    seed=r,
                    tag=(reference.id, r, side),
                )


def _label_questions(
    paired: Paired[Reference],
    prompt: JudgePrompt,
    options: JudgeOptions,
    words: dict[tuple[str, int, str], str | None],
) -> Iterator[Question]:
    for reference, _ in paired.pairs:
        for r in range(options.repeats):
            true_words = words[reference.id, r, "true"]
            own_words = words[reference.id, r, "words"]
            if true_words is None or own_words is None:
                continue  # noted where the words were read
            yield prompt.question(
                options.model,
                {"true_words": true_words, "words": own_words},
                temperature=options.temperature,
                seed=r,
                tag=(reference.id, r),
            )


def _notes(judge: Judge, paired: Paired[Reference], ratings: _Ratings) -> tuple[str, ...]:
    n = paired.offered
    release = _SIZES.get(n)
    found = [
        "Ratings compare within one judge, version and wording only.",
        f"EMER was released with 100 and with 332 clips; here are {n}"
        + (f", as many as in {release}." if release else "."),
    ]
    return (*found, *common_notes(judge, paired.reasons, ratings.unread))


def common_notes(judge: Judge, reasons: dict[str, int], unread: Sequence[Unread]) -> Iterator[str]:
    """Yield what must be said of any judging."""
    if (problem := judge.problem()) is not None:
        yield f"Not fit for a table: {problem}."
    if not judge.versions:
        yield f"The server did not say which version of '{judge.model}' answered."
    if n_missing := reasons.get("no prediction"):
        yield f"{n_missing} clips without a prediction are left out of all means."
    if unread:
        names = ", ".join(sorted({one.id for one in unread})[:5])
        yield f"{len(unread)} answers gave no number, of clips such as {names}; means leave them out."
