"""What judging gives: plain data that is printed, written as JSON and laid out in Tables 5 and 6.

A rating means something beside ratings of the same judge only: another version of a model, or another
wording, gives other numbers. So each result names its judge, and `one_judge` refuses to put two into
one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from cache.errors import EmocacheError, PredictionError
from cache.schema import Model

PUBLISHED_JUDGE = "gpt-4o"
"""Who rated Tables 5 and 6; the paper tells no version for Table 5."""


class MixedJudgesError(EmocacheError, ValueError):
    """Ratings of different judges were to stand in one table."""


class Judge(Model):
    """Who rated, and how it was asked; two results with equal judges may be compared."""

    model: str
    """The name asked for."""
    versions: tuple[str, ...]
    """As the server named the model, sorted; more than one if it changed while it was asked, none if no
    answer named it."""
    prompts: tuple[str, ...]
    """Name and digest of each prompt file, sorted."""
    temperature: float | None
    """None: left to the server."""
    step_model: str | None = None
    """MME-Emotion: the name asked for of the model that breaks replies into steps."""
    step_versions: tuple[str, ...] = ()
    """As its server named it."""
    frames: int = 0
    """Most pictures of a clip that the judge got; 0: it got none."""

    @property
    def version(self) -> str:
        """All versions in one text, for tables."""
        return " + ".join(self.versions) or "version not told"

    def problem(self) -> str | None:
        """Return why not even its own ratings compare; None if they do."""
        for name, versions in ((self.model, self.versions), (self.step_model, self.step_versions)):
            if len(versions) > 1:
                return (
                    f"'{name}' was answered by several versions, {', '.join(versions)}: ask for one of "
                    "them by its full name, with answers of its own"
                )
        return None


class Repeated(Model):
    """A mean over clips, judged one or more times."""

    mean: float | None
    """Mean over rated clips of each clip's mean over its repeats; None if none is rated."""
    by_repeat: tuple[float | None, ...]
    """Mean over the clips that the repeat rated, for each repeat."""
    spread: float | None
    """Standard deviation of `by_repeat` (n - 1); None for fewer than two."""
    standard_error: float | None
    """Of the mean over repeats: spread / sqrt(repeats). It tells of the judge's mood, not of the choice
    of clips."""
    clip_error: float | None
    """Standard error of the mean over clips; None for fewer than two clips."""
    n: int
    """Rated clips: at least one repeat gave a number."""


class Unread(Model):
    """An answer of the judge, or of a model before it, that gave no number."""

    id: str
    repeat: int
    """From 0."""
    role: str
    """Which question."""
    reason: str
    answer: str
    """What was answered, shortened; empty if nothing was."""


class EmerClip(Model):
    """The ratings of one clip; None where an answer held no number."""

    id: str
    clue: tuple[float | None, ...]
    """By repeat."""
    label: tuple[float | None, ...]
    true_words: tuple[str | None, ...]
    """The emotion words of the reference, as the judge condensed it; by repeat."""
    words: tuple[str | None, ...]
    """Of the model's description."""


