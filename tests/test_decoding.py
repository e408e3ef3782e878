"""The fast decoder: the same ids as transformers' own generation, and as one question at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, MistralConfig, PretrainedConfig

import train.llm.decoding as decoding
from tests.test_backbones import BACKBONES, SIZES, preset_for
from tests.test_backbones import model_of as model_around
from tests.test_model import _group, _loss, _masked_views, _rows, tiny_llm
from train.batches.reading import Views
from train.config import ExecutionConfig, Preset, configure
from train.data import Group, PrefixBatch, Question, collate
from train.llm.attention import Segments
from train.llm.decoding import Prompts, RowCache
from train.model import EmotionLlama
from train.presets import demo
from train.prompt import PromptTokens

STOPS = (2, 11, 17, 30)
"""Several, so that replies of random weights end at different steps."""
GROUPS = [_group(0, (9, 0), (4, 0)), _group(1, (3, 0), (8, 0), (5, 0)), _group(2, (6, 0))]
CANDIDATES: list[list[tuple[int, ...]]] = [
    [(5, 2), (6, 7, 8, 2), (9, 2)],
    [(5, 2)],
    [(3, 4, 2), (4, 4, 4, 4, 2)],
    [],
    [(2,)],
    [(8, 9, 2), (2,)],
]


def model_of(config: PretrainedConfig, preset: Preset) -> EmotionLlama:
    """As there, around a configuration that no other model has changed or will see changed."""
    return model_around(type(config)(**config.to_dict()), preset)


def inputs(batch: PrefixBatch) -> dict[str, Any]:
    return {name: batch[name] for name in ("tokens", "masks", "text_ids", "order", "segments")}  # type: ignore[literal-required]


def replies(model: EmotionLlama, batch: PrefixBatch, n: int = 12) -> list[list[int]]:
    return model.reply(**inputs(batch), max_new_tokens=n, stop_ids=STOPS)


def by_transformers(model: EmotionLlama, batch: PrefixBatch, n: int = 12) -> list[list[int]]:
    model.set_execution(ExecutionConfig(attention="padded"))
    found = replies(model, batch, n)
    model.set_execution(ExecutionConfig())
    return found


def one_by_one(preset: Preset, views: Views) -> list[PrefixBatch]:
    return [
        collate(preset, [Group(g.record, (q,))], _rows(views, i))
        for i, g in enumerate(GROUPS)
        for q in g.questions
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BACKBONES)
def test_replies_are_those_of_transformers_and_of_each_question_alone(
    name: str, dtype: torch.dtype
) -> None:
    preset = preset_for(name)
    model = model_of(BACKBONES[name], preset).to(dtype)
    views = _masked_views(preset)
    views = Views({k: v.to(dtype) for k, v in views.tokens.items()}, views.masks)
    batch = collate(preset, GROUPS, views)
    found = replies(model, batch)
    assert found == by_transformers(model, batch)
    assert found == [replies(model, each)[0] for each in one_by_one(preset, views)]
    assert len({tuple(reply) for reply in found}) > 2
    # Rows that leave one after the other, from the middle and the end, change no other.
    for limits in ([12, 3, 7, 1, 12, 5], [1, 2, 3, 4, 5, 12], [0, 12, 0, 12, 0, 2]):
        some = model.answer(**inputs(batch), max_new_tokens=limits, stop_ids=STOPS)
        assert [a.ids for a in some] == [ids[:n] for ids, n in zip(found, limits, strict=True)]


def test_transformers_generation_is_really_used_as_the_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = demo()
    model = model_of(BACKBONES["llama"], preset)
    batch = collate(preset, GROUPS, _masked_views(preset))
    calls: list[str] = []
    base = model.llm.get_base_model()
    own = base.generate
    monkeypatch.setattr(base, "generate", lambda **k: (calls.append("generate"), own(**k))[1])
    replies(model, batch)
    assert calls == []
    by_transformers(model, batch)
    assert calls == ["generate"]


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=64),  # shorter than prompts: transformers answers
        MistralConfig(**SIZES, sliding_window=100),  # left behind while a reply is written
        Gemma2Config(**SIZES, sliding_window=512),
    ],
    ids=["short window", "window", "capped"],
)
def test_windows_and_caps_change_nothing(config: PretrainedConfig) -> None:
    preset = demo()
    model = model_of(config, preset)
    views = _masked_views(preset)
    if config.model_type == "gemma2":
        # Its own attention has a softmax in float32, where padding in float64 becomes NaN.
        model.float()
        views = Views({k: v.float() for k, v in views.tokens.items()}, views.masks)
    batch = collate(preset, GROUPS, views)
    found = replies(model, batch, 20)
    assert found == by_transformers(model, batch, 20)
    assert found == [
        list(model.stream(**inputs(each), max_new_tokens=20, stop_ids=STOPS))
        for each in one_by_one(preset, views)
    ]
    shares = model.label_likelihoods(**inputs(batch), candidates=CANDIDATES)
    model.set_execution(ExecutionConfig(attention="padded"))
    assert _close(shares, model.label_likelihoods(**inputs(batch), candidates=CANDIDATES))


def test_a_window_shorter_than_a_prompt_with_its_labels_is_left_to_transformers() -> None:
    preset = demo()
    views = _masked_views(preset)
    batch = collate(preset, GROUPS, views)
    longest = max(map(len, batch["segments"].questions))
    model = model_of(MistralConfig(**SIZES, sliding_window=longest + 2), preset)
    shares = model.label_likelihoods(**inputs(batch), candidates=CANDIDATES)
    model.set_execution(ExecutionConfig(attention="padded"))
    assert _close(shares, model.label_likelihoods(**inputs(batch), candidates=CANDIDATES))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_reply_streams_as_it_is_given_at_once(name: str) -> None:
    preset = preset_for(name)
    model = model_of(BACKBONES[name], preset)
    for batch in one_by_one(preset, _masked_views(preset)):
        whole = replies(model, batch)[0]
        assert list(model.stream(**inputs(batch), max_new_tokens=12, stop_ids=STOPS)) == whole
        short = list(model.stream(**inputs(batch), max_new_tokens=1, stop_ids=STOPS))
        assert short == whole[:1]


def test_a_stream_can_be_left_and_others_computed_between_its_tokens() -> None:
    preset = demo()
    model = model_of(BACKBONES["llama"], preset)
    batches = one_by_one(preset, _masked_views(preset))
    wanted = [replies(model, batch) for batch in batches]
    longest = max(range(len(wanted)), key=lambda i: len(wanted[i][0]))
    said = []
    for token in model.stream(**inputs(batches[longest]), max_new_tokens=12, stop_ids=STOPS):
        assert not torch.is_inference_mode_enabled()
        assert replies(model, batches[0]) == wanted[0]
        said.append(token)
    assert said == wanted[longest][0]
    left = model.stream(**inputs(batches[longest]), max_new_tokens=12, stop_ids=STOPS)
    next(left)
    left.close()
    assert replies(model, batches[longest]) == wanted[longest]


@pytest.mark.parametrize(
    ("name", "at_once"), [("llama", 1), ("llama", 7), *((name, 512) for name in BACKBONES)]
)
def test_likelihoods_are_those_of_the_training_forward(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate as the answer of a training batch: minus its loss is its log-likelihood."""
    monkeypatch.setattr(decoding, "_SCORED_AT_ONCE", at_once)
    preset = preset_for(name)
    model = model_of(BACKBONES[name], preset)
    views = _masked_views(preset)
    shares = model.label_likelihoods(
        **inputs(collate(preset, GROUPS, views)), candidates=CANDIDATES
    )
    number = 0
    for place, group in enumerate(GROUPS):
        for question in group.questions:
            terms = []
            for ids in CANDIDATES[number]:
                prompt = PromptTokens(question.prompt.head_ids, question.prompt.tail_ids, ids)
                asked = Group(group.record, (Question("emotion", prompt),))
                with torch.no_grad():
                    found = _loss(model, collate(preset, [asked], _rows(views, place), "token"))
                terms.append(math.exp(-float(found["loss_sum"])))
            wanted = [term / sum(terms) for term in terms]
            assert shares[number] == pytest.approx(wanted, rel=1e-9), number
            number += 1


