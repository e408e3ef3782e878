"""Which records a run trains on and validates on, by what its `data` says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from cache.clip import Record
from cache.errors import ManifestError, near_miss
from cache.manifest import Manifest
from train.batches.reading import ViewReader, usable
from train.config import Preset


def records_to_train_on(manifest: Manifest, preset: Preset, reader: ViewReader) -> list[Record]:
    """Return the usable records of the training split, of the corpora and the share that are asked for.

    Raises:
        ManifestError: No such split, or no record of a corpus that `data.corpora` names.
        CacheMissError: A clip was never extracted, or `data` says to refuse it.
    """
    data = preset.data
    found = _of_corpora(manifest.select(data.train_split), data.corpora, data.train_split)
    return usable(share_of(found, data.train_share, preset.seed), reader, data)


def records_to_validate_on(manifest: Manifest, preset: Preset, reader: ViewReader) -> list[Record]:
    """Return the usable records of the validation split; none where there is no such split.

    Raises:
        CacheMissError: A clip was never extracted, or `data` says to refuse it.
    """
    data = preset.data
    if data.val_split is None or data.val_split not in manifest.splits:
        return []
    found = manifest.select(data.val_split)
    if data.corpora is not None:
        found = tuple(record for record in found if record.corpus in data.corpora)
    return usable(found, reader, data)


def share_of(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Return a share of each corpus, at least one record, in the order that they came in.

    Which records are taken depends on their uids and the seed alone, and what a smaller share takes a
    larger one takes too.

    Args:
        records: Of one or several corpora.
        share: In (0, 1]; 1 takes all.
        seed: Another one takes others.
    """
    if share == 1:
        return list(records)
    by_corpus: dict[str, list[str]] = {}
    for record in records:
        by_corpus.setdefault(record.corpus, []).append(record.uid)
    taken: set[str] = set()
    for uids in by_corpus.values():
        drawn = sorted(uids, key=lambda uid: hashlib.sha256(f"{seed}/{uid}".encode()).digest())
        # 0.29 * 100 is 28.999999999999996.
        taken.update(drawn[: max(1, math.floor(share * len(uids) + 1e-9))])
    return [record for record in records if record.uid in taken]


def _of_corpora(
    records: Sequence[Record], corpora: Sequence[str] | None, split: str
) -> Sequence[Record]:
    if corpora is None:
        return records
    known = sorted({record.corpus for record in records})
    for corpus in corpora:
        if corpus not in known:
            raise ManifestError(
                f"data.corpora: no record of split '{split}' is of corpus '{corpus}'."
                f"{near_miss(corpus, known)} The split has: {', '.join(known) or 'none'}."
            )
    return [record for record in records if record.corpus in corpora]
