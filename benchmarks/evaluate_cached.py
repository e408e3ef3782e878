"""Evaluating from the cache, next to decoding and encoding every clip anew; for `evaluate.py`."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import train_flops
import train_setup
from train_input import Bench
from train_report import Result, middle, paired
from train_setup import OnlineReader, Subject

from cache.clip import Record
from cache.spec import STREAMS
from cache.store import TokenStore
from train.batches.loading import to_device
from train.data import PrefixBatch, collate
from train.mixture import Ask

N_NEW = 4
"""Tokens of a reply: about a label."""
WAYS = {"cached": (), "anew": STREAMS}
"""Way -> streams that are decoded and encoded."""


def cached(bench: Bench) -> Result:
    """Compare a reply from stored tokens with one that begins at the file.

    Both ways run the same renderer, views and model. The prediction is the ratio of the operations, counted
    by hand; decoding and reading are no part of it.
    """
    preset = train_setup.preset_of(bench.scale, own_encoders=True)
    media = bench.work / "media"
    records = train_setup.write_media(media, bench.clips, 4 if bench.scale.is_quick else 8)
    bank = train_setup.random_bank(preset.tokens)
    store = TokenStore.open_or_create(bench.work / "store-cached")
    train_setup.write_encoded(store, preset, records, media, bank)
    subject = Subject(bench.scale, preset, records, store, bench.device)
    subject.model.eval()
    readers = {
        way: OnlineReader(store, preset, bank, media, streams) for way, streams in WAYS.items()
    }
    replies = {way: [_reply(subject, readers[way], r) for r in records] for way in WAYS}
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for repeat in range(bench.scale.repeats):
        works = {
            way: functools.partial(_every, subject, reader, records)
            for way, reader in readers.items()
        }
        for way, taken_s in bench.in_turns(works, repeat).items():
            seconds[way].append(taken_s / len(records))
    everything = readers["anew"]
    decode_s = [bench.timed(functools.partial(everything.decode, r)) for r in records]
    language = sum(_flops(subject, _batch(subject, readers["cached"], r)) for r in records)
    language /= len(records)
    encoders = sum(train_setup.encoder_flops(spec) for spec in preset.tokens.all())
    return {
        "n_clips": len(records),
        "n_real": sum("/real/" in r.uid for r in records),
        "new_tokens": N_NEW,
        "equal_replies": replies["cached"] == replies["anew"],
        "decode_s": middle(decode_s),
        "cached_s": middle(seconds["cached"]),
        "anew_s": middle(seconds["anew"]),
        "ratio": paired(seconds["anew"], seconds["cached"]),
        "language_gflop": language / 1e9,
        "encoders_gflop": encoders / 1e9,
        "predicted": (language + encoders) / language,
    }


def _batch(subject: Subject, reader: OnlineReader, record: Record) -> PrefixBatch:
    group = subject.grouper.group(record, [Ask("emotion", 0)], with_answer=False)
    return collate(subject.preset, [group], reader.read([record]))


def _reply(subject: Subject, reader: OnlineReader, record: Record) -> list[list[int]]:
    batch = to_device(_batch(subject, reader, record), subject.device)
    names = ("tokens", "masks", "text_ids", "order", "segments")
    given: dict[str, Any] = {name: batch[name] for name in names}  # type: ignore[literal-required]
    # No token: every reply is as long as the others.
    found: list[list[int]] = subject.model.reply(
        **given, max_new_tokens=N_NEW, stop_ids=[subject.vocabulary]
    )
    return found


def _every(subject: Subject, reader: OnlineReader, records: Sequence[Record]) -> None:
    for record in records:
        _reply(subject, reader, record)


def _flops(subject: Subject, batch: PrefixBatch) -> float:
    """Count the operations of one reply: the prompt, and a position for each further token."""
    n = len(batch["order"])
    counted = train_flops.llm(subject.shape, n, train_flops.n_pairs(batch["segments"].rows), 1)
    for i in range(1, N_NEW):
        counted += train_flops.llm(subject.shape, 1, n + i, 1)
    return (counted + subject.prefix_flops).forward
