"""MME-Emotion: replies taken apart into steps, each step marked by a judge, three scores of the marks.

A step agent writes a reply as numbered steps, of which the last is the label. The judge sees pictures of
the clip, a text about the voice, the truth and the steps, and marks each. Of marks s1 ... sM,
recognition is sM, reasoning the mean of the others (0 without any), and the chain-of-thought score
weighs both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cache.errors import PredictionError
from eval.judging.emer import EMPTY, common_notes
from eval.judging.frames import MOST, FrameReader, Frames
from eval.judging.numbers import mean, repeated
from eval.judging.panel import JudgeOptions, OnAnswers, Panel, Said
from eval.judging.prompts import MME_ROLES, JudgePrompt, Role, Slot, judge_prompts
from eval.judging.replies import marks_of, steps_of, without_tags
from eval.judging.results import Judge, MmeSample, MmeScore, MmeTask, Unread
from eval.judging.sources import Paired, Reply, Sample, pair, read_replies, read_samples, stamp
from eval.judging.tasks import MME_TASKS
from extract.annotate.endpoints.answers import AnswerCache
from extract.annotate.endpoints.questions import Question
from extract.annotate.endpoints.transport import EndpointOptions

ALPHA = 0.5
"""Weight of recognition in the chain-of-thought score."""
OUR_TOKENS = "tokens of the run's tokenizer"
WORDS = "words between blanks"


def recognition(marks: Sequence[float]) -> float:
    """Return the mark of the last step, the label."""
    return marks[-1]


def reasoning(marks: Sequence[float]) -> float:
    """Return the mean mark of all steps but the last; 0 if there is only this."""
    before = marks[:-1]
    return sum(before) / len(before) if before else 0.0


def chain_of_thought(marks: Sequence[float], alpha: float = ALPHA) -> float:
    """Return alpha recognition + (1 - alpha) reasoning."""
    return alpha * recognition(marks) + (1 - alpha) * reasoning(marks)


@dataclass
class _Marked:
    """One sample on its way."""

    sample: Sample
    reply: Reply
    steps: tuple[str, ...] = ()
    n_frames: int = 0
    picture_problem: str = ""
    marks: list[tuple[float, ...] | None] = field(default_factory=list)
    """By repeat, by the loose rule of the overall figure."""
    own: list[tuple[float, ...] | None] = field(default_factory=list)
    """By repeat, by the rule of the sample's task."""


def judge_mme(
    predictions: Path,
    samples: Path,
    options: JudgeOptions,
    *,
    step_model: str,
    step_endpoint: EndpointOptions | None = None,
    name: str | None = None,
    asked: str | None = None,
    task: str | None = None,
    split: str | None = None,
    media_root: Path | None = None,
    frames: int = MOST,
    alpha: float = ALPHA,
    allow_missing: bool = False,
    n_decoders: int = 1,
    on_answers: OnAnswers | None = None,
) -> MmeScore:
    """Score the replies of a file.

    The step agent is asked once per reply, the judge as often as `options.repeats` says.

    Args:
        predictions: See `read_replies`.
        samples: See `read_samples`, as for `task`, `split` and `media_root`.
        options: Who judges, and how.
        step_model: Name of the step agent's model.
        step_endpoint: Where it is; None: where the judge is.
        name: Whose replies; None: the run, or the file's name.
        asked: Of a predictions file with several tasks, the one to judge.
        task: Of samples that name none.
        split: Of a manifest, the records to take.
        media_root: Folder of the media.
        frames: Most pictures of a clip that the judge sees; 0: none.
        alpha: Weight of recognition.
        allow_missing: Leave out and count samples without a prediction.
        n_decoders: Processes that decode media.
        on_answers: Called with the number of questions that were answered since.

    Raises:
        PredictionError: The files do not fit each other, or media are missing.
        EndpointError: A model cannot be asked; what was answered is kept.
        BudgetError: The cap is reached; likewise.
    """
    replies = read_replies(predictions, asked)
    wanted = read_samples(samples, task=task, media_root=media_root, split=split)
    paired = pair(wanted, replies, "sample", allow_missing=allow_missing)
    prompts = judge_prompts(options.prompts, MME_ROLES)
    if frames:
        _check_media(paired)
    reasons: Counter[str] = Counter(paired.reasons)
    reasons["empty reply"] += sum(not reply.text.strip() for _, reply in paired.pairs)
    unread: list[Unread] = []
    marked = [_Marked(sample, reply) for sample, reply in paired.pairs]
    sees = frames if any(one.sample.media is not None for one in marked) else 0
    answers = AnswerCache(options.answers)
    with ExitStack() as open_until_done:
        judge_panel = agent = open_until_done.enter_context(
            Panel(step_endpoint or options.endpoint, answers, options.retry, on_answers)
        )
        _take_apart(marked, prompts["mme-steps"], step_model, options, agent, unread)
        if step_endpoint is not None:
            left = options.endpoint.model_copy(update={"caps": agent.left(options.endpoint.caps)})
            judge_panel = open_until_done.enter_context(
                Panel(left, answers, options.retry, on_answers)
            )
        pictures = FrameReader(sees, n_decoders) if sees else None
        if pictures is not None:
            open_until_done.enter_context(pictures)
        said = judge_panel.ask(_questions(marked, prompts, options, pictures, reasons))
        _mark(marked, said, options.repeats, reasons, unread)
        judge = Judge(
            model=options.model,
            versions=judge_panel.versions(options.model),
            prompts=tuple(sorted(prompt.id for prompt in prompts.values())),
            temperature=options.temperature,
            step_model=step_model,
            step_versions=agent.versions(step_model),
            frames=sees,
        )
    reasons.update(f"{one.role}: {one.reason}" for one in unread)
    return _score(
        marked,
        judge,
        paired,
        alpha=alpha,
        repeats=options.repeats,
        name=name or replies.run or predictions.stem,
        reasons={reason: n for reason, n in reasons.items() if n},
        unread=tuple(unread),
        run=replies.run,
        file=replies.file,
        references=stamp(samples),
    )


