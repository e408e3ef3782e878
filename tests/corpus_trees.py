"""A small copy of every corpus in every layout of its row, and the records that must come of it.

`TREES` is the one table: an entry writes the files of a layout below a folder, and returns the records as
plain data (`as_data`); `put_media` then writes their media. test_corpora.py holds it against the rows that
ship with the project, so that a row or a layout without a tree fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.clip import Record
from tests import face_trees as faces
from tests import speech_trees as speech
from tests.mmeverse_trees import TABLES, Table, write_table
from tests.tree_files import Records

SUFFIXES = ("csv", "json", "jsonl")


@dataclass(frozen=True)
class Tree:
    """One layout of one corpus."""

    corpus: str
    layout: str
    make: Callable[[Path], Records]
    """Writes the files, and returns the records without their clips."""
    variant: str = ""
    is_chosen: bool = True
    """The layout is found by its files; another one has the same and must be asked for."""

    @property
    def name(self) -> str:
        """What a test is called."""
        return "-".join(filter(None, (self.corpus, self.layout, self.variant)))


def as_data(record: Record) -> dict[str, Any]:
    """Return what a record says beside its clip, without what is empty."""
    return record.model_dump(mode="json", exclude={"clip"}, exclude_defaults=True)


def _originals() -> list[Tree]:
    dfew = ("EmoLabel_DataSplit/train(single-labeled)/set_{}.csv",
            "EmoLabel_DataSplit/test(single-labeled)/set_{}.csv")  # fmt: skip
    baseline = ("label/single_trainset_{}.csv", "label/single_testset_{}.csv")
    makers: dict[tuple[str, str], Callable[[Path], Records]] = {
        ("mer2023", "original"): speech.mer2023,
        ("mer2024", "original"): speech.mer2024,
        ("meld", "original"): speech.meld,
        ("meld-dyadic", "original"): speech.meld_dyadic,
        ("emorynlp", "original"): speech.emorynlp,
        ("emorynlp", "json"): speech.emorynlp_json,
        ("iemocap", "original"): speech.iemocap,
        ("caer", "original"): faces.caer,
        ("e3", "original"): faces.e3,
        ("dfew", "original"): lambda folder: faces.dfew(folder, *dfew),
        ("dfew", "baseline"): lambda folder: faces.dfew(folder, *baseline),
        ("mafw", "original"): faces.mafw,
        ("bold", "original"): faces.bold,
        ("mc-eiu", "original"): faces.mc_eiu,
        ("mosi", "original"): speech.mosi,
        ("mosi", "mmsa"): lambda folder: speech.mmsa(folder, "mosi"),
        ("mosei", "original"): speech.mosei,
        ("mosei", "mmsa"): lambda folder: speech.mmsa(folder, "mosei"),
        ("sims", "original"): lambda folder: speech.sims(folder, "sims", "label.csv"),
        ("sims-v2", "original"): lambda folder: speech.sims(folder, "sims-v2", "meta.csv"),
        ("ov-merd", "original"): faces.ov_merd,
        ("mer-caption-plus", "original"): faces.mer_caption_plus,
        ("emer", "original"): faces.emer,
        ("emer", "v1"): faces.emer_v1,
        ("merr-coarse", "original"): lambda folder: faces.merr(folder, "merr-coarse"),
        ("merr-fine", "original"): lambda folder: faces.merr(folder, "merr-fine"),
        ("crema-d", "original"): lambda folder: speech.crema_d(folder, perceived=False),
        ("crema-d", "perceived"): lambda folder: speech.crema_d(folder, perceived=True),
        ("emodb", "original"): speech.emodb,
        ("emodb", "emobox"): lambda folder: speech.emobox(folder, fold_1=False),
        ("emodb", "emobox-fold-1"): lambda folder: speech.emobox(folder, fold_1=True),
    }
    asked = {("crema-d", "perceived")}
    return [
        Tree(corpus, layout, make, is_chosen=(corpus, layout) not in asked)
        for (corpus, layout), make in makers.items()
    ]


def _mmeverse(found: Table, kind: str, suffix: str) -> Tree:
    layout = {"merged": "mmeverse", "label": "mmeverse-label", "stage2": "mmeverse-stage2"}[kind]
    return Tree(
        found.corpus, layout, lambda folder: write_table(found, folder, kind, suffix), suffix
    )


TREES = (
    *_originals(),
    *(_mmeverse(t, kind, suffix) for t in TABLES for kind in t.kinds for suffix in SUFFIXES),
)
"""All of them; each writes media too when `put_media` gets its records."""
