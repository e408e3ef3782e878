"""From replies to what a report says: scores with their intervals, slices, calibration, examples, facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cache.clip import Record, media_path
from cache.commit import Status
from cache.errors import ManifestError, MissingDependencyError
from cache.labels import LabelField, LabelSpace
from cache.store import TokenStore
from eval.generate import TrainedRun
from eval.metrics import (
    MultiLabelScores,
    SingleLabelScores,
    score_multi_label,
    score_single_label,
)
from eval.parse import LabelReading
from eval.predictions import Prediction
from eval.report.data import Fact, LabelLikelihoods, OffListReply, Parsing, ScoreRow, StoreRow
from eval.results.examples import (
    ExampleBrowser,
    card_of,
    make_browser,
    outcome_of_prediction,
    truths_of,
)
from eval.results.pictures import ClipFile
from eval.scoring.calibration import Calibration, calibration
from eval.scoring.intervals import N_SAMPLES, N_SWAPS, Interval, interval, paired
from eval.scoring.rules import accuracy, uar, weighted_f1
from eval.scoring.slices import EDGES_S, Slice, quantile_edges, slices
from eval.scoring.tally import Tally
from train.batches.reading import ViewReader
from train.checkpoint import best_folder
from train.data import Renderer
from train.mixture import Ask
from train.text.instructions import load_instructions
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, Task, check_task

LEVEL = 0.95
"""Of every interval."""
_READ: Mapping[LabelReading, str] = {
    "label": "A reply is reduced to the content of its answer tag, if it has one, and without quotes, "
    "closing punctuation and case it must equal a label or one of its aliases.",
    "last-word": "The last word of a reply is compared with the labels as it stands; where it is none of "
    "them, the reply counts as neutral, as Emotion-LLaMA's scorer has it.",
}


@dataclass(frozen=True)
class Group:
    """Records that are scored together: their prompts listed the labels of one space."""

    space: LabelSpace
    name: str
    """Their corpora."""
    uids: frozenset[str]


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its replies and what they come to."""

    group: Group
    replies: Mapping[str, Sequence[Prediction]]
    """Condition -> the replies, in the order of the records; the first is without masks."""
    rows: tuple[ScoreRow, ...]
    """One per condition."""
    likelihoods: tuple[LabelLikelihoods, ...]
    parsing: Parsing

    @property
    def first(self) -> Sequence[Prediction]:
        """The replies without masks."""
        return next(iter(self.replies.values()))


def score_group(
    replies: Mapping[str, Sequence[Prediction]], group: Group, field: LabelField, *, several: bool
) -> ScoredGroup:
    """Score a group's replies under each condition.

    Args:
        replies: Condition -> replies about all records, of this group and of others.
        group: Whose replies are scored.
        field: Which label was asked for.
        several: There are other groups, so that the names of conditions start with the group's.
    """
    own = {
        f"{group.name}: {name}" if several else name: [p for p in found if p.uid in group.uids]
        for name, found in replies.items()
    }
    first = next(iter(own.values()))
    base = _right(first)
    rows = []
    for name, found in own.items():
        tally = base if found is first else _right(found)
        rows.append(
            ScoreRow(
                name=name,
                scores=_score(found, group.space, field),
                intervals=_intervals(found, tally, field),
                change=None if found is first else paired(base, tally, level=LEVEL),
                calibration=_calibration(found),
                slices=_slices(found, tally),
            )
        )
    return ScoredGroup(group, own, tuple(rows), _likelihoods(own, group.space), _parsing(own))


def _score(
    predictions: Sequence[Prediction], space: LabelSpace, field: LabelField
) -> SingleLabelScores | MultiLabelScores:
    parses = [p.parse for p in predictions]
    if field in SEVERAL_LABELS:
        return score_multi_label(
            [p.truths for p in predictions],
            [p.labels for p in predictions],
            space.labels,
            parses,
            [p.unread for p in predictions],
        )
    return score_single_label(
        [p.truth for p in predictions], [p.label for p in predictions], space.labels, parses
    )


