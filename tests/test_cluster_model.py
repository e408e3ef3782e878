"""The cluster model against closed forms, the store's true requests, and what must hold in any run."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks import cluster_model as model
from benchmarks.cluster_model import (
    AMENDED,
    AS_IS,
    BUCKET,
    Costs,
    Design,
    Faults,
    FreeUnits,
    Latency,
    Outcome,
    Row,
    Scenario,
    Simulation,
    Spread,
    Store,
    StreamCost,
)
from cache.commit import ClipTokens, Status
from cache.errors import SchemaError
from cache.layout import arrays
from cache.storage import LocalStorage
from cache.store import TokenStore
from train.presets import demo, v2

NO_CPU: dict[str, Any] = {
    "scan_s": 0, "parse_s": 0, "record_s": 0, "merge_s": 0, "plan_s": 0, "plan_bytes": 0,
}  # fmt: skip
AT_ONCE = Latency(median_s=0, p99_s=0)
PERFECT = Store(name="perfect", put=AT_ONCE, get=AT_ONCE, page=AT_ONCE)
FIXED = Store(
    name="fixed latencies",
    put=Latency(median_s=0.5, p99_s=0.5),
    get=Latency(median_s=0.25, p99_s=0.25),
    page=Latency(median_s=0.125, p99_s=0.125),
)
ONE_STREAM = (StreamCost(name="audio", bytes_per_clip=1000, n_arrays=4, batch_clips=32),)


def costs(encode_s: float = 1.0, cv: float = 0.0, **changes: Any) -> Costs:
    given: dict[str, Any] = {
        "name": "test", "source": "made up", "encode": Spread(mean_s=encode_s, cv=cv),
        "decode": Spread(mean_s=0.0), "streams": ONE_STREAM,
    }  # fmt: skip
    return Costs(**(given | changes))


def run(n_clips: int, n_workers: int, unit_clips: int, **changes: Any) -> Outcome:
    given: dict[str, Any] = {"costs": costs(), "store": PERFECT, "design": Design(**NO_CPU)}
    return Simulation(
        Scenario(n_clips=n_clips, n_workers=n_workers, unit_clips=unit_clips, **(given | changes))
    ).run()


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize(
    ("n_clips", "n_workers", "unit_clips"),
    [
        (1024, 1, 32),
        (1024, 7, 32),
        (960, 30, 32),
        (4096, 5, 128),
        (102_400, 7, 32),
        (65_536, 64, 256),
    ],
)
def test_without_variance_and_faults_the_makespan_is_full_rounds_of_units(
    n_clips: int, n_workers: int, unit_clips: int, in_flight: int
) -> None:
    found = run(
        n_clips, n_workers, unit_clips,
        costs=costs(2.0, start_s=5), design=Design(in_flight=in_flight, **NO_CPU),
    )  # fmt: skip
    rounds = math.ceil(n_clips // unit_clips / n_workers)
    assert found.makespan_s == pytest.approx(5 + rounds * unit_clips * 2.0)
    assert found.repeated == 0
    assert found.worker_hours == pytest.approx(n_workers * found.makespan_s / 3600)


def test_one_worker_pays_every_request_that_the_design_makes() -> None:
    put, get, page = 0.5, 0.25, 0.125
    design = Design(in_flight=0, list_age_s=0, index="retaken", snapshot_every=0, **NO_CPU)
    start = get + 2 * page  # the plan; claims and commit records
    claim = 2 * page + put + put  # leases, receipts; lease; what is in the batch
    # Is it committed? Four arrays' metadata; size, index and 32 clips read back.
    commit = get * (1 + 4 + 2 + 32) + put * (1 + 1 + 3 + 1)  # claim, shard, small arrays, record
    receipt = put
    found = run(64, 1, 32, store=FIXED, design=design)
    assert found.makespan_s == pytest.approx(start + 2 * (claim + 32 + commit + receipt))
    ahead = design.model_copy(update={"announce": "ahead"})
    found = run(64, 1, 32, store=FIXED, design=ahead)
    assert found.makespan_s == pytest.approx(start + 2 * (claim - put + 32 + commit + receipt))
    # In the background, the first commit hides behind the second unit.
    found = run(64, 1, 32, store=FIXED, design=design.model_copy(update={"in_flight": 1}))
    assert found.makespan_s == pytest.approx(start + 2 * (claim + 32) + commit + receipt)


def test_a_shard_larger_than_a_part_is_uploaded_in_parts() -> None:
    streams = (StreamCost(name="image", bytes_per_clip=2**20, n_arrays=6),)
    found = model.commit_requests(32, streams, BUCKET, AS_IS)
    assert BUCKET.part_bytes == 8 * 2**20
    # Claim, five small arrays, record; begin, four parts that go at once, complete.
    assert (found.puts, found.puts_in_turn) == (7 + 6, 7 + 3)
    assert found.up_bytes == found.down_bytes == 32 * 2**20


@pytest.mark.parametrize("n_clips", [12_800, 128_000])
def test_a_saturated_store_limits_throughput_to_its_request_rate(n_clips: int) -> None:
    store = PERFECT.model_copy(update={"puts_per_s": 20.0})
    design = Design(
        index="retaken", shard_numbers="listed", list_age_s=0, heartbeat_s=1e9, poll_s=1e3, **NO_CPU
    )
    quick = costs(0.1)
    found = run(n_clips, 64, 32, costs=quick, store=store, design=design)
    # Of each unit: lease, batch, claim, shard, three small arrays, record, receipt; and one refusal.
    assert found.clips_per_s == pytest.approx(20 * 32 / 10, rel=0.03)
    assert found.puts_per_s == pytest.approx(20, rel=0.03)
    twice = run(n_clips, 128, 32, costs=quick, store=store, design=design)
    assert twice.clips_per_s == pytest.approx(found.clips_per_s, rel=0.05)


@pytest.mark.parametrize("n_clips", [19_200, 192_000])
def test_a_saturated_network_limits_throughput_to_its_bandwidth(n_clips: int) -> None:
    store = PERFECT.model_copy(update={"bytes_per_s": 5000.0})
    found = run(n_clips, 32, 32, store=store)
    assert found.clips_per_s == pytest.approx(5000 / 1000, rel=0.03)


def test_far_from_its_limits_a_store_serves_twice_the_workers_twice_as_fast() -> None:
    design = AMENDED.model_copy(update=NO_CPU)
    rates = [run(16_384, n, 32, store=FIXED, design=design).clips_per_s for n in (2, 4, 8)]
    assert rates[1] / rates[0] == pytest.approx(2, rel=0.02)
    assert rates[2] / rates[1] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("n_clips", [19_200, 1_024_000])
def test_trying_numbers_one_by_one_costs_each_commit_one_refusal_per_other_worker(
    n_clips: int,
) -> None:
    # 64 clips a second are encoded, but a number takes 0.75 s to try: at most one shard in that time.
    design = AMENDED.model_copy(update={**NO_CPU, "shard_numbers": "walk"})
    found = run(n_clips, 64, 32, store=FIXED, design=design)
    commit_s = model.commit_requests(32, ONE_STREAM, FIXED, design)
    alone_s = 0.5 * commit_s.puts_in_turn + 0.25 * commit_s.gets_in_turn + 0.5
    assert found.clips_per_s == pytest.approx(64 * 32 / (alone_s + 63 * 0.75), rel=0.1)
    assert found.refused_per_commit == pytest.approx(
        63, rel=0.12
    )  # the first have fewer before them


def test_slow_workers_take_as_many_times_longer() -> None:
    faults = Faults(slow_share=1, slow_factor=2.5)
    assert run(3200, 4, 32, faults=faults).makespan_s == pytest.approx(2.5 * 3200 / 4)


def test_decoding_limits_where_it_is_slower_and_one_long_clip_holds_up_its_shard() -> None:
    slow_decode = costs(1.0, decode=Spread(mean_s=8.0), n_decoders=4)
    found = run(3200, 1, 32, costs=slow_decode)
    assert found.makespan_s == pytest.approx(8 + 3200 * 8 / 4)  # and the first clip is waited for
    assert slow_decode.clip_s == 2
    one_in_two = costs(1.0, decode=Spread(samples_s=(0.0, 500.0)), n_decoders=1000)
    # All but surely each shard holds a long clip.
    assert run(320, 1, 32, costs=one_in_two).makespan_s == pytest.approx(10 * 500, rel=0.11)


def test_measured_costs_are_drawn_and_summed_with_their_own_moments() -> None:
    samples = Spread(samples_s=(1.0, 2.0, 6.0))
    assert samples.moments() == pytest.approx((3.0, 14 / 3))
    spread = Spread(mean_s=3.0, cv=0.5)
    drawn = spread.draw(200_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(3.0, rel=0.01)
    assert drawn.std() == pytest.approx(1.5, rel=0.02)
    for n_clips in (16_000, 160_000):  # clip by clip, and by sums
        found = run(n_clips, 1, 32, costs=costs(encode=samples))
        assert found.makespan_s == pytest.approx(3.0 * n_clips, rel=0.03)


def test_latencies_have_the_stated_median_and_tail() -> None:
    mean, variance = Latency(median_s=0.06, p99_s=0.3).moments()
    sigma = math.sqrt(math.log1p(variance / mean**2))
    assert mean / math.exp(sigma**2 / 2) == pytest.approx(0.06)
    drawn = np.random.default_rng(0).lognormal(math.log(0.06), sigma, 400_000)
    assert np.percentile(drawn, 99) == pytest.approx(0.3, rel=0.02)


# ---------------------------------------------------------------- what must hold in any run


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    clip_s = draw(st.sampled_from([0.1, 1.0]))
    changes = {
        "in_flight": draw(st.integers(0, 2)),
        "lease_timeout_s": draw(st.sampled_from([0.0, 30.0, 120.0])),
        "heartbeat_s": 10.0,
    }
    faults = Faults(
        slow_share=draw(st.sampled_from([0.0, 0.3])),
        kill_mean_s=draw(st.sampled_from([300.0, 1500.0, math.inf])),
        warning_s=draw(st.sampled_from([0.0, 20.0])),
        restart_s=draw(st.sampled_from([0.0, 60.0])),
    )
    return Scenario(
        n_clips=draw(st.sampled_from([1, 31, 33, 500, 2001, 20_001, 50_000])),
        n_workers=draw(st.sampled_from([1, 2, 5, 20])),
        unit_clips=draw(st.sampled_from([1, 8, 32, 33, 100, 256])),
        costs=costs(clip_s, cv=0.5, start_s=3),
        store=draw(st.sampled_from([PERFECT, BUCKET])),
        design=draw(st.sampled_from([AS_IS, AMENDED])).model_copy(update=changes),
        faults=faults,
        seed=draw(st.integers(0, 1000)),
    )


@settings(deadline=None, max_examples=40, derandomize=True)
@given(scenarios())
def test_every_clip_is_committed_once_and_every_second_accounted_for(scenario: Scenario) -> None:
    simulation = Simulation(scenario)
    found = simulation.run()
    assert found.is_complete
    assert found.committed_clips == scenario.n_clips
    assert simulation.done == b"\x01" * simulation.n_units
    assert simulation.n_receipts >= simulation.n_units
    assert not simulation.progress  # nothing is partly done
    assert not simulation.free.n  # and nothing is left
    lived_s = simulation.lived_s
    assert sum(simulation.spent_s) == pytest.approx(lived_s)
    assert lived_s <= scenario.n_workers * found.makespan_s * (1 + 1e-9)
    assert 0 < found.efficiency <= 1.05  # sums of few random costs may fall short of their mean
    assert found.repeated >= 0
    if not found.n_kills:
        assert found.repeated == 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(1, 9), st.booleans()))
)
def test_free_units_are_those_that_were_not_taken(
    n_units: int, steps: list[tuple[int, int, bool]]
) -> None:
    free, wanted, held = FreeUnits(n_units), set(range(n_units)), list[int]()
    for cursor, n, takes in steps:
        if takes and wanted:
            first, got = free.take(cursor % n_units, n)
            units = list(range(first, first + got))
            after = [unit for unit in sorted(wanted) if unit >= cursor % n_units]
            assert first == (after or sorted(wanted))[0]
            assert 1 <= got <= n
            assert wanted.issuperset(units)
            wanted.difference_update(units)
            held += units
        elif held:
            unit = held.pop(cursor % len(held))
            free.give_back(unit, 1, in_part=bool(n % 2))
            wanted.add(unit)
        assert free.n == len(wanted)


def test_a_unit_that_is_done_in_part_is_taken_alone() -> None:
    free = FreeUnits(10)
    assert free.take(0, 10) == (0, 10)
    free.give_back(0, 4)
    free.give_back(4, 1, in_part=True)
    free.give_back(5, 5)
    assert free.take(2, 99) == (2, 2)
    assert free.take(4, 99) == (4, 1)
    assert free.take(4, 99) == (5, 5)
    assert free.take(4, 99) == (0, 2)


def mean_repeated(faults: Faults, n_clips: int) -> float:
    outcomes = [
        run(n_clips, 8, 64, costs=costs(1.0), store=BUCKET, faults=faults, seed=seed)
        for seed in range(6)
    ]
    return float(np.mean([outcome.repeated for outcome in outcomes]))


@pytest.mark.parametrize("n_clips", [10_000, 40_000])
def test_more_kills_never_mean_less_repeated_work_and_a_warning_means_less(n_clips: int) -> None:
    means = (math.inf, 7200, 1800, 450)
    repeated = [mean_repeated(Faults(kill_mean_s=mean_s), n_clips) for mean_s in means]
    assert repeated[0] == 0
    assert repeated == sorted(repeated)
    assert repeated[-1] > 0.02  # half a shard of 32 s in each life of 450 s is 3.6 %
    warned = mean_repeated(Faults(kill_mean_s=450, warning_s=60), n_clips)
    assert warned < repeated[-1] / 10


def test_no_more_than_the_shards_on_their_way_are_lost_in_a_kill() -> None:
    for in_flight in (0, 1):
        design = Design(in_flight=in_flight, **NO_CPU)
        faults = Faults(kill_mean_s=900)
        for n_clips in (10_000, 60_000):
            found = run(n_clips, 4, 256, design=design, faults=faults, store=BUCKET)
            assert found.n_kills > 3
            assert 0 < found.repeated * n_clips <= found.n_kills * 32 * (in_flight + 1)


def test_what_a_killed_worker_held_waits_for_the_lease_timeout() -> None:
    design = Design(lease_timeout_s=5000, heartbeat_s=1.0, **NO_CPU)
    faults = Faults(kill_mean_s=100, restart_s=0)
    found = run(320, 2, 160, design=design, faults=faults, seed=1)
    assert found.n_kills
    assert found.makespan_s > 4999
    prompt = run(320, 2, 160, design=Design(lease_timeout_s=5, **NO_CPU), faults=faults, seed=1)
    assert prompt.makespan_s < 2000


def test_work_that_no_worker_lives_to_finish_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "GIVE_UP_S", 1000.0)
    monkeypatch.setattr(model, "GIVE_UP_AFTER", 2.0)
    found = run(32, 1, 32, costs=costs(100.0), faults=Faults(kill_mean_s=10, restart_s=1))
    assert not found.is_complete
    assert found.committed_clips == 0
    assert found.efficiency == 0


@pytest.mark.parametrize("n_clips", [5000, 100_000])
def test_equal_seeds_give_equal_runs(n_clips: int) -> None:
    def once(seed: int) -> Outcome:
        faults = Faults(kill_mean_s=3600, slow_share=0.2)
        return run(n_clips, 8, 64, costs=model.GPU, store=BUCKET, faults=faults, seed=seed)

    assert once(3) == once(3)
    assert once(3) != once(4)


@pytest.mark.parametrize("design", [AS_IS, AMENDED])
@pytest.mark.parametrize(("n_workers", "unit_clips"), [(1, 32), (16, 128), (48, 8)])
def test_units_in_one_event_come_to_the_same_as_units_one_by_one(
    design: Design, n_workers: int, unit_clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (0, 10**9):
        monkeypatch.setattr(model, "DETAIL_CLIPS", limit)
        found.append(
            run(
                40_000, n_workers, unit_clips, costs=model.GPU, store=BUCKET, design=design,
                faults=Faults(slow_share=0.05),
            )
        )  # fmt: skip
    coarse, fine = found
    assert coarse.n_events < fine.n_events
    for name in ("efficiency", "puts_per_s", "gets_per_s", "hours_per_1000"):
        assert getattr(coarse, name) == pytest.approx(getattr(fine, name), rel=0.1), name


# ---------------------------------------------------------------- the requests are the writer's


class Counting:
    """A storage that is not on this disk, as far as the writer can tell, and counts its calls."""

    def __init__(self, root: Path) -> None:
        self._inner = LocalStorage(root)
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments, **options)

        return counted


def test_a_commit_asks_what_the_writer_asks(tmp_path: Path) -> None:
    TokenStore.open_or_create(tmp_path)
    storage = Counting(tmp_path)
    store = TokenStore(storage)  # type: ignore[arg-type]
    n_clips = 5
    for spec in demo().tokens.all():
        spec = spec.with_weights("00" * 32)
        n_frames = spec.frames.n_frames if spec.frames else 0
        for number in range(2):  # the first creates the arrays
            storage.calls.clear()
            clips = [
                ClipTokens(
                    hashlib.sha256(f"{number}/{place}".encode()).hexdigest(),
                    Status.OK,
                    np.ones(spec.max_shape, np.float32),
                    frame_index=tuple(range(n_frames)),
                    frame_pts_s=tuple(map(float, range(n_frames))),
                )
                for place in range(n_clips)
            ]
            store.commit(spec, clips, {})
        stream = StreamCost(name=spec.stream, bytes_per_clip=1, n_arrays=len(arrays(spec)))
        modelled = model.commit_requests(n_clips, [stream], BUCKET, AS_IS)
        calls = storage.calls
        assert modelled.puts == calls["create"] + calls["replace"] + calls["write"]
        assert modelled.gets == calls["read"] + calls["read_range"] + calls["size"]
        assert not calls["names"]


def test_the_streams_are_those_of_preset_v2() -> None:
    by_name = {stream.name: stream for stream in model.GPU.streams}
    for spec in v2().tokens.all():
        stream = by_name[spec.stream]
        assert stream.n_arrays == len(arrays(spec))
        assert spec.dtype == "float16"
        n_tokens = 4 * 50 if spec.stream == "audio" else spec.max_shape[0]
        assert stream.bytes_per_clip == n_tokens * math.prod(spec.max_shape[1:]) * 2


# ---------------------------------------------------------------- what is put in and out


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        run(10, 0, 32)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Spread(mean_s=-1.0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Spread(samples_s=(1.0, -1.0))
    with pytest.raises(ValidationError, match="finite"):
        Spread(mean_s=math.nan)
    with pytest.raises(ValidationError, match="either mean_s"):
        Spread(mean_s=1.0, samples_s=(1.0,))
    with pytest.raises(ValidationError, match="p99_s is at least median_s"):
        Latency(median_s=0.2, p99_s=0.1)
    with pytest.raises(
        ValidationError, match=r"100 heartbeats every 1 s are more than .* \(50 PUT/s\)"
    ):
        run(
            10, 100, 32,
            store=PERFECT.model_copy(update={"puts_per_s": 50.0}), design=Design(heartbeat_s=1),
        )  # fmt: skip


def test_costs_are_read_from_json_and_unknown_fields_are_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    good = {
        "name": "a machine", "source": "measured", "encode": {"samples_s": [0.5, 1.5]},
        "decode": {"mean_s": 0.25, "cv": 1}, "n_decoders": 2,
    }  # fmt: skip
    path.write_text(json.dumps(good))
    found = model.read_costs(path)
    assert found.clip_s == 1.0
    assert found == Costs.model_validate_json(found.model_dump_json())
    path.write_text(json.dumps({**good, "n_decoder": 2}))
    with pytest.raises(
        SchemaError, match=r"unknown field 'n_decoder'. Did you mean 'n_decoders'\?"
    ):
        model.read_costs(path)
    path.write_text(json.dumps({**good, "encode": {"mean_s": -0.5}}))
    with pytest.raises(SchemaError, match=r"'encode.mean_s': .* \(got -0.5\)"):
        model.read_costs(path)
    path.write_text("{")
    with pytest.raises(SchemaError, match="not a JSON document"):
        model.read_costs(path)
    with pytest.raises(SchemaError, match="cannot be read"):
        model.read_costs(tmp_path / "none.json")


def row(unit_clips: int, clips_per_s: float, repeated: float) -> Row:
    outcome = run(32, 1, 32).model_copy(update={"clips_per_s": clips_per_s, "repeated": repeated})
    return Row(n_clips=32, n_workers=1, unit_clips=unit_clips, outcome=outcome)


def test_the_recommended_unit_is_nearly_the_fastest_and_of_those_repeats_least() -> None:
    rows = [row(8, 90, 0.0), row(32, 99.5, 0.01), row(64, 100, 0.02), row(128, 99.1, 0.02)]
    assert model.recommend(rows).unit_clips == 32
    rows = [row(8, 90, 0.0), row(32, 99.5, 0.02), row(64, 100, 0.02), row(128, 98.9, 0.0)]
    assert model.recommend(rows).unit_clips == 64  # of equals the larger


def test_the_program_prints_saves_and_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, measured = tmp_path / "out.json", tmp_path / "costs.json"
    measured.write_text(costs(0.5, start_s=1).model_dump_json())
    options = ["--clips", "2000", "--workers", "1,3", "--costs", str(measured)]
    options += ["--json", str(saved), "--price-per-worker-hour", "2.5"]
    monkeypatch.setattr(sys, "argv", ["cluster_model.py", *options])
    model.main()
    printed = capsys.readouterr().out
    assert "test, amended, killed with notice: efficiency, %" in printed
    assert "price/1000" in printed
    found = json.loads(saved.read_text())
    assert [case["title"] for case in found["cases"]] == [
        "test, the code as it is",
        "test, amended",
        "test, amended, killed",
        "test, amended, killed with notice",
    ]
    for case in found["cases"]:
        assert len(case["rows"]) == 2 * len(model.GPU_UNITS)
        assert len(case["recommended"]) == 2
        assert all(row["outcome"]["committed_clips"] == 2000 for row in case["rows"])
    hours = found["cases"][1]["recommended"][0]["outcome"]["hours_per_1000"]
    assert f"{2.5 * hours:.3g}" in printed


@pytest.mark.slow
def test_the_plot_of_equal_runs_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(model, "PLOT_CLIPS", 2000)
    monkeypatch.setattr(model, "PLOT_WORKERS", (1, 2))
    killed = [case for case in model.cases(None, (2000,), (64,)) if "killed" in case.title]
    tables = {case.title: model.run_case(case, seed=0) for case in killed}
    for name in ("a.svg", "b.svg"):
        model.plot(tmp_path / name, model.GPU, tables, seed=0)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_the_program_says_what_is_wrong_with_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["cluster_model.py", "--costs", str(path)])
    with pytest.raises(SystemExit, match="missing field 'encode'"):
        model.main()
    monkeypatch.setattr(sys, "argv", ["cluster_model.py", "--clips", "100", "--workers", "0"])
    with pytest.raises(SystemExit):
        model.main()
    assert "--workers: 0 is less than 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cluster_model.py", "--clips", "100", "--workers", "5000"])
    with pytest.raises(
        SystemExit, match=r"'n_workers': .* less than or equal to 4096 \(got 5000\)"
    ):
        model.main()
