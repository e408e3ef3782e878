"""The numbers of an annotation: what it will cost, how far it is, and what it did cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from cache.clip import Record
from cache.commit import Status
from cache.schema import Model
from extract.annotate.endpoints.costs import Assumptions, RoleEstimate, RoleWork, estimate
from extract.annotate.job import AnnotationPlan
from extract.annotate.presets import Preset, Role
from extract.annotate.results import Results, Step, kind_of_step
from extract.annotate.wording import Wordings

STEP_OF: dict[Role, Step] = {
    "visual_objective": "visual_objective",
    "audio_tone": "audio_tone",
    "consolidate": "multimodal",
}
_ENOUGH = 20
"""Answers of a role from which their mean is better than an assumption."""
CLUE_BYTES = 480.0
"""Assumed length of a clue in a prompt: 120 tokens."""
ANSWER_TOKENS: dict[Role, float] = {
    "visual_objective": 110.0,
    "audio_tone": 60.0,
    "consolidate": 140.0,
}
"""Assumed length of an answer."""
SOUND_S = 5.0
"""Assumed length of a clip whose container does not tell."""
OPENFACE_S_PER_FRAME = 0.05
"""Assumed time of OpenFace for a frame on one core."""
FRAMES_PER_S = 25.0


class AnnotationEstimate(Model):
    """What is left to do, and what it will take."""

    n_records: int
    """Of the manifest."""
    n_todo: int
    left_out: dict[str, int]
    """Why records are not annotated -> how many."""
    roles: tuple[RoleEstimate, ...]
    measured: dict[str, int]
    """Role -> answers at hand whose mean length took the place of an assumption."""
    requests: int
    tokens_in: int
    tokens_out: int
    hours: float
    """Roles are asked side by side: that of the slowest."""
    cost: float | None
    """None unless every role with requests has a price."""
    detector_core_hours: float | None
    """Of OpenFace, all cores together; None where it does not run."""
    assumptions: Assumptions
    answer_tokens: dict[str, float]
    clue_bytes: float = CLUE_BYTES


def estimate_annotation(
    records: Sequence[Record],
    plan: AnnotationPlan,
    preset: Preset,
    wordings: Wordings,
    results: Results | None = None,
) -> AnnotationEstimate:
    """Return what a plan will cost.

    Args:
        records: The manifest's.
        plan: What is left to do.
        preset: How.
        wordings: Its prompts.
        results: What is done tells how long prompts and answers are.
    """
    todo = [records[row] for row in plan.todo]
    measured = _measured(results, plan) if results is not None else {}
    estimates: list[RoleEstimate] = []
    for role, options in preset.roles.items():
        work = _work(role, todo, preset, wordings)
        if role in measured:
            _, tokens_in, tokens_out = measured[role]
            bytes_in = (tokens_in - preset.assumptions.template_tokens) * (
                preset.assumptions.bytes_per_token
            )
            work = work.model_copy(
                update={
                    "prompt_bytes": max(0.0, bytes_in),
                    "images": 0.0,
                    "audio_s": 0.0,
                    "answer_tokens": tokens_out,
                }
            )
        assumed = preset.assumptions.model_copy(update={"in_flight": options.in_flight})
        [found] = estimate(
            [work.model_copy(update={"price": options.price})],
            assumed,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
        ).roles
        estimates.append(found)
    costs = [found.cost for found in estimates if found.requests]
    return AnnotationEstimate(
        n_records=len(records),
        n_todo=len(todo),
        left_out=dict(plan.left_out),
        roles=tuple(estimates),
        measured={role: n for role, (n, _, _) in measured.items()},
        requests=sum(found.requests for found in estimates),
        tokens_in=sum(found.tokens_in for found in estimates),
        tokens_out=sum(found.tokens_out for found in estimates),
        hours=max((found.hours for found in estimates), default=0.0),
        cost=None if None in costs else sum(cost for cost in costs if cost is not None),
        detector_core_hours=_detector_hours(todo, preset),
        assumptions=preset.assumptions,
        answer_tokens={
            role: measured[role][2] if role in measured else ANSWER_TOKENS[role]
            for role in preset.roles
        },
    )


def _work(role: Role, todo: Sequence[Record], preset: Preset, wordings: Wordings) -> RoleWork:
    answer_tokens = ANSWER_TOKENS[role]
    if role == "visual_objective":
        seen = [r for r in todo if r.clip is None or r.clip.has_image is not False]
        prompt = wordings.of(role).fixed_bytes
        return RoleWork(
            role=role, n_clips=len(seen), prompt_bytes=prompt, images=1.0,
            answer_tokens=answer_tokens,
        )  # fmt: skip
    if role == "audio_tone":
        heard = [r for r in todo if r.clip is None or r.clip.has_audio is not False]
        return RoleWork(
            role=role,
            n_clips=len(heard),
            prompt_bytes=wordings.of(role).fixed_bytes,
            audio_s=_mean(_sound_s(record, preset) for record in heard),
            answer_tokens=answer_tokens,
        )
    lengths: list[float] = []
    n_clues = 1 + (preset.visual_objective is not None) + (preset.audio_tone is not None)
    for record in todo:
        words = len((record.subtitle() or "").encode())
        targets = [field for field in preset.targets if record.labels_of(field)]
        if not targets and preset.unlabelled != "skip":
            lengths.append(wordings.of(role).fixed_bytes + n_clues * CLUE_BYTES + words)
        for target in targets:
            fixed = wordings.of(role, target).fixed_bytes
            if "draft" in wordings.of(role, target).slots:
                fixed += round(n_clues * CLUE_BYTES) + words
            lengths.append(fixed + n_clues * CLUE_BYTES + words)
    return RoleWork(
        role=role, n_clips=len(lengths), prompt_bytes=_mean(lengths), answer_tokens=answer_tokens
    )


def _sound_s(record: Record, preset: Preset) -> float:
    clip = record.clip
    length_s = SOUND_S if clip is None or clip.duration_s is None else clip.duration_s
    return min(length_s, preset.media.max_sound_s or length_s)


def _detector_hours(todo: Sequence[Record], preset: Preset) -> float | None:
    if preset.detector.kind != "openface":
        return None
    frames = 0.0
    for record in todo:
        clip = record.clip
        if clip is None or (clip.n_frames is None and clip.duration_s is None):
            frames += SOUND_S * FRAMES_PER_S
        else:
            frames += clip.n_frames or (clip.duration_s or 0.0) * FRAMES_PER_S
    return frames * OPENFACE_S_PER_FRAME / 3600


def _measured(results: Results, plan: AnnotationPlan) -> dict[Role, tuple[int, float, float]]:
    """Return role -> answers, mean tokens in and out, of the first some hundred results."""
    rows: dict[Role, list[tuple[int, int]]] = {}
    for key in [key for key in plan.keys.values() if key in results][:500]:
        found = results.get(key)
        if found is None:
            continue
        for role, step in STEP_OF.items():
            rows.setdefault(role, []).extend(
                (s.tokens_in, s.tokens_out)
                for s in found.of(step)
                if s.status is Status.OK and s.requests == 1 and s.tokens_in
            )
    return {
        role: (len(row), _mean(i for i, _ in row), _mean(o for _, o in row))
        for role, row in rows.items()
        if len(row) >= _ENOUGH
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


# ---------------------------------------------------------------------------- afterwards


class RoleCost(Model):
    """What the answers of one role took, whenever they came."""

    role: str
    answers: int = 0
    requests: int = 0
    """That led to these answers, retries and repairs included."""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None without a price."""