def _right(predictions: Sequence[Prediction]) -> Tally:
    """Return the accuracy as a tally; of several labels, of exact sets."""
    right = [outcome_of_prediction(p) == "right" for p in predictions]
    return accuracy(["right"] * len(right), ["right" if is_right else None for is_right in right])


def _intervals(
    predictions: Sequence[Prediction], tally: Tally, field: LabelField
) -> dict[str, Interval]:
    """Return the intervals of accuracy and, for single labels, of weighted F1 and UAR."""
    exact = _exact_interval(tally)
    if exact is not None:  # no sample differs: what was never wrong cannot be resampled
        return {"accuracy": exact}
    found = {"accuracy": interval(tally, level=LEVEL)}
    if field not in SEVERAL_LABELS:
        truths, labels = [p.truth for p in predictions], [p.label for p in predictions]
        for name, other in (("weighted_f1", weighted_f1), ("uar", uar)):
            sampled = interval(other(truths, labels), level=LEVEL)
            if sampled.low < sampled.high:  # else no sample differs, which says nothing
                found[name] = sampled
    return found


def _exact_interval(tally: Tally) -> Interval | None:
    """Return the binomial interval (Clopper and Pearson) where all clips are right, or all wrong."""
    n = int(tally.scored.sum())
    n_right = round(tally.total * n)
    return _binomial_interval(n_right, n) if n_right in (0, n) else None


def _binomial_interval(n_right: int, n: int) -> Interval:
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise MissingDependencyError(
            "Confidence intervals need scipy: pip install 'emocache[eval]'"
        ) from error
    low, high = binomtest(n_right, n).proportion_ci(LEVEL)
    return Interval(low=float(low), high=float(high), level=LEVEL, n=0)


def _calibration(predictions: Sequence[Prediction]) -> Calibration | None:
    if any(p.likelihoods is not None and p.truth is not None for p in predictions):
        return calibration(predictions)
    return None


def _slices(predictions: Sequence[Prediction], tally: Tally) -> dict[str, tuple[Slice, ...]]:
    """Return the accuracy of parts of the clips; durations by quarters where fixed borders part nothing."""
    # By what the clip lacks, not by what a condition masks: that is the same for all of its clips.
    clips = [p.model_copy(update={"masked": ()}) for p in predictions]
    found = slices(tally, clips, edges_s=EDGES_S, level=LEVEL)
    if "duration" not in found:
        found |= slices(tally, clips, by=("duration",), edges_s=quantile_edges(clips), level=LEVEL)
    exact = {
        str(division): tuple(_with_exact_interval(part) for part in parts)
        for division, parts in found.items()
    }
    return exact


def _with_exact_interval(part: Slice) -> Slice:
    """Give a slice that is all right or all wrong the binomial interval."""
    if part.score not in (0.0, 1.0):
        return part
    return part.model_copy(
        update={"interval": _binomial_interval(round(part.score * part.n), part.n)}
    )


def _likelihoods(
    replies: Mapping[str, Sequence[Prediction]], space: LabelSpace
) -> tuple[LabelLikelihoods, ...]:
    """Return mean likelihoods by true label; nothing where they were not computed for all."""
    if any(p.likelihoods is None or p.truth is None for found in replies.values() for p in found):
        return ()
    panels = []
    for truth in space.labels:
        means: dict[str, dict[str, float]] = {}
        n = 0
        for name, found in replies.items():
            given = [p.likelihoods for p in found if p.truth == truth and p.likelihoods is not None]
            n = len(given)
            if n:
                shares = {x: float(np.mean([g.get(x, 0.0) for g in given])) for x in given[0]}
                means[name] = shares
        if n:
            panels.append(LabelLikelihoods(truth=truth, n=n, means=means))
    return tuple(panels)