class EmerScore(Model):
    """Clue overlap and label overlap with reference descriptions, 1 to 10 (Table 5)."""

    kind: Literal["emer"] = "emer"
    name: str
    """Whose descriptions, for tables."""
    judge: Judge
    repeats: int = Field(ge=1)
    clue: Repeated
    label: Repeated
    offered: int
    """References."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Why clips or answers are not rated, and what was special of others -> how many."""
    unread: tuple[Unread, ...] = ()
    """Every answer without a number."""
    clips: tuple[EmerClip, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the numbers."""
    run: str | None = None
    """Id of the run, where the file tells."""
    file: str | None = None
    """Name and digest of the predictions."""
    references: str | None = None
    """Name and digest of the references."""


class MmeTask(Model):
    """The part of one task; its marks are read by the task's own rule."""

    offered: int
    """Samples, those without a prediction included."""
    scored: int
    rec: float | None
    """None if nothing is scored, here and below."""
    rea: float | None
    cot: float | None
    steps: float | None


class MmeSample(Model):
    """The marks of one sample; None where an answer held none."""

    id: str
    task: str
    truth: tuple[str, ...]
    steps: tuple[str, ...]
    """What the step agent made of the reply; empty if it made nothing."""
    marks: tuple[tuple[float, ...] | None, ...]
    """By repeat, as the overall figure reads them."""
    n_tokens: int
    """Length of the reply, in `MmeScore.token_unit`."""
    n_frames: int = 0
    """Pictures that the judge saw."""
    picture_problem: str = ""
    """Why it saw none although it sees others; empty otherwise."""


class MmeScore(Model):
    """Recognition, reasoning and chain-of-thought scores of MME-Emotion, as fractions (Table 6)."""

    kind: Literal["mme-emotion"] = "mme-emotion"
    name: str
    judge: Judge
    repeats: int = Field(ge=1)
    rec: Repeated
    """Mark of the last step."""
    rea: Repeated
    """Mean mark of the steps before it; 0 of a reply of one step."""
    cot: Repeated
    """alpha rec + (1 - alpha) rea."""
    alpha: float = Field(ge=0, le=1)
    steps: float | None
    """Mean number of marked steps."""
    tokens: float | None
    """Mean length of a reply."""
    token_unit: str
    """What `tokens` counts."""
    offered: int
    tasks: dict[str, MmeTask]
    reasons: dict[str, int] = Field(default_factory=dict)
    unread: tuple[Unread, ...] = ()
    samples: tuple[MmeSample, ...] = ()
    notes: tuple[str, ...] = ()
    run: str | None = None
    file: str | None = None
    references: str | None = None


class LexicalScore(Model):
    """Overlap of words with reference descriptions, as fractions: no judge, and no substitute for one."""

    kind: Literal["lexical"] = "lexical"
    name: str
    precision: float | None
    """Words of the description that the reference has too; means over clips, here and below."""
    recall: float | None
    f1: float | None
    lcs_f1: float | None
    """F1 of the longest common subsequence of words."""
    offered: int
    scored: int
    reasons: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    run: str | None = None
    file: str | None = None
    references: str | None = None


Judged = EmerScore | MmeScore
_Any = Annotated[EmerScore | MmeScore | LexicalScore, Field(discriminator="kind")]
_READER: TypeAdapter[EmerScore | MmeScore | LexicalScore] = TypeAdapter(_Any)


def one_judge(scores: Iterable[Judged]) -> Judge | None:
    """Return the judge of all results; None if there are none.

    Every table of ratings asks this first.

    Raises:
        MixedJudgesError: They have different judges or are of different benchmarks, or one of them was
            answered by several versions of its judge.
    """
    first: Judged | None = None
    for score in scores:
        if (problem := score.judge.problem()) is not None:
            raise MixedJudgesError(f"'{score.name}' cannot stand in a table: {problem}.")
        if first is None:
            first = score
            continue
        if score.kind != first.kind:
            raise MixedJudgesError(
                f"'{first.name}' is judged by the rules of {first.kind}, '{score.name}' by those of "
                f"{score.kind}. Make one table of each."
            )
        if score.judge != first.judge:
            raise MixedJudgesError(
                f"'{first.name}' and '{score.name}' had different judges: "
                f"{_difference(first.judge, score.judge)}. Ratings compare within one judge only: "
                "judge both with the same model, version and prompts, or make two tables."
            )
    return None if first is None else first.judge


def beside_published(judge: Judge, *, frames: bool = False) -> str:
    """Return what must stand under a table that has published rows too.

    Args:
        judge: Of our rows.
        frames: Whether it should have seen pictures, as the published judge of MME-Emotion did.
    """
    text = (
        f"Our rows: judge '{judge.model}' ({judge.version}), own wording ({', '.join(judge.prompts)}). "
        f"Published rows: {PUBLISHED_JUDGE}, the authors' wording, version not told. Values of different "
        "judges, versions or wordings do not compare."
    )
    if frames and not judge.frames:
        text += " Our judge saw no pictures, the published one up to ten per clip."
    return text


def read_judged(path: Path) -> EmerScore | MmeScore | LexicalScore:
    """Read a result that `emocache judge` wrote.

    Raises:
        PredictionError: The file is missing, or is no such result.
    """
    try:
        return _READER.validate_json(path.read_bytes())
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot read a judged result ({error.strerror}). `emocache judge ... --out FOLDER` "
            "writes one."
        ) from None
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in found["loc"])
        raise PredictionError(
            f"{path}: no result of `emocache judge`: {at or 'document'}: {found['msg']}."
        ) from None


def _difference(a: Judge, b: Judge) -> str:
    left: Mapping[str, object] = a.model_dump()
    right: Mapping[str, object] = b.model_dump()
    return "; ".join(
        f"{name} {_shown(left[name])} and {_shown(right[name])}"
        for name in left
        if left[name] != right[name]
    )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
