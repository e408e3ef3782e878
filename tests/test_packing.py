"""Which sample comes when, and which share a pack: pure functions of seed and state."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Clip, Description, Record
from cache.errors import ManifestError, SchemaError
from tests.conftest import key_of
from tests.training import described
from train.config import CorpusShare, OptimConfig, StageConfig
from train.data import Group, Question
from train.mixture import Ask, Mixture, Sample
from train.packing import Pack, Planner, PlanState, best_filling
from train.prompt import PromptTokens

VOICE = (Description(kind="audio_tone", text="A low voice."),)
OPTIM = OptimConfig(lr=1e-3, lr_min=0, warmup_steps=0, weight_decay=0, batch_size=3)


def stage(**more: object) -> StageConfig:
    settings = {"name": "s", "tasks": {"emotion": 1.0}, "n_steps": 10, "optim": OPTIM, **more}
    return StageConfig.model_validate(settings)


def records(n: int = 10, corpus: str = "made") -> tuple[Record, ...]:
    return tuple(
        Record(
            uid=f"{corpus}/{i}",
            media=f"{i}.mp4",
            clip=Clip(sha256=key_of(f"{corpus}{i}"), n_bytes=1),
            emotion=("happy", "sad")[i % 2],
            descriptions=described("The voice is low.") * (i % 3 > 0) + VOICE * (i % 2),
        )
        for i in range(n)
    )


# --------------------------------------------------------------------------- mixture


def test_a_mixture_is_a_pure_function_of_seed_and_place() -> None:
    both = stage(tasks={"emotion": 0.5, "think": 0.5}, modality_dropout={"audio": 0.3})
    a, b = Mixture(records(), both, seed=3), Mixture(records(), both, seed=3)
    forwards = [a[i] for i in range(3000)]
    assert [b[i] for i in range(2999, -1, -1)][::-1] == forwards, "entered anywhere"
    other = Mixture(records(), both, seed=4)
    assert [other[i] for i in range(400)] != forwards[:400]
    shares = Counter(s.asks[0].task for s in forwards)
    assert shares["think"] / 3000 == pytest.approx(0.5, abs=0.04)
    assert all(s.record.described("multimodal") for s in forwards if s.asks[0].task == "think")
    assert sum(bool(s.hidden) for s in forwards) / 3000 == pytest.approx(0.3, abs=0.04)


def test_every_record_comes_once_per_pass() -> None:
    mixture = Mixture(records(), stage(), seed=0)
    orders = []
    for epoch in range(200):  # over the border of a block of draws
        samples = [mixture[i] for i in range(epoch * 10, (epoch + 1) * 10)]
        assert {s.asks[0].epoch for s in samples} == {epoch}
        assert len({s.record.uid for s in samples}) == 10
        orders.append(tuple(s.record.uid for s in samples))
    assert len(set(orders)) > 190, "in a new order each pass"


def test_corpora_and_their_tasks_have_the_shares_asked_for() -> None:
    pool = (*records(20, "big"), *records(5, "small"), *records(7, "unused"))
    mixed = stage(
        corpora={
            "big": CorpusShare(weight=1),
            "small": CorpusShare(weight=3, tasks={"think": 1, "emotion": 3}),
        }
    )
    drawn: Counter[tuple[str, str]] = Counter()
    mixture = Mixture(pool, mixed, seed=1)
    for i in range(4000):
        sample = mixture[i]
        drawn[sample.record.uid.split("/")[0], sample.asks[0].task] += 1
    assert set(drawn) == {("big", "emotion"), ("small", "emotion"), ("small", "think")}
    assert drawn["big", "emotion"] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert drawn["small", "think"] / 4000 == pytest.approx(3 / 16, abs=0.03)


def test_pairs_of_a_clip_differ_and_follow_the_shares() -> None:
    mixture = Mixture(
        records(), stage(tasks={"emotion": 0.5, "think": 0.5}, pairs_per_clip=3), seed=5
    )
    tasks: Counter[str] = Counter()
    for i in range(1000):
        sample = mixture[i]
        assert len(sample.asks) == 3
        assert len({a.epoch for a in sample.asks}) == 3, "another wording each"
        explained = sample.record.described("multimodal")
        if not explained:
            assert {a.task for a in sample.asks} == {"emotion"}
        tasks.update(a.task for a in sample.asks[1:] if explained)
    assert tasks["think"] / tasks.total() == pytest.approx(0.5, abs=0.04)


def test_a_task_that_sees_one_stream_is_asked_about_clips_that_have_it() -> None:
    heard = Mixture(
        records(),
        stage(tasks={"audio": 1.0}),
        seed=0,
        streams_of=lambda r: ("audio",) if r.uid in ("made/1", "made/2") else ("image",),
    )
    assert {heard[i].record.uid for i in range(100)} == {
        "made/1"
    }  # /2 has no description of the voice


def test_a_mixture_that_cannot_be_drawn_is_refused() -> None:
    bare = [r.model_copy(update={"descriptions": ()}) for r in records()]
    with pytest.raises(
        ManifestError,
        match=r"task 'think' needs records with a label in 'emotion' and a description of kind "
        r"'multimodal' of 'emotion' or of no label, and none of the 10 has that",
    ):
        Mixture(bare, stage(tasks={"emotion": 0.5, "think": 0.5}), seed=0)
    with pytest.raises(
        ManifestError, match=r"no training record is of corpus 'mad'\. Did you mean 'made'"
    ):
        Mixture(records(), stage(corpora={"mad": CorpusShare(weight=1)}), seed=0)
    with pytest.raises(ValueError, match="an empty mixture trains nothing"):
        stage(tasks={})
    with pytest.raises(ValueError, match="an empty mixture trains nothing"):
        stage(corpora={"made": CorpusShare(weight=0)})


# --------------------------------------------------------------------------- packs


def lengths(sample: Sample) -> tuple[Group, ...]:
    """Groups of 450 to 700 positions, by the record."""
    n = 450 + (int(sample.record.uid.split("/")[1]) * 37 + sample.asks[0].epoch * 91) % 250
    prompt = PromptTokens((1,), tuple(range(n - 21)), tuple(range(20)))
    return (Group(sample.record, (Question("emotion", prompt),)),)


def planner(state: PlanState | None = None, n: int = 1, **optim: object) -> Planner:
    chosen = OPTIM.model_copy(update=optim)
    return Planner(Mixture(records(100), stage(), seed=2), lengths, chosen, n, state)


def uids(pack: Pack) -> list[str]:
    return [group.record.uid for group in pack]


@given(
    st.lists(st.integers(1, 40), max_size=9),
    st.integers(0, 120),
)
def test_the_filling_is_the_best_there_is(sizes: list[int], room: int) -> None:
    chosen = best_filling(sizes, room)
    assert chosen == sorted(set(chosen))
    best = max(
        (sum(c) for k in range(len(sizes) + 1) for c in combinations(sizes, k) if sum(c) <= room),
        default=0,
    )
    assert sum(sizes[i] for i in chosen) == best


def test_packs_are_full_and_nobody_waits_for_ever() -> None:
    plan = planner(max_tokens=4096)
    seen: list[str] = []
    shares = []
    for _ in range(100):
        step = plan.next_step()
        assert step.n_positions == sum(g.n_positions for g in step.packs[0]) <= 4096
        shares.append(step.n_positions / 4096)
        seen += uids(step.packs[0])
        assert step.after.next_place - len(seen) == len(step.after.waiting) < 48
        assert not step.after.waiting or step.after.next_place - step.after.waiting[0] < 200
    assert sum(shares) / 100 > 0.99
    passes = Counter(seen)
    assert max(passes.values()) - min(passes.values()) <= 2, "as often as the mixture says"


@pytest.mark.parametrize("optim", [{}, {"max_tokens": 4096}, {"max_tokens": 2048, "accumulate": 2}])
def test_a_plan_goes_on_from_any_state(optim: dict[str, int]) -> None:
    whole = planner(**optim)
    steps = [whole.next_step() for _ in range(30)]
    for k in (1, 7, 29):
        state = PlanState.model_validate_json(steps[k - 1].after.model_dump_json())
        again = planner(state, **optim)
        assert [again.next_step() for _ in range(30 - k)] == steps[k:]


def test_processes_share_a_step_without_overlap() -> None:
    one, two = planner(accumulate=4, max_tokens=2048), planner(n=2, accumulate=2, max_tokens=2048)
    for _ in range(10):
        whole, shared = one.next_step(), two.next_step()
        assert whole == shared, "the same packs, however many processes take them"
        first, second = shared.packs[0::2], shared.packs[1::2]
        assert len(first) == len(second) == 2
        assert not {id(p) for p in first} & {id(p) for p in second}
    assert len({u for p in whole.packs for u in uids(p)}) == sum(len(p) for p in whole.packs)


def test_without_a_budget_a_pack_is_a_batch_in_order() -> None:
    plan = planner(batch_size=4)
    mixture = Mixture(records(100), stage(), seed=2)
    for number in range(5):
        (pack,) = plan.next_step().packs
        assert uids(pack) == [mixture[4 * number + i].record.uid for i in range(4)]


def test_a_sample_that_no_pack_can_hold_is_refused_by_name() -> None:
    with pytest.raises(
        SchemaError,
        match=r"made/\d+: its sequences take \d+ positions, more than.*max_tokens \(now 400\)",
    ):
        planner(max_tokens=400).next_step()


def test_counts_of_a_step() -> None:
    step = planner(batch_size=2, accumulate=3).next_step()
    assert step.n_answers == 6
    assert step.n_answer_tokens == 6 * 20
    assert Ask("emotion", 0) == Mixture(records(100), stage(), seed=2)[0].asks[0]