def _parsing(replies: Mapping[str, Sequence[Prediction]]) -> Parsing:
    everything = [p for found in replies.values() for p in found]
    bad = [p for p in everything if p.parse == "off_list"]
    return Parsing(
        counts=dict(Counter(p.parse for p in everything)),
        conditions={name: dict(Counter(p.parse for p in found)) for name, found in replies.items()},
        examples=tuple(
            OffListReply(uid=p.uid, truth=", ".join(truths_of(p)) or None, reply=p.reply)
            for p in bad[:5]
        ),
    )


def explaining_task(task: str, trained: TrainedRun) -> Task | None:
    """Return the task by which a run explains the label of another one.

    It is the one that asks for reasoning and then for the same label; where a run's instructions lack it,
    as the predecessor's do, it is `reason`. None: the task itself explains, or the run cannot.

    Raises:
        SchemaError: Damaged instructions.
    """
    row = TASK_TABLE[check_task(task)]
    if row.joint:
        return None
    pools = load_instructions(trained.preset.prompt.instructions)
    joint = [t for t, r in TASK_TABLE.items() if r.joint and r.label == row.label]
    return next((t for t in (*joint, check_task("reason")) if pools.has(t)), None)


def examples_of(
    found: ScoredGroup,
    shown: Sequence[Prediction],
    reasons: Sequence[Prediction],
    records: Mapping[str, Record],
    media: Path | None,
) -> ExampleBrowser:
    """Return the chosen clips, each with its replies under all conditions.

    Args:
        found: The group that they are of.
        shown: The chosen ones of its first replies.
        reasons: Further replies, with reasoning.
        records: Of all clips, by uid.
        media: The media root; None: no pictures.
    """
    others: dict[str, list[Prediction]] = {p.uid: [] for p in shown}
    further = [p for replies in list(found.replies.values())[1:] for p in replies]
    for reply in (*reasons, *further):
        if reply.uid in others:
            others[reply.uid].append(reply)
    files: dict[str, ClipFile] = {}
    notes = []
    if reasons:
        joint = TASK_TABLE[check_task(reasons[0].task)].joint
        asks = "reasoning before the label" if joint else "reasoning alone"
        notes.append(f"The task {reasons[0].task} asks for {asks}.")
    if any(p.masked for p in reasons):
        notes.append(
            "Reasoning under a mask was written without the masked stream: what it says of that stream is "
            "made up."
        )
    for uid in others:
        if media is None:
            break
        try:
            path = media_path(media, records[uid])
        except (
            ManifestError
        ):  # a link that leads out of the root: said below, as of any missing file
            continue
        if path.is_file():
            clip = records[uid].clip
            files[uid] = ClipFile(path, records[uid].media, None if clip is None else clip.sha256)
    if media is not None and len(files) < len(others):
        notes.append(f"{len(others) - len(files)} of them have no media file below the media root.")
    return make_browser(
        [card_of(p, others[p.uid]) for p in shown],
        Counter(outcome_of_prediction(p) for p in found.first),
        files=files,
        notes=notes,
    )


def prompt_of(trained: TrainedRun, record: Record, task: str) -> str:
    """Return what the model is asked about a record, with a placeholder for the clip's tokens."""
    renderer = Renderer(trained.preset, trained.tokenizer, trained.header)
    prompt = renderer.wording.render(
        record,
        Ask(check_task(task), 0),
        with_answer=False,
        vary=False,
        asking=True,
        turns=renderer.turns,
    )
    return prompt.shown(trained.preset.layout(), "up to {} tokens")


