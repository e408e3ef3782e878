"""Sections of `evaluate.py` about generation: shared prefixes, batches, the key-value cache."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import train_flops
from train_input import Bench
from train_report import Result, middle, number, paired, table
from train_setup import Subject

from cache.clip import Record
from train.batches.loading import to_device
from train.data import Group, PrefixBatch
from train.mixture import Ask

SHORT = 3
"""Tokens of a short reply: a label."""
LONG = (40, 160)
"""Fewest and most tokens of a long one: reasoning and a label."""
MOST_REPEATS = 3
"""Of `batched`: one at a time, long replies take a minute on a CPU."""
TASKS = (Ask("emotion", 0), Ask("sentiment", 0, ("positive", "negative", "neutral")))
"""Two questions about a clip, as MELD's benchmarks ask them."""


def shared(bench: Bench) -> Result:
    """Compare two questions behind one prefix with two prompts, replies short.

    The prediction is the ratio of the operations of prompts and replies, counted by hand.
    """
    subject = _subject(bench)
    n_clips = _n_clips(bench)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    predicted, equal = [], False
    for repeat in range(-1, bench.scale.repeats):
        records = _records(subject, n_clips, repeat)
        together = [subject.grouper.group(r, TASKS, with_answer=False) for r in records]
        apart = [
            subject.grouper.group(r, [ask], with_answer=False) for r in records for ask in TASKS
        ]
        batches = {"shared": _batch(subject, together), "separate": _batch(subject, apart)}
        limits = [SHORT] * len(apart)
        works = {
            name: functools.partial(_answer, subject, batch, limits)
            for name, batch in batches.items()
        }
        if repeat < 0:  # the first warms up
            equal = works["shared"]() == works["separate"]()
            continue
        for name, taken_s in bench.in_turns(works, repeat).items():
            seconds[name].append(taken_s)
        counts = {name: _flops(subject, batch, limits) for name, batch in batches.items()}
        predicted.append(counts["separate"] / counts["shared"])
        bench.profiles["shared"] = works["shared"]
    return {
        "n_clips": n_clips,
        "new_tokens": SHORT,
        "equal_replies": equal,
        "shared_replies_per_s": 2 * n_clips / middle(seconds["shared"]),
        "ratio": paired(seconds["separate"], seconds["shared"]),
        "predicted": middle(predicted),
    }


def batched(bench: Bench) -> Result:
    """Compare batches with one question at a time, by our decoder and by transformers' generation."""
    subject = _subject(bench)
    rows = []
    for kind in ("short", "long"):
        n_clips = _n_clips(bench)
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        equal, n_tokens = False, 0
        n_repeats = min(bench.scale.repeats, MOST_REPEATS)
        for repeat in range(-1, n_repeats):
            records = _records(subject, n_clips, repeat)
            groups = [subject.grouper.group(r, TASKS[:1], with_answer=False) for r in records]
            limits = _limits(kind, n_clips, repeat, is_quick=bench.scale.is_quick)
            works = _ways(subject, groups, limits)
            if repeat < 0:
                found = [work() for work in works.values()]
                equal = all(replies == found[0] for replies in found)
                continue
            for name, taken_s in bench.in_turns(works, repeat).items():
                seconds[name].append(taken_s)
            n_tokens += sum(limits)
            bench.profiles["batched"] = works["ours, batched"]
        ours = seconds["ours, batched"]
        rows.append(
            {
                "replies": kind,
                "batch": n_clips,
                "tokens_per_reply": n_tokens / n_clips / n_repeats,
                "replies_per_s": n_clips / middle(ours),
                "equal_replies": equal,
                **{
                    name: paired(taken, ours)
                    for name, taken in seconds.items()
                    if name != "ours, batched"
                },
            }
        )
    return {"rows": rows}


