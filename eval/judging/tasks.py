"""The eight tasks of MME-Emotion as data."""

from __future__ import annotations

from dataclasses import dataclass

from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from eval.judging.prompts import Role


@dataclass(frozen=True)
class MmeKind:
    """One task."""

    id: str
    title: str
    what: str
    """What its labels name, for the judge."""
    prompt: Role
    fields: tuple[LabelField, ...]
    """Of a manifest's record, with the truth; the first that is filled."""
    several: bool = False
    """Several true labels, and a last mark by the share that was named."""


_ONE: tuple[LabelField, ...] = ("emotion",)
_MANY: tuple[LabelField, ...] = ("emotion_multi", "emotion_ov", "emotion")
_SENTIMENT: tuple[LabelField, ...] = ("sentiment",)

MME_TASKS: dict[str, MmeKind] = {
    kind.id: kind
    for kind in (
        MmeKind("er-lab", "emotion in the lab", "emotion", "mme-judge", _ONE),
        MmeKind("er-wild", "emotion in the wild", "emotion", "mme-judge", _ONE),
        MmeKind("noise-er", "emotion under noise", "emotion", "mme-judge", _ONE),
        MmeKind(
            "fg-er",
            "fine-grained emotion",
            "fine-grained emotion",
            "mme-judge-several",
            _MANY,
            True,
        ),
        MmeKind("ml-er", "multi-label emotion", "emotion", "mme-judge-several", _MANY, True),
        MmeKind("sa", "sentiment", "sentiment", "mme-judge", _SENTIMENT),
        MmeKind(
            "fg-sa", "fine-grained sentiment", "sentiment grade", "mme-judge-grade", _SENTIMENT
        ),
        MmeKind("ir", "intent", "intent", "mme-judge", ("intent",)),
    )
}
"""Id, as the benchmark abbreviates it in lower case -> task. `fg-sa` must name the exact grade: the
released instruction contradicts itself on a coarse one."""


def mme_task(name: str, where: str) -> MmeKind:
    """Return a task by its id or title, in any case; raises SchemaError that lists the known ones."""
    folded = "-".join(name.casefold().replace("_", " ").replace("-", " ").split())
    by_title = {"-".join(kind.title.replace("-", " ").split()): kind for kind in MME_TASKS.values()}
    found = MME_TASKS.get(folded) or by_title.get(folded)
    if found is None:
        raise SchemaError(
            f"{where}: unknown task '{name}' of MME-Emotion.{near_miss(folded, MME_TASKS)} Allowed: "
            f"{', '.join(f'{kind.id} ({kind.title})' for kind in MME_TASKS.values())}."
        )
    return found