class StepNumbers(Model):
    """How one step ended, over all records."""

    step: str
    counts: dict[Status, int]
    failed_by_kind: dict[str, int]
    absent_because: dict[str, int]


class FailedStep(Model):
    """One step of one record that failed."""

    uid: str
    media: str
    step: str
    kind: str
    reason: str


class AnnotationReport(Model):
    """What an annotation gave, and what it took."""

    schema_version: Literal[1] = 1
    preset: str
    settings: str
    """Digest of what decides the texts."""
    prompts: tuple[str, ...]
    models: tuple[str, ...]
    """As the servers named them."""
    n_records: int
    """Of the manifest."""
    n_annotated: int
    """With a result, failed steps or not."""
    n_whole: int
    """Of these, those in which no step failed."""
    n_waiting: int
    """Not annotated yet."""
    left_out: dict[str, int]
    steps: tuple[StepNumbers, ...]
    n_peaks: int
    n_spoken: int
    """Subtitles by speech recognition."""
    pseudo_labels: dict[str, int]
    roles: tuple[RoleCost, ...]
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    usage: dict[str, float] = Field(default_factory=dict)
    """What workers of this job sent, by role and measure; less where answers were there already."""
    failures: tuple[FailedStep, ...] = ()


def report_annotation(
    n_records: int,
    plan: AnnotationPlan,
    preset: Preset,
    settings: str,
    prompt_ids: Sequence[str],
    results: Results,
    usage: dict[str, float] | None = None,
) -> AnnotationReport:
    """Return what the records of a plan have so far."""
    counts: dict[str, Counter[Status]] = {}
    kinds: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    costs = {role: [0, 0, 0, 0] for role in preset.roles}
    models: dict[str, None] = {}
    hints = Counter[str]()
    failures: list[FailedStep] = []
    n_annotated = n_whole = n_peaks = n_spoken = 0
    role_of = {step: role for role, step in STEP_OF.items() if role in preset.roles}
    for key in plan.keys.values():
        result = results.get(key)
        if result is None:
            continue
        n_annotated += 1
        n_whole += not result.failures
        n_peaks += result.peak is not None
        n_spoken += result.spoken is not None
        hints.update(result.pseudo_labels[:1])
        for step in result.steps:
            counts.setdefault(step.label, Counter())[step.status] += 1
            if step.status is Status.ABSENT:
                reasons.setdefault(step.label, Counter())[step.reason or ""] += 1
            if step.status is Status.FAILED:
                kind = kind_of_step(step.reason)
                kinds.setdefault(step.label, Counter())[kind] += 1
                failures.append(
                    FailedStep(
                        uid=result.uid, media=result.media, step=step.label, kind=kind,
                        reason=step.reason or "",
                    )
                )  # fmt: skip
            if step.version:
                models[f"{step.version}"] = None
            if step.requests and step.step in role_of:
                numbers = costs[role_of[step.step]]
                for at, n in enumerate((1, step.requests, step.tokens_in, step.tokens_out)):
                    numbers[at] += n
    roles = tuple(_role_cost(preset, role, numbers) for role, numbers in costs.items())
    paid = [role.cost for role in roles if role.requests]
    return AnnotationReport(
        preset=preset.name,
        settings=settings,
        prompts=tuple(prompt_ids),
        models=tuple(models),
        n_records=n_records,
        n_annotated=n_annotated,
        n_whole=n_whole,
        n_waiting=len(plan.keys) - n_annotated,
        left_out=dict(plan.left_out),
        steps=tuple(
            StepNumbers(
                step=label,
                counts=dict(found),
                failed_by_kind=dict(kinds.get(label, Counter()).most_common()),
                absent_because=dict(reasons.get(label, Counter()).most_common()),
            )
            for label, found in counts.items()
        ),
        n_peaks=n_peaks,
        n_spoken=n_spoken,
        pseudo_labels=dict(hints.most_common()),
        roles=roles,
        requests=sum(role.requests for role in roles),
        tokens_in=sum(role.tokens_in for role in roles),
        tokens_out=sum(role.tokens_out for role in roles),
        cost=None if None in paid else sum(cost for cost in paid if cost is not None),
        usage=usage or {},
        failures=tuple(failures),
    )


def _role_cost(preset: Preset, role: Role, numbers: Sequence[int]) -> RoleCost:
    answers, requests, tokens_in, tokens_out = numbers
    price = preset.roles[role].price
    return RoleCost(
        role=role,
        answers=answers,
        requests=requests,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cost=None if price is None else price.of(tokens_in, tokens_out),
    )


class FailureList(Model):
    """What `emocache annotate failures --json` prints."""

    schema_version: Literal[1] = 1
    failures: tuple[FailedStep, ...]
