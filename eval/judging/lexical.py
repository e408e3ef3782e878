"""Overlap of words with reference descriptions: free, offline, and no judgement.

Two texts that say the same in other words overlap little, and two that say the opposite may overlap much;
so this stands beside ratings and never in their place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.judging.numbers import mean
from eval.judging.replies import without_tags
from eval.judging.results import LexicalScore
from eval.judging.sources import pair, read_references, read_replies, stamp

# Scripts without blanks between words: each character is a token.
_TOKEN = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+(?:['\u2019][^\\W_]+)*"
)


class Overlap(NamedTuple):
    """The overlap of one description with its reference; fractions."""

    precision: float
    recall: float
    f1: float
    lcs_f1: float


def tokens_of(text: str) -> list[str]:
    """Return words in lower case, without punctuation; of Chinese and Japanese each character."""
    return _TOKEN.findall(text.casefold())


def overlap(description: str, reference: str) -> Overlap:
    """Compare two texts: as bags of words, and by their longest common subsequence of words.

    The second is the F1 of ROUGE-L, precision and recall weighing the same. Without a word on one side
    everything is 0.
    """
    a, b = tokens_of(description), tokens_of(reference)
    if not a or not b:
        return Overlap(0.0, 0.0, 0.0, 0.0)
    n_shared = (Counter(a) & Counter(b)).total()
    return Overlap(
        precision=n_shared / len(a),
        recall=n_shared / len(b),
        f1=2 * n_shared / (len(a) + len(b)),
        lcs_f1=2 * _common(a, b) / (len(a) + len(b)),
    )


def lexical_overlap(
    predictions: Path,
    references: Path,
    *,
    name: str | None = None,
    asked: str | None = None,
    split: str | None = None,
    allow_missing: bool = False,
) -> LexicalScore:
    """Compare the descriptions of a file with references; arguments and errors as of `judge_emer`."""
    replies = read_replies(predictions, asked)
    paired = pair(
        read_references(references, split), replies, "reference", allow_missing=allow_missing
    )
    found = [overlap(without_tags(reply.text), ref.text) for ref, reply in paired.pairs]
    n_empty = sum(not reply.text.strip() for _, reply in paired.pairs)
    reasons = dict(paired.reasons) | ({"empty reply": n_empty} if n_empty else {})
    notes = ["Overlap of words, no judge: it does not stand for a rating."]
    if paired.missing:
        notes.append(f"{len(paired.missing)} clips without a prediction are left out of all means.")
    return LexicalScore(
        name=name or replies.run or predictions.stem,
        precision=mean(one.precision for one in found),
        recall=mean(one.recall for one in found),
        f1=mean(one.f1 for one in found),
        lcs_f1=mean(one.lcs_f1 for one in found),
        offered=paired.offered,
        scored=len(found),
        reasons=reasons,
        notes=tuple(notes),
        run=replies.run,
        file=replies.file,
        references=stamp(references),
    )


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is the bits of one number, where a 0 says that the length grows there
    (Crochemore et al. 2001): texts of 200 words take microseconds where the table takes milliseconds.
    """
    at: dict[str, int] = {}
    for j, word in enumerate(b):
        at[word] = at.get(word, 0) | 1 << j
    all_ones = (1 << len(b)) - 1
    row = all_ones
    for word in a:
        hit = row & at.get(word, 0)
        row = ((row + hit) | (row - hit)) & all_ones
    return len(b) - row.bit_count()