def _check_media(paired: Paired[Sample]) -> None:
    named = [sample for sample, _ in paired.pairs if sample.media is not None]
    gone = [sample for sample in named if sample.media is not None and not sample.media.is_file()]
    if gone:
        raise PredictionError(
            f"{len(gone)} of {len(named)} media files are not there, first '{gone[0].media}' of "
            f"{gone[0].id}. Give their folder with --media-root, or --frames 0 for a judge that sees no "
            "pictures, which the result then tells."
        )


def _take_apart(
    marked: Sequence[_Marked],
    prompt: JudgePrompt,
    model: str,
    options: JudgeOptions,
    agent: Panel,
    unread: list[Unread],
) -> None:
    """Ask the step agent for the steps of each reply."""
    said = agent.ask(
        prompt.question(
            model,
            {"reply": without_tags(one.reply.text) or EMPTY},
            temperature=options.temperature,
            tag=one.sample.id,
        )
        for one in marked
    )
    for one in marked:
        found = said[one.sample.id].whole()
        one.steps = () if found.text is None else steps_of(found.text)
        if not one.steps:
            unread.append(found.unread(one.sample.id, 0, prompt.role, found.reason or "no step"))


def _questions(
    marked: Iterable[_Marked],
    prompts: dict[Role, JudgePrompt],
    options: JudgeOptions,
    pictures: FrameReader | None,
    reasons: Counter[str],
) -> Iterator[Question]:
    todo = [one for one in marked if one.steps]
    for one, seen in zip(todo, _frames(todo, pictures), strict=True):
        one.n_frames, one.picture_problem = len(seen.parts), seen.problem
        reasons["no picture for the judge"] += bool(seen.problem)
        sample = one.sample
        slots: dict[str, Slot] = {
            "what": sample.kind.what,
            "clue": sample.clue,
            "n_frames": len(seen.parts),
            "steps": one.steps,
        }
        slots |= {"truths": sample.truths} if sample.kind.several else {"truth": sample.truths[0]}
        for r in range(options.repeats):
            yield prompts[sample.kind.prompt].question(
                options.model,
                slots,
                seen.parts,
                temperature=options.temperature,
                seed=r,
                tag=(sample.id, r),
            )


def _frames(todo: Sequence[_Marked], pictures: FrameReader | None) -> Iterator[Frames]:
    """Yield the pictures of each sample; none of one without media."""
    if pictures is None:
        yield from (Frames(()) for _ in todo)
        return
    read = pictures.read(one.sample.media for one in todo if one.sample.media is not None)
    for one in todo:
        yield Frames((), "none named") if one.sample.media is None else next(read)


