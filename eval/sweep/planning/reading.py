"""Which records the rows of a sweep read, and what those records lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cache.clip import Record
from cache.errors import EmocacheError, ManifestError, near_miss
from cache.manifest import Manifest
from cache.spec import Stream
from eval.sweep.schema import ScoreColumn
from train.config import STREAM_OF, Input, Preset

_HAS = {"audio": "has_audio", "video": "has_video", "image": "has_image"}
"""Stream -> what the container says of it."""
_SHOWN_IN = {"audio": "sound", "video": "moving pictures", "image": "pictures"}


class Reading:
    """Which records a row reads: to train on, to validate with, to be scored on."""

    def __init__(self, manifest: Manifest, scores: Sequence[ScoreColumn]) -> None:
        self._manifest = manifest
        self._places: dict[str | None, dict[str, list[int]]] = {}
        """Split -> corpus -> its records."""
        for place, record in enumerate(manifest.records):
            of_split = self._places.setdefault(record.split, {})
            of_split.setdefault(record.corpus, []).append(place)
        self._known: dict[tuple[tuple[int, ...], Stream], tuple[Counter[str], Counter[str]]] = {}
        sets = {name for column in scores if column.kind == "benchmark" for name in column.sets}
        splits = {column.split for column in scores if column.kind == "split"}
        self.problems = [*self._missing_splits(splits), *self._missing_sets(sets)]
        self._scored = tuple(
            place
            for place, record in enumerate(manifest.records)
            if record.split in splits or not sets.isdisjoint(record.benchmarks)
        )

    def _missing_splits(self, splits: Iterable[str]) -> list[EmocacheError]:
        known = sorted(str(name) for name in self._manifest.splits if name is not None)
        return [
            ManifestError(
                f"no record is in split '{name}', which a score of the sweep is taken on."
                f"{near_miss(name, known)} The manifest has: {', '.join(known) or 'no splits at all'}."
            )
            for name in sorted(splits)
            if name not in known
        ]

    def _missing_sets(self, sets: Iterable[str]) -> list[EmocacheError]:
        known = sorted({name for record in self._manifest.records for name in record.benchmarks})
        missing = [name for name in sorted(sets) if name not in known]
        if not missing:
            return []
        return [
            ManifestError(
                f"no record of the manifest is scored by benchmark {', '.join(missing)}, which a score "
                f"of the sweep averages. It has records of: {', '.join(known) or 'none'}. Index the "
                "corpora of these sets, or leave them out of the score."
            )
        ]

    def train_places(self, preset: Preset) -> tuple[int, ...]:
        """Return the records that a run may train on; with a share, those that its seed draws."""
        found = self._of_split(preset, preset.data.train_split)
        if preset.data.train_share == 1:
            return found
        from train.batches.records import share_of  # loads torch

        records = [self._manifest.records[place] for place in found]
        drawn = {r.uid for r in share_of(records, preset.data.train_share, preset.seed)}
        return tuple(place for place in found if self._manifest.records[place].uid in drawn)

    def places(self, preset: Preset) -> frozenset[int]:
        """Return all records that a run and its scores read."""
        read = {*self.train_places(preset), *self._scored}
        if preset.data.val_split is not None:
            read.update(self._of_split(preset, preset.data.val_split))
        return frozenset(read)

    def _of_split(self, preset: Preset, split: str) -> tuple[int, ...]:
        corpora = preset.data.corpora
        by_corpus = self._places.get(split, {})
        if corpora is None:
            corpora = tuple(by_corpus)
        return tuple(sorted(place for name in corpora for place in by_corpus.get(name, ())))

    def lacks(self, row: str, preset: Preset) -> tuple[list[EmocacheError], list[str]]:
        """Return what a row needs and its corpora lack, and what is merely worth knowing."""
        split = preset.data.train_split
        known = sorted(self._places.get(split, {}))
        for name in preset.data.corpora or ():
            if name not in known:
                return [
                    ManifestError(
                        f"row '{row}': no record of split '{split}' is of corpus '{name}' (data.corpora)."
                        f"{near_miss(name, known)} The split has: {', '.join(known) or 'none'}."
                    )
                ], []
        places = self.train_places(preset)
        if not places:
            return [
                ManifestError(
                    f"row '{row}': no record to train on is in split '{preset.data.train_split}'"
                    f"{_of_corpora(preset)}. Index the split of each record, or set data.train_split."
                )
            ], []
        problems: list[EmocacheError] = []
        remarks = []
        for name in preset.tokens.by_input():
            stream = STREAM_OF[name]
            n_by_corpus, lacking = self._counts(places, stream)
            if lacking.total() == len(places):
                problems.append(_no_stream(row, name, stream, n_by_corpus))
            elif lacking and preset.data.absent == "refuse":
                problems.append(_some_without(row, name, stream, lacking))
            else:
                whole = [c for c, n in lacking.items() if n == n_by_corpus[c]]
                done = "left out" if preset.data.absent == "drop" else "masked"
                remarks += [
                    f"row '{row}': no record of corpus '{corpus}' has {_SHOWN_IN[stream]}; "
                    f"{'they are' if done == 'left out' else f'its {name} tokens are'} {done}"
                    for corpus in whole
                ]
        return problems, remarks

    def _counts(self, places: tuple[int, ...], stream: Stream) -> tuple[Counter[str], Counter[str]]:
        """Return records by corpus, and those that lack a stream; rows ask the same question often."""
        if (places, stream) not in self._known:
            records = [self._manifest.records[place] for place in places]
            self._known[places, stream] = (
                Counter(record.corpus for record in records),
                Counter(record.corpus for record in records if _lacks(record, stream)),
            )
        return self._known[places, stream]


def _lacks(record: Record, stream: Stream) -> bool:
    """True if the container says that a record has no such stream; what is not known is none."""
    return getattr(record.seen_clip, _HAS[stream]) is False


def _no_stream(row: str, name: Input, stream: Stream, corpora: Counter[str]) -> ManifestError:
    several = len(corpora) > 1
    return ManifestError(
        f"row '{row}' reads {name} tokens, but no record of corp{'ora' if several else 'us'} "
        f"{', '.join(sorted(corpora))} has {_SHOWN_IN[stream]} ({corpora.total():,} records to train on). "
        f"Leave the input out (tokens.{name}=null), give the row other corpora (data.corpora), or "
        "leave the row out with --rows."
    )


def _some_without(row: str, name: Input, stream: Stream, lacking: Counter[str]) -> ManifestError:
    counts = ", ".join(f"{corpus} {n:,}" for corpus, n in sorted(lacking.items()))
    return ManifestError(
        f"row '{row}' reads {name} tokens and refuses records without (data.absent=refuse), but some "
        f"have no {_SHOWN_IN[stream]}: {counts}. Set data.absent to mask or drop."
    )


def _of_corpora(preset: Preset) -> str:
    corpora = preset.data.corpora
    return "" if corpora is None else f" of {', '.join(corpora)}"