def _close(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    return all(x == pytest.approx(y, rel=1e-6) for x, y in zip(a, b, strict=True))


def test_replies_and_likelihoods_of_one_pass_are_those_of_two() -> None:
    preset = demo()
    model = model_of(BACKBONES["llama"], preset)
    batch = collate(preset, GROUPS, _masked_views(preset))
    limits = [12, 0, 3, 1, 12, 0]
    found = model.answer(
        **inputs(batch), max_new_tokens=limits, stop_ids=STOPS, candidates=CANDIDATES
    )
    alone = replies(model, batch)
    assert [a.ids for a in found] == [ids[:n] for ids, n in zip(alone, limits, strict=True)]
    assert found[3].likelihoods is None  # nothing was offered
    assert found[4].likelihoods == [1.0]
    scored = model.label_likelihoods(**inputs(batch), candidates=CANDIDATES)
    assert [a.likelihoods or [] for a in found] == scored
    model.set_execution(ExecutionConfig(attention="padded"))
    padded = model.answer(
        **inputs(batch), max_new_tokens=limits, stop_ids=STOPS, candidates=CANDIDATES
    )
    assert [a.ids for a in padded] == [a.ids for a in found]
    assert _close([a.likelihoods or [] for a in padded], scored)


def test_steps_move_no_buffer_and_compute_no_row_that_ended() -> None:
    preset = demo()
    model = model_of(BACKBONES["llama"], preset)
    batch = collate(preset, GROUPS, _masked_views(preset))
    with torch.inference_mode():
        embeddings = model.embed(batch["tokens"], batch["masks"], batch["text_ids"], batch["order"])
        prompts = Prompts(model.llm.get_base_model(), embeddings, batch["segments"], 12)
        cache = prompts._cache
        places = [b.data_ptr() for b in (*cache._keys, *cache._values)]
        rows = list(range(6))
        n_computed = []
        while rows:
            prompts.say([5] * len(rows), rows)
            n_computed.append(len(prompts.logits))
            rows = list(range(len(rows) - 1))
        assert n_computed == [6, 5, 4, 3, 2, 1]
        assert places == [b.data_ptr() for b in (*cache._keys, *cache._values)]


@given(data=st.data())
def test_rows_hold_their_own_keys_whoever_leaves(data: st.DataObject) -> None:
    """Against lists: what a row attends to is its prompt and what it said, in order."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    n_steps = data.draw(st.integers(1, 6))
    pack = torch.arange(1, 100, dtype=torch.float64).reshape(1, 1, -1, 1)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    questions = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    cache = RowCache(questions, n_steps, torch.device("cpu"))
    cut = data.draw(st.integers(0, len(lengths)))
    for rows, part in ((slice(0, cut), pack[:, :, : sum(lengths[:cut])]),
                       (slice(cut, len(lengths)), pack[:, :, sum(lengths[:cut]) :])):  # fmt: skip
        if rows.stop > rows.start:
            cache.fill(rows, starts[rows.start])
            assert cache.update(part, -part, 0)[0] is part
    known = [pack[0, 0, places, 0].tolist() for places in questions]
    fresh = 1000.0
    for _ in range(n_steps):
        rows = data.draw(st.sets(st.integers(0, len(known) - 1), min_size=1).map(sorted))
        order = cache.keep(rows)
        assert sorted(order) == rows
        known = [known[row] for row in order]
        visible = cache.open(1)
        new = torch.arange(fresh, fresh + len(known), dtype=torch.float64).reshape(-1, 1, 1, 1)
        fresh += len(known)
        keys, values = cache.update(new, -new, 0)
        cache.n_said += 1
        for row, own in enumerate(known):
            own.append(float(new[row]))
            mask = slice(None) if visible is None else visible[row, 0, 0]
            assert keys[row, 0, mask, 0].tolist() == own
            assert values[row, 0, mask, 0].tolist() == [-x for x in own]


@given(st.data())
def test_a_batch_is_taken_apart_at_the_borders_of_clips(data: st.DataObject) -> None:
    clips = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6)
    )
    limit = data.draw(st.integers(1, 60))
    rows: list[tuple[int, int, int, int]] = []
    at = 0
    for tails in clips:
        shared, at = (at, at + 4), at + 4
        if len(tails) > 1:
            rows.append((*shared, shared[0], shared[0]))
            for n in tails:
                rows.append((at, at + n, *shared))
                at += n
        else:
            rows.append((shared[0], at + tails[0], shared[0], shared[0]))
            at += tails[0]
    whole = Segments(tuple(rows))
    parts = list(decoding.parts_of(whole, limit))
    ends = [end for _, (_, end), _ in parts]
    assert [start for _, (start, _), _ in parts] == [0, *ends[:-1]]
    assert ends[-1] == at
    sizes = [4 + sum(tails) for tails in clips]
    assert all(end - start <= limit or end - start in sizes for _, (start, end), _ in parts)
    places = [p + start for _, (start, _), own in parts for p in own.questions]
    assert all(torch.equal(a, b) for a, b in zip(places, whole.questions, strict=True))
    counted = [i for questions, _, _ in parts for i in range(questions.start, questions.stop)]
    assert counted == list(range(len(whole.questions)))


@pytest.mark.parametrize("limit", [1, 60, 150])
def test_prompts_computed_in_parts_give_the_same_answers(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = demo()
    batch = collate(preset, GROUPS, _masked_views(preset))
    model = EmotionLlama(preset, tiny_llm()).eval().double()
    whole = model.answer(**inputs(batch), max_new_tokens=6, stop_ids=STOPS, candidates=CANDIDATES)
    monkeypatch.setattr(decoding, "PREFILLED_AT_ONCE", limit)
    parts = model.answer(**inputs(batch), max_new_tokens=6, stop_ids=STOPS, candidates=CANDIDATES)
    assert [a.ids for a in parts] == [a.ids for a in whole]
    for a, b in zip(parts, whole, strict=True):
        assert a.likelihoods == pytest.approx(b.likelihoods, abs=1e-12)


def test_half_precision_answers_within_its_rounding() -> None:
    preset = configure(demo(), ["model.llm.dtype=bfloat16"])
    views = _masked_views(preset)
    views = Views({k: v.float() for k, v in views.tokens.items()}, views.masks)
    batch = collate(preset, GROUPS, views)
    model = EmotionLlama(preset, tiny_llm().bfloat16()).eval()
    found = model.answer(**inputs(batch), max_new_tokens=4, stop_ids=STOPS, candidates=CANDIDATES)
    assert all(len(a.ids) <= 4 for a in found)
    whole = EmotionLlama(demo(), tiny_llm()).eval()
    whole.load_state_dict(model.state_dict())
    wanted = whole.label_likelihoods(**inputs(batch), candidates=CANDIDATES)
    for answer, shares in zip(found, wanted, strict=True):
        assert (answer.likelihoods or []) == pytest.approx(shares, abs=0.03)