def _mark(
    marked: Sequence[_Marked],
    said: dict[object, Said],
    repeats: int,
    reasons: Counter[str],
    unread: list[Unread],
) -> None:
    """Read the judge's marks, once by the overall rule and once by the task's."""
    for one in marked:
        kind = one.sample.kind
        for r in range(repeats):
            answer = said.get((one.sample.id, r))
            text = None if answer is None else answer.text
            loose = marks_of(text or "", plain=False)
            own = loose if kind.several else marks_of(text or "", plain=True)
            one.marks.append(loose or None)
            one.own.append(own or None)
            if answer is not None and not loose:
                why = answer.reason or "no mark"
                unread.append(answer.unread(one.sample.id, r, kind.prompt, why))
            elif len(own) < len(loose):
                reasons["marks not in the form of their task, read in the overall figure only"] += 1
            if loose and len(loose) != len(one.steps):
                reasons["more or fewer marks than steps"] += 1
    reasons["not scored: no readable mark"] += sum(not any(one.marks) for one in marked)


def _score(
    marked: Sequence[_Marked],
    judge: Judge,
    paired: Paired[Sample],
    *,
    alpha: float,
    repeats: int,
    name: str,
    reasons: dict[str, int],
    unread: tuple[Unread, ...],
    run: str | None,
    file: str,
    references: str,
) -> MmeScore:
    unit, n_tokens = _lengths([one.reply for one in marked])
    rows = [one.marks for one in marked]
    return MmeScore(
        name=name,
        judge=judge,
        repeats=repeats,
        rec=repeated([[_of(recognition, m) for m in row] for row in rows], repeats),
        rea=repeated([[_of(reasoning, m) for m in row] for row in rows], repeats),
        cot=repeated(
            [[None if m is None else chain_of_thought(m, alpha) for m in row] for row in rows],
            repeats,
        ),
        alpha=alpha,
        steps=_mean_steps(rows),
        tokens=mean(n_tokens),
        token_unit=unit,
        offered=paired.offered,
        tasks=_tasks(marked, paired.missing, alpha, repeats),
        reasons=reasons,
        unread=unread,
        samples=tuple(
            MmeSample(
                id=one.sample.id,
                task=one.sample.kind.id,
                truth=one.sample.truths,
                steps=one.steps,
                marks=tuple(one.marks),
                n_tokens=n,
                n_frames=one.n_frames,
                picture_problem=one.picture_problem,
            )
            for one, n in zip(marked, n_tokens, strict=True)
        ),
        notes=_notes(judge, paired, unread, unit),
        run=run,
        file=file,
        references=references,
    )


def _tasks(
    marked: Sequence[_Marked], missing: Sequence[Sample], alpha: float, repeats: int
) -> dict[str, MmeTask]:
    found = {}
    for kind in MME_TASKS.values():
        of_task = [one for one in marked if one.sample.kind is kind]
        n_missing = sum(sample.kind is kind for sample in missing)
        if not of_task and not n_missing:
            continue
        rows = [one.own for one in of_task]
        rec = repeated([[_of(recognition, m) for m in row] for row in rows], repeats)
        rea = repeated([[_of(reasoning, m) for m in row] for row in rows], repeats)
        both = rec.mean is not None and rea.mean is not None
        found[kind.id] = MmeTask(
            offered=len(of_task) + n_missing,
            scored=rec.n,
            rec=rec.mean,
            rea=rea.mean,
            cot=alpha * (rec.mean or 0) + (1 - alpha) * (rea.mean or 0) if both else None,
            steps=_mean_steps(rows),
        )
    return found


def _of(score: Callable[[Sequence[float]], float], marks: tuple[float, ...] | None) -> float | None:
    return None if marks is None else score(marks)


def _mean_steps(rows: Iterable[Sequence[tuple[float, ...] | None]]) -> float | None:
    """Return the mean number of marked steps, over samples of the mean over repeats."""
    return mean(mean(None if m is None else float(len(m)) for m in row) for row in rows)


def _lengths(replies: Sequence[Reply]) -> tuple[str, list[int]]:
    """Return a unit of length that all replies have, and their lengths."""
    counted = [reply.n_tokens for reply in replies if reply.n_tokens is not None]
    if len(counted) == len(replies):
        return OUR_TOKENS, counted
    return WORDS, [len(reply.text.split()) for reply in replies]


def _notes(
    judge: Judge, paired: Paired[Sample], unread: Sequence[Unread], unit: str
) -> tuple[str, ...]:
    found = [
        "Scores compare within one judge, step agent, version and wording only.",
        "The overall figure pools all samples; it is no mean of the tasks.",
        f"Length is counted in {unit}; the published tokenizer is not told.",
    ]
    if not judge.frames:
        found.append("The judge saw no pictures; the published one sees up to ten of each clip.")
    return (*found, *common_notes(judge, paired.reasons, unread))


def n_questions(n_samples: int, repeats: int) -> int:
    """Return how many questions a judging asks, those answered before included."""
    return n_samples * (1 + repeats)
