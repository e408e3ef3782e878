"""Asking a run about MMEVerse-Bench: what is asked together, what is written, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import CacheMissError, ManifestError, PredictionError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.asking import journal as journal_module
from eval.asking.journal import Journal, read_journal
from eval.asking.plan import plan_benchmarks
from eval.benchmarks import benchmark, benchmarks
from eval.generate import Asker, Item, TrainedRun, generate, load_run, read_reply, space_of
from eval.predictions import Prediction, line_of, read_predictions
from tests.asking import N_TOKENS, SETS, ask, ask_and_die
from tests.bench import bench_manifest, write_bench_store
from tests.conftest import key_of, make_clip
from tests.training import end, make_corpus, start
from train.batches.reading import ViewReader
from train.config import configure
from train.data import Renderer
from train.llm.attention import attention_of
from train.loop import train
from train.mixture import Ask
from train.presets import demo
from train.text.wording import Wording

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SHORT = [
    "stages.0.n_steps=2", "stages.1.n_steps=2", "stages.0.optim.batch_size=2",
    "stages.1.optim.batch_size=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> Path:
    """A tiny run, trained for four steps."""
    root = tmp_path_factory.mktemp("asking-run")
    manifest, store = make_corpus(root, specs)
    train(
        configure(demo(), SHORT),
        read_manifest(manifest),
        manifest,
        TokenStore.open(str(store)),
        root / "run",
    )
    return root / "run"


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Manifest, TokenStore]:
    """Every 301st record of the synthetic bench: not a multiple of 5, so that most have a subtitle."""
    return bench_manifest(301), write_bench_store(tmp_path_factory.mktemp("bench") / "store", specs)


@pytest.fixture(scope="module")
def trained(run: Path, bench: tuple[Manifest, TokenStore]) -> TrainedRun:
    return load_run(run, header=bench[0].header)


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory,
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
) -> Path:
    """The predictions of a call that nothing happened to."""
    path = ask(trained, bench, tmp_path_factory.mktemp("asked") / "out", likelihoods=True)
    assert path is not None
    return path


def test_every_item_of_every_set_is_asked_once_in_the_order_of_the_manifest(
    asked: Path, bench: tuple[Manifest, TokenStore]
) -> None:
    found = read_predictions(asked)
    wanted = [
        (record.uid, name)
        for record in bench[0].records
        for name in SETS
        if name in record.benchmarks
    ]
    assert [(p.uid, p.benchmark) for p in found] == wanted
    assert len(wanted) > 30
    assert {p.benchmark for p in found} == set(SETS)
    assert (asked.parent / "skipped.jsonl").read_bytes() == b""


def test_predictions_say_all_that_scores_and_reports_need(
    asked: Path, bench: tuple[Manifest, TokenStore], trained: TrainedRun
) -> None:
    records = {record.uid: record for record in bench[0].records}
    for p in read_predictions(asked):
        record, row = records[p.uid], benchmark(str(p.benchmark))
        assert p.task == row.task
        assert p.split == record.split
        assert p.n_tokens is not None
        assert p.n_tokens <= N_TOKENS
        assert p.run == trained.info.run_id
        truths = tuple(row.merged.get(t, t) for t in record.labels_of(row.field))
        assert truths == (p.truths or (p.truth,))
        if p.label is not None:
            assert p.label in row.options
        assert p.about is not None
        assert p.about.language == record.language
        assert p.about.duration_s == record.clip.duration_s  # type: ignore[union-attr]
        assert p.about.subtitle == record.subtitle()
        assert p.about.media == record.media
        assert p.about.absent == ()
        if row.id == "ov-merd":
            assert p.likelihoods is None
        else:
            assert p.likelihoods is not None
            assert tuple(p.likelihoods) == row.options
            assert math.fsum(p.likelihoods.values()) == pytest.approx(1)


def test_excited_counts_as_happiness_in_iemocap(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    record = next(r for r in bench[0].records if "iemocap" in r.benchmarks)
    excited = record.model_copy(update={"emotion": "excited"})
    manifest = Manifest(header=bench[0].header, records=(excited,))
    path = ask(trained, (manifest, bench[1]), tmp_path / "out", ["iemocap"])
    assert path is not None
    assert [p.truth for p in read_predictions(path)] == ["happiness"]


def test_replies_are_those_of_the_model_asked_alone(
    asked: Path, bench: tuple[Manifest, TokenStore], trained: TrainedRun
) -> None:
    """Rendered, embedded and generated here, by transformers, one question at a time."""
    records = {record.uid: record for record in bench[0].records}
    reader = ViewReader(bench[1], trained.preset)
    renderer = Renderer(trained.preset, trained.tokenizer, trained.header)
    base = trained.model.llm.get_base_model()
    table = base.get_input_embeddings()
    n_checked = 0
    for p in read_predictions(asked)[::3]:
        record, row = records[p.uid], benchmark(str(p.benchmark))
        question = Ask(row.task, 0, row.options)  # type: ignore[arg-type]
        prompt = renderer.question(record, question, with_answer=False, vary=False).prompt
        assert ", ".join(row.options) in trained.tokenizer.decode(prompt.tail_ids) or (
            row.id == "ov-merd"  # some of its templates list no examples
        )
        views = reader.read([record])
        with torch.inference_mode(), attention_of(base, "sdpa"):
            prefix = trained.model.prefix(views.tokens, views.masks)[0]
            valid = torch.cat(
                [
                    torch.ones(trained.preset.layout().blocks[0][1], dtype=torch.bool),
                    *(views.masks[name][0] for name in trained.preset.layout().names[1:]),
                ]
            )
            head, tail = (table(torch.tensor(ids)) for ids in (prompt.head_ids, prompt.tail_ids))
            sequence = torch.cat([head, prefix[valid], tail])
            ids = base.generate(
                inputs_embeds=sequence[None],
                attention_mask=torch.ones(1, len(sequence), dtype=torch.long),
                max_new_tokens=N_TOKENS,
                do_sample=False,
                eos_token_id=list(renderer.turns.stop_ids),
                pad_token_id=0,
            )
        assert trained.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == p.reply
        n_checked += 1
    assert n_checked > 10


def test_questions_about_a_clip_share_its_prefix(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], asked: Path, tmp_path: Path
) -> None:
    asker = Asker(trained, bench[1], max_new_tokens=N_TOKENS)
    pairs = plan_benchmarks(asker, bench[0], ["meld-e", "meld-s"], trained.preset.data)
    both = [c for b in pairs.batches for c in b if len(c.items) == 2]
    assert len(both) > 3
    for clip in both:
        one = clip.group.n_positions
        apart = sum(
            len(q.prompt.head_ids) + clip.group.n_prefix + len(q.prompt.tail_ids)
            for q in clip.group.questions
        )
        assert apart - one == clip.group.n_prefix + len(clip.group.questions[0].prompt.head_ids)
    known = {p.key: p.reply for p in read_predictions(asked)}
    for name in ("meld-e", "meld-s"):
        path = ask(trained, bench, tmp_path / name, [name])
        assert path is not None
        for p in read_predictions(path):
            assert p.reply == known[p.key]


def test_clips_come_by_length_in_batches_that_follow_from_the_plan_alone(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore]
) -> None:
    asker = Asker(trained, bench[1])
    plans = [
        plan_benchmarks(asker, bench[0], SETS, trained.preset.data, batch_size=4) for _ in range(2)
    ]
    assert plans[0] == plans[1]
    assert plans[0].digest == plans[1].digest
    lengths = [clip.group.n_positions for batch in plans[0].batches for clip in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert {len(batch) for batch in plans[0].batches[:-1]} == {4}
    other = plan_benchmarks(asker, bench[0], SETS, trained.preset.data, batch_size=5)
    assert other.digest != plans[0].digest
    less = Manifest(header=bench[0].header, records=bench[0].records[1:])
    assert plan_benchmarks(asker, less, SETS, trained.preset.data).digest != plans[0].digest


def test_a_sample_is_the_same_records_in_every_set(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore]
) -> None:
    asker = Asker(trained, bench[1])
    plan = plan_benchmarks(
        asker, bench[0], ["mc-eiu", "mc-eiu-i", "mer2023"], trained.preset.data, sample=1
    )
    assert sorted(key[3] for key in plan.order) == ["mc-eiu", "mc-eiu-i", "mer2023"]
    assert len({key[0] for key in plan.order}) == 2


def test_reasoning_asks_the_joint_tasks_and_scores_the_same_labels(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], asked: Path, tmp_path: Path
) -> None:
    path = ask(trained, bench, tmp_path / "out", reasoning=True, likelihoods=True)
    assert path is not None
    tasks = {p.benchmark: p.task for p in read_predictions(path)}
    assert tasks == {
        "meld-e": "think", "meld-s": "think-sentiment", "mafw": "think",
        "mafw-m": "think-multi-label", "iemocap": "think", "ov-merd": "open-vocabulary",
        "sims": "think-sentiment",
    }  # fmt: skip
    plain = {(p.uid, p.benchmark): p.likelihoods for p in read_predictions(asked)}
    for p in read_predictions(path):
        known = plain[p.uid, p.benchmark]
        if known is None:
            assert p.likelihoods is None
        else:
            assert p.likelihoods == pytest.approx(known, rel=1e-4)


def test_options_of_a_question_stand_in_for_the_label_space() -> None:
    """In their order, in training too; no space is needed, and aliases that still fit are read."""
    wording = Wording(demo(), Header(media_root="."))
    made = Record(uid="x/1", media="1.mp4", emotion="joy", emotion_multi=("b", "a"))
    ask = Ask("emotion", 3, ("joy", "anger", "boredom"))
    assert wording.instruction(made, ask)[1] == ("joy", "anger", "boredom")
    found = wording.render(made, ask, with_answer=True)
    assert "joy, anger, boredom" in found.tail
    assert found.answer == "joy"
    several = wording.render(made, Ask("multi-label", 0, ("a", "b", "c")), with_answer=True)
    assert several.answer == "a, b"
    for task, options in (("emotion", ("anger", "fear")), ("multi-label", ("a", "c"))):
        with pytest.raises(SchemaError, match="is not an option"):
            wording.render(made, Ask(task, 0, options), with_answer=True)  # type: ignore[arg-type]
        assert wording.render(made, Ask(task, 0, options), with_answer=False).answer is None  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="no label space"):
        wording.render(made, Ask("emotion", 0), with_answer=False)
    own = LabelSpace(
        name="emotion", labels=("joy", "fear"), aliases={"glad": "joy", "afraid": "fear"}
    )
    spaced = Wording(demo(), Header(media_root=".", label_spaces={"emotion": own}))
    space = space_of(made, ask, spaced)
    assert space is not None
    assert space.labels == ("joy", "anger", "boredom")
    assert space.aliases == {"glad": "joy"}
    read = read_reply("Glad.", made, Item(ask), spaced)
    assert (read["label"], read["parse"], read["truth"]) == ("joy", "alias", "joy")
    assert read_reply("fear", made, Item(ask), spaced)["parse"] == "off_list"


# ---------------------------------------------------------------- continuing


def copy_of(asked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(asked.parent, tmp_path / "copy")) / asked.name


def damage(lines: list[bytes], how: str) -> bytes:
    middle = len(lines) // 2
    if how == "cut":
        return b"\n".join(lines)[: -len(lines[-1]) // 2]
    if how == "changed":
        lines[middle] = lines[middle].replace(b'"reply":"', b'"reply":"not ', 1)
    if how == "foreign":
        lines.insert(middle, line_of(_prediction("other/1"))[:-1])
    if how == "no checksum":
        data = json.loads(lines[middle])
        del data["crc32c"]
        lines[middle] = json.dumps(data).encode()
    if how == "noise":
        lines[middle] = b"\xff\x00 { not JSON"
    if how == "empty":
        return b""
    return b"\n".join(lines) + b"\n"


def _prediction(uid: str) -> Prediction:
    return Prediction(
        uid=uid, task="emotion", reply="x", label=None, parse="off_list", truth=None, run="r",
        spec_ids={},
    )  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "changed", "foreign", "no checksum", "noise", "empty"])
def test_damaged_lines_are_set_aside_and_asked_again(
    how: str, trained: TrainedRun, bench: tuple[Manifest, TokenStore], asked: Path, tmp_path: Path
) -> None:
    path = copy_of(asked, tmp_path)
    whole = path.read_bytes()
    given = damage(whole.splitlines(), how)
    path.write_bytes(given)
    told: list[int] = []
    assert ask(trained, bench, path.parent, likelihoods=True, on_replies=told.append) == path
    assert path.read_bytes() == whole
    kept = [line for line in given.splitlines() if line + b"\n" in whole]
    assert sum(told) == len(whole.splitlines())
    assert (told[0] if kept else 0) == len(kept)
    aside = path.with_name("predictions.jsonl.damaged")
    bad = [line for line in given.splitlines() if line not in kept]
    assert (aside.read_bytes().splitlines() if aside.exists() else []) == bad


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"max_new_tokens": 7}, r"max_new_tokens: 6 there, 7 now"),
        ({"batch_size": 5}, r"batch_size: 4 there, 5 now; plan: "),
        ({"names": SETS[:-1]}, r"benchmarks: .*plan: "),
        ({"likelihoods": False}, r"likelihoods: True there, False now"),
        ({"reasoning": True}, r"reasoning: False there, True now"),
        ({"sample": 2}, r"sample: None there, 2 now"),
    ],
)
def test_other_settings_are_refused_by_name(
    other: dict[str, Any],
    message: str,
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
    asked: Path,
) -> None:
    before = asked.read_bytes()
    with pytest.raises(PredictionError, match=f"replies to other questions .*{message}"):
        ask(trained, bench, asked.parent, **{"likelihoods": True, **other})
    assert asked.read_bytes() == before


def test_other_weights_or_texts_are_refused(
    run: Path,
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
    asked: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    parts = sorted(other.glob("*/final/fusion_adapters.safetensors"))[-1]
    data = bytearray(parts.read_bytes())
    data[-1] ^= 1
    parts.write_bytes(data)
    with pytest.raises(PredictionError, match=r"weights_sha256\.fusion_adapters\.safetensors"):
        ask(load_run(other, header=bench[0].header), bench, asked.parent, likelihoods=True)
    silent = load_run(run, overrides=["prompt.use_subtitle=false"], header=bench[0].header)
    with pytest.raises(
        PredictionError, match=r"plan: .*; preset\.prompt\.use_subtitle: True there"
    ):
        ask(silent, bench, asked.parent, likelihoods=True)


def test_predictions_of_unknown_settings_are_left_alone(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    (tmp_path / "predictions.jsonl").write_text("mine\n")
    with pytest.raises(PredictionError, match=r"no asked\.json that says what was asked"):
        ask(trained, bench, tmp_path)
    assert (tmp_path / "predictions.jsonl").read_text() == "mine\n"


def test_parts_in_any_order_and_of_any_number_make_the_same_file(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], asked: Path, tmp_path: Path
) -> None:
    for parts in ([(2, 3), (0, 3), (1, 3)], [(1, 2), (0, 3), (0, 1)]):
        out = tmp_path / str(len(parts)) / str(parts[0][1])
        for part in parts[:-1]:
            assert ask(trained, bench, out, likelihoods=True, shard=part) is None
        told: list[int] = []
        last = ask(trained, bench, out, likelihoods=True, shard=parts[-1], on_replies=told.append)
        assert last == out / "predictions.jsonl"
        assert last.read_bytes() == asked.read_bytes()
        first = ask(trained, bench, out, likelihoods=True, shard=parts[0])
        assert first == last, "whoever comes later has it too"


def test_only_one_process_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with (
        Journal(path, ()),
        pytest.raises(PredictionError, match="another process is asking"),
        Journal(path, ()),
    ):
        pass
    with Journal(path, ()):
        pass  # free again


@pytest.mark.fault("full disk while a batch is written")
def test_a_full_disk_loses_nothing(
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = 0
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal written
        if written > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = real(descriptor, data[:700])
        written += n
        return n

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", write)
        with pytest.raises(PredictionError, match=r"No space left.*run the same command again"):
            ask(trained, bench, tmp_path / "out", likelihoods=True)
    assert (tmp_path / "out/predictions.jsonl").stat().st_size > 3000
    path = ask(trained, bench, tmp_path / "out", likelihoods=True)
    assert path is not None
    assert path.read_bytes() == asked.read_bytes()


@given(data=st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    made = [_prediction(f"a/{i}") for i in range(4)]
    lines = [line_of(p) for p in made]
    whole = b"".join(lines)
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at])
    found, damaged = read_journal(path, {p.key for p in made})
    n_whole = whole[:at].count(b"\n")
    assert list(found.values()) == lines[:n_whole]
    assert b"".join(found.values()) + b"".join(damaged) == whole[:at]


# ---------------------------------------------------------------- kills


@pytest.mark.fault("kill -9 while asking")
@pytest.mark.parametrize("n_rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_writes_the_file_of_a_quiet_night(
    n_rounds: int,
    run: Path,
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
    asked: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    from cache.manifest import write_manifest

    write_manifest(tmp_path / "m.parquet", bench[0])
    chance = random.Random(n_rounds)
    n_kills = 0
    for number in range(n_rounds):
        out = tmp_path / f"out{number}"
        shard = (0, 1) if number % 2 == 0 else (1, 2)
        for _ in range(2 if n_rounds > 2 else 1):
            process = start(
                ask_and_die,
                run,
                tmp_path / "m.parquet",
                str(bench[1].root),
                out,
                chance.randrange(1, 9000),
                shard,
                log=tmp_path / "log",
            )
            codes = end(process)
            assert codes in ([-9], [0]), (tmp_path / "log").read_text()
            n_kills += codes == [-9]
        known = {}
        for path in out.glob("predictions*.jsonl"):
            known.update(read_journal(path, {p.key for p in read_predictions(asked)})[0])
        path = ask(trained, bench, out, likelihoods=True)
        assert path is not None
        assert path.read_bytes() == asked.read_bytes()
        assert set(known.values()) <= set(asked.read_bytes().splitlines(keepends=True))
    assert n_kills >= n_rounds / 2
    record_property("faults", ("kill -9 while asking", n_kills - 1))


# ---------------------------------------------------------------- what is left out, and refused


@pytest.fixture
def gaps(tmp_path: Path, specs: dict[str, TokenSpec]) -> tuple[Manifest, TokenStore]:
    """Clips with tokens; without sound; with failed pictures; with nothing. One record has no truth."""
    store = TokenStore.open_or_create(tmp_path / "gaps")
    lacks = {
        "whole": {},
        "silent": {"audio": Status.ABSENT},
        "broken": {"video": Status.FAILED, "image": Status.FAILED},
        "nothing": dict.fromkeys(("audio", "video", "image"), Status.ABSENT),
    }
    for spec in specs.values():
        clips = [
            ClipTokens(key_of(name), own[spec.stream], reason="made")
            if spec.stream in own and own[spec.stream] is Status.FAILED
            else ClipTokens(key_of(name), own[spec.stream])
            if spec.stream in own
            else make_clip(spec, name)
            for name, own in lacks.items()
        ]
        store.commit(spec, clips, {"torch": "0"})
    records = [
        Record(
            uid=f"dfew/{name}",
            media=f"{name}.mp4",
            clip=Clip(sha256=key_of(name), n_bytes=1),
            split="test",
            emotion="happy",
            benchmarks=("dfew",),
        )
        for name in lacks
    ]
    records.append(records[0].model_copy(update={"uid": "dfew/untold", "emotion": None}))
    space = LabelSpace(name="dfew/emotion", labels=benchmark("dfew").options)
    header = Header(media_root=".", label_spaces={"dfew/emotion": space})
    return Manifest(header=header, records=tuple(records)), store


def skipped_of(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert all(row["benchmark"] == "dfew" for row in rows)
    return {row["uid"].partition("/")[2]: row["reason"] for row in rows}


def test_what_is_not_asked_is_told_with_the_reason(
    run: Path, gaps: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    masked = load_run(run, overrides=["data.absent=mask", "data.failed=mask"])
    path = ask(masked, gaps, tmp_path / "mask", ["dfew"])
    assert path is not None
    found = {p.uid: p for p in read_predictions(path)}
    assert sorted(found) == ["dfew/broken", "dfew/silent", "dfew/whole"]
    about = found["dfew/broken"].about
    assert about is not None
    assert set(about.absent) == {"image", "video"}
    assert skipped_of(path.parent) == {
        "untold": "no truth: the record has nothing in 'emotion'",
        "nothing": "no stream has tokens",
    }
    dropping = load_run(run, overrides=["data.absent=drop", "data.failed=drop"])
    path = ask(dropping, gaps, tmp_path / "drop", ["dfew"])
    assert path is not None
    assert [p.uid for p in read_predictions(path)] == ["dfew/whole"]
    told = skipped_of(path.parent)
    assert told["silent"] == "audio absent, and data.absent is 'drop'"
    assert told["broken"] == "image, video failed, and data.failed is 'drop'"
    refusing = load_run(run, overrides=["data.absent=refuse"])
    with pytest.raises(CacheMissError, match=r"dfew/silent: audio is absent"):
        ask(refusing, gaps, tmp_path / "refuse", ["dfew"])
    assert not (tmp_path / "refuse").exists()


def test_a_clip_that_was_never_extracted_is_refused_before_anything_is_asked(
    run: Path, gaps: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    manifest, store = gaps
    new = manifest.records[0].model_copy(
        update={"uid": "dfew/new", "clip": Clip(sha256=key_of("new"), n_bytes=1)}
    )
    more = Manifest(header=manifest.header, records=(*manifest.records, new))
    with pytest.raises(CacheMissError, match="dfew/new"):
        ask(load_run(run, overrides=["data.failed=mask"]), (more, store), tmp_path / "o", ["dfew"])
    assert not (tmp_path / "o").exists()


def test_wrong_names_and_parts_are_refused(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    with pytest.raises(SchemaError, match=r"unknown benchmark 'dfw'.*Did you mean 'dfew'"):
        ask(trained, bench, tmp_path, ["dfw"])
    with pytest.raises(ManifestError, match="'dfew' is asked for twice"):
        ask(trained, bench, tmp_path, ["dfew", "dfew"])
    one = Manifest(
        header=bench[0].header,
        records=tuple(r for r in bench[0].records if "bold" in r.benchmarks),
    )
    with pytest.raises(ManifestError, match=r"scored by benchmark 'dfew'.*It has records of: bold"):
        ask(trained, (one, bench[1]), tmp_path, ["dfew"])
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(SchemaError, match="give I/N"):
            ask(trained, bench, tmp_path, shard=shard)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_evaluation_has_likelihoods_over_the_records_own_labels(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore]
) -> None:
    records = [r for r in bench[0].records if r.corpus == "dfew"][:5]
    plain = list(generate(trained, bench[1], records, max_new_tokens=N_TOKENS))
    assert all(p.likelihoods is None for p in plain)
    found = list(
        generate(
            trained, bench[1], records, max_new_tokens=N_TOKENS, likelihoods=True, batch_size=2
        )
    )
    assert [p.reply for p in found] == [p.reply for p in plain]
    space = bench[0].header.space("dfew", "emotion")
    assert space is not None
    for p in found:
        assert p.likelihoods is not None
        assert tuple(p.likelihoods) == space.labels
    thought = list(
        generate(
            trained, bench[1], records, task="think", max_new_tokens=N_TOKENS, likelihoods=True
        )
    )
    for p, q in zip(thought, found, strict=True):
        assert p.likelihoods == pytest.approx(q.likelihoods, rel=1e-4)


def test_all_eighteen_sets_are_asked(
    trained: TrainedRun, bench: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    path = ask(trained, bench, tmp_path / "out", list(benchmarks()), sample=1, batch_size=32)
    assert path is not None
    found = read_predictions(path)
    assert sorted(p.benchmark or "" for p in found) == sorted(benchmarks())