def _ways(
    subject: Subject, groups: Sequence[Group], limits: Sequence[int]
) -> dict[str, Callable[[], list[list[int]]]]:
    """Return each way to answer the same questions."""
    whole = _batch(subject, groups)
    single = [_batch(subject, [group]) for group in groups]

    def one_at_a_time() -> list[list[int]]:
        pairs = zip(single, limits, strict=True)
        return [_answer(subject, batch, [n])[0] for batch, n in pairs]

    def by_transformers(work: Callable[[], list[list[int]]]) -> list[list[int]]:
        subject.execute(attention="padded")
        try:
            return work()
        finally:
            subject.execute()

    together = functools.partial(_answer, subject, whole, limits)
    return {
        "ours, batched": together,
        "ours, one at a time": one_at_a_time,
        "transformers, batched": functools.partial(by_transformers, together),
        "transformers, one at a time": functools.partial(by_transformers, one_at_a_time),
    }


def _subject(bench: Bench) -> Subject:
    subject = bench.subject
    subject.execute()
    subject.model.eval()
    return subject


def _n_clips(bench: Bench) -> int:
    if bench.device == "cuda":
        return 64
    return 2 if bench.scale.is_quick else 16


def _records(subject: Subject, n: int, seed: int) -> list[Record]:
    return random.Random(seed).sample(subject.records, n)


def _limits(kind: str, n: int, seed: int, *, is_quick: bool) -> list[int]:
    """Return how long each reply is to be: random weights would end it anywhere or never."""
    if kind == "short":
        return [SHORT] * n
    chance = random.Random(seed)
    few, most = (4, 8) if is_quick else LONG
    return [chance.randint(few, most) for _ in range(n)]


def _batch(subject: Subject, groups: Sequence[Group]) -> PrefixBatch:
    return to_device(subject.batch(tuple(groups)), subject.device)


def _answer(subject: Subject, batch: PrefixBatch, limits: Sequence[int]) -> list[list[int]]:
    found = subject.model.answer(
        tokens=batch["tokens"],
        masks=batch["masks"],
        text_ids=batch["text_ids"],
        order=batch["order"],
        segments=batch["segments"],
        max_new_tokens=limits,
        stop_ids=(subject.vocabulary,),  # no token: replies are as long as they are to be
    )
    return [answer.ids for answer in found]


def _flops(subject: Subject, batch: PrefixBatch, limits: Sequence[int]) -> float:
    """Count the operations of prompts and replies; of a reply's last token nothing is computed."""
    segments = batch["segments"]
    positions, pairs = len(batch["order"]), train_flops.n_pairs(segments.rows)
    lengths = [len(places) for places in segments.questions]
    n_said = sum(n - 1 for n in limits)
    pairs += sum(
        length + i + 1 for length, n in zip(lengths, limits, strict=True) for i in range(n - 1)
    )
    counted = train_flops.llm(subject.shape, positions + n_said, pairs, len(lengths) + n_said)
    return (counted + subject.prefix_flops * len(batch["tokens"]["audio"])).forward


def shared_table(found: Result) -> str:
    """Lay out what `shared` found."""
    return table(
        "Two questions about a clip, short replies",
        ("clips", "tokens", "replies/s", "two prompts / one prefix", "operations"),
        [
            (
                str(found["n_clips"]),
                str(found["new_tokens"]),
                number(found["shared_replies_per_s"]),
                number(found["ratio"]),
                number(found["predicted"]),
            )
        ],
    )


def batched_table(found: Result) -> str:
    """Lay out what `batched` found."""
    names = ("ours, one at a time", "transformers, batched", "transformers, one at a time")
    return table(
        "Time of other ways, by that of our decoder in batches",
        ("replies", "batch", "tokens", "replies/s", *names),
        [
            (
                row["replies"],
                str(row["batch"]),
                number(row["tokens_per_reply"]),
                number(row["replies_per_s"]),
                *(number(row[name]) for name in names),
            )
            for row in found["rows"]
        ],
    )