def method_of(
    trained: TrainedRun, found: ScoredGroup, max_new_tokens: int, reading: LabelReading = "label"
) -> tuple[str, ...]:
    """Return how the replies came about and how they are scored, a paragraph each."""
    read = _READ[reading]
    said = [
        "Each clip is asked about once under each condition, with all labels offered in the order of the "
        f"label space; tokens of a masked stream are left out. Replies are decoded greedily, up to "
        f"{max_new_tokens} tokens. {read}"
    ]
    exact = any(i.n == 0 for row in found.rows for i in row.intervals.values())
    said.append(
        f"Intervals are of {100 * LEVEL:g} %, by the percentile bootstrap over clips with {N_SAMPLES:,} "
        "samples"
        + ("; where all clips are right or all wrong, the exact binomial one" if exact else "")
        + ". They are about other clips of the same kind, not about other trainings of the model."
    )
    if len(found.rows) > 1:
        said.append(
            "A change of accuracy is tested by swapping at random, clip by clip, the replies under both "
            f"conditions ({N_SWAPS:,} times, two-sided); p values are not corrected for their number."
        )
    if found.likelihoods or any(row.calibration for row in found.rows):
        said.append(
            "The likelihood of a label is the probability that the model gives its tokens and the end of "
            "the reply behind the same prompt, divided by the sum over all offered labels."
        )
    return tuple(said)


def notes_of(found: ScoredGroup, n_left_out: int, split: str) -> tuple[str, ...]:
    """Return what a reader must know to judge the numbers."""
    notes = [
        f"{len(found.group.uids)} records of split {split!r} are scored under every condition."
    ]
    if n_left_out:
        notes.append(
            f"{n_left_out} records of the split are left out: no label, or no tokens by the choice "
            "of data.absent and data.failed."
        )
    return tuple(notes)


def weights_of(run: Path, trained: TrainedRun, weights: Literal["final", "best"]) -> str:
    """Say which weights were scored; the step counts within the stage, as the folder's name does."""
    stage = trained.info.finished[-1]
    if weights == "final":
        return f"final, at the end of {stage}"
    folder = best_folder(run / stage)
    assert folder is not None  # they were loaded
    metric = trained.preset.execution.best_metric.replace("_", " ")
    return f"best validation {metric}: {stage}/{folder.name}"


def throughput_of(trained: TrainedRun, clips_per_s: float) -> tuple[Fact, ...]:
    """Return speeds and durations, of generation and of each stage of the training."""
    facts = [Fact(name="generation", value=clips_per_s, unit="replies/s")]
    for stage in trained.preset.stages:
        seconds = trained.info.seconds.get(stage.name)
        if seconds:
            n = stage.n_steps * stage.optim.batch_size * stage.optim.accumulate
            if stage.optim.max_tokens is None:  # else as many clips as fit
                facts.append(
                    Fact(name=f"training, {stage.name}", value=n / seconds, unit="clips/s")
                )
            facts.append(Fact(name=f"duration, {stage.name}", value=seconds, unit="s"))
    return tuple(facts)


def store_rows(store: TokenStore, reader: ViewReader) -> tuple[StoreRow, ...]:
    """Return what the store holds of the specs that the run reads."""
    rows = []
    for name, spec in reader.specs.items():
        index = store.index(spec)
        counts = index.counts()
        rows.append(
            StoreRow(
                stream=name,
                spec_id=spec.spec_id,
                n_ok=counts[Status.OK],
                n_absent=counts[Status.ABSENT],
                n_failed=counts[Status.FAILED],
                size_bytes=index.n_bytes,
            )
        )
    return tuple(rows)


def provenance_of(trained: TrainedRun, reader: ViewReader, pool_id: str) -> dict[str, str]:
    """Return versions, seeds and digests."""
    return {
        "run": trained.info.run_id,
        "seed": str(trained.preset.seed),
        "instructions": pool_id,
        "language model": trained.preset.model.llm.path,
        "trained parameters": f"{sum(trained.info.trainable.values()):,}",
        **{f"{name} spec": spec.spec_id for name, spec in reader.specs.items()},
        **{
            f"{name} view": getattr(trained.preset.views, name).definition(spec)
            for name, spec in reader.specs.items()
        },
        **trained.info.versions,
    }
