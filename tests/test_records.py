"""Which records a run trains and validates on: corpora, and a share that follows from the seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Clip, Record
from cache.errors import CheckpointError, ManifestError
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of, make_clip
from tests.training import header_of, numbers_of
from train.batches.reading import ViewReader
from train.batches.records import records_to_train_on, records_to_validate_on, share_of
from train.config import Preset, configure
from train.estimates.estimate import estimate
from train.loop import train
from train.presets import demo

SPLITS = ("train",) * 6 + ("val",) * 2 + ("test",) * 2
SHORT = [
    "tokens.video=null", "tokens.image=null", "model.fusion.kind=none", "stages.1.tasks={emotion: 1}",
    "stages.0.n_steps=3", "stages.1.n_steps=1", "stages.0.optim.batch_size=2",
    "execution.log_every_steps=1", "execution.n_workers=0",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def record(corpus: str, i: int, split: str = "train") -> Record:
    return Record(
        uid=f"{corpus}/{i}",
        media=f"{i}.mp4",
        clip=Clip(sha256=key_of(f"clip{i}"), n_bytes=1),
        split=split,
        emotion=("happy", "sad")[i % 2],
    )


@pytest.fixture(scope="module")
def corpora(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Manifest, Path, TokenStore]:
    """Three corpora of ten clips each, six of them to train on; all with sound alone."""
    root = tmp_path_factory.mktemp("corpora")
    store = TokenStore.open_or_create(root / "store")
    store.commit(
        specs["audio"], [make_clip(specs["audio"], f"clip{i}") for i in range(10)], {"t": "0"}
    )
    records = tuple(record(c, i, s) for c in ("tv", "web", "film") for i, s in enumerate(SPLITS))
    manifest = Manifest(header=header_of(("happy", "sad")), records=records)
    write_manifest(root / "m.parquet", manifest)
    return manifest, root / "m.parquet", store


def short(*more: str) -> Preset:
    return configure(demo(), [*SHORT, *more])


# --------------------------------------------------------------------------- shares


@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40), min_size=1),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 5),
)
def test_a_smaller_share_is_a_part_of_a_larger_one(
    sizes: dict[str, int], shares: tuple[float, float], seed: int
) -> None:
    records = [record(corpus, i) for corpus, n in sizes.items() for i in range(n)]
    small, large = (share_of(records, share, seed) for share in sorted(shares))
    kept = {r.uid for r in large}
    assert {r.uid for r in small} <= kept
    assert large == [r for r in records if r.uid in kept], "in the order that they came in"
    counts = Counter(r.corpus for r in large)
    for corpus, n in sizes.items():
        assert counts[corpus] >= 1
        assert abs(counts[corpus] - max(shares) * n) < 1
    assert share_of(records, 1, seed) == records
    # What one corpus keeps does not depend on which others there are.
    for corpus in sizes:
        alone = share_of([r for r in records if r.corpus == corpus], max(shares), seed)
        assert alone == [r for r in large if r.corpus == corpus]


def test_a_share_is_counted_without_rounding_errors() -> None:
    records = [record("tv", i) for i in range(100)]
    assert [len(share_of(records, s / 100, 0)) for s in range(1, 101)] == list(range(1, 101))


def test_another_seed_takes_other_records() -> None:
    records = [record("tv", i) for i in range(60)]
    taken = [{r.uid for r in share_of(records, 0.5, seed)} for seed in range(20)]
    assert len({frozenset(t) for t in taken}) == 20
    seen = Counter(uid for t in taken for uid in t)
    assert len(seen) == 60, "over the seeds every record has its turn"
    assert max(seen.values()) < 20


# --------------------------------------------------------------------------- corpora


def test_a_run_trains_and_validates_on_its_corpora_alone(
    corpora: tuple[Manifest, Path, TokenStore],
) -> None:
    manifest, _, store = corpora
    for chosen in (("tv",), ("film", "web")):
        preset = short(f"data.corpora=[{', '.join(chosen)}]")
        reader = ViewReader(store, preset)
        trained = records_to_train_on(manifest, preset, reader)
        validated = records_to_validate_on(manifest, preset, reader)
        assert [r.uid for r in trained] == [
            r.uid for r in manifest.records if r.split == "train" and r.corpus in chosen
        ]
        assert {r.corpus for r in validated} == set(chosen)
        assert len(validated) == 2 * len(chosen)
    everything = records_to_train_on(manifest, short(), ViewReader(store, short()))
    assert len(everything) == 18
    none = short("data.val_split=dev")
    assert records_to_validate_on(manifest, none, ViewReader(store, none)) == []


def test_a_share_is_taken_of_each_corpus_that_is_trained_on(
    corpora: tuple[Manifest, Path, TokenStore],
) -> None:
    manifest, _, store = corpora
    preset = short("data.corpora=[tv, web]", "data.train_share=0.5")
    reader = ViewReader(store, preset)
    counts = Counter(r.corpus for r in records_to_train_on(manifest, preset, reader))
    assert counts == {"tv": 3, "web": 3}
    assert len(records_to_validate_on(manifest, preset, reader)) == 4, "all, whatever the share"


def test_an_unknown_corpus_is_refused_before_anything_runs(
    corpora: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpora
    said = (
        r"data.corpora: no record of split 'train' is of corpus 'flim'\. Did you mean 'film'\?.*"
        r"The split has: film, tv, web\."
    )
    with pytest.raises(ManifestError, match=said):
        train(short("data.corpora=[tv, flim]"), manifest, path, store, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ManifestError, match=said):
        estimate(short("data.corpora=[flim]"), manifest, store, device=_cpu(), flops_per_s=1e9)


def test_training_draws_from_what_is_chosen_and_nothing_else_changes(
    corpora: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    """A run on one corpus of three is the run on a manifest that holds this corpus alone."""
    manifest, path, store = corpora
    chosen = short("data.corpora=[web]")
    train(chosen, manifest, path, store, tmp_path / "chosen")
    own = manifest.model_copy(
        update={"records": tuple(r for r in manifest.records if r.corpus == "web")}
    )
    train(short(), own, path, store, tmp_path / "own")
    assert numbers_of(tmp_path / "chosen") == numbers_of(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"another configuration.*data.train_share"):
        train(
            short("data.corpora=[web]", "data.train_share=0.4"),
            manifest,
            path,
            store,
            tmp_path / "chosen",
        )
    found = estimate(chosen, manifest, store, device=_cpu(), flops_per_s=1e9)
    assert (found.n_records, found.n_val_records) == (6, 2)


def _cpu() -> torch.device:
    return torch.device("cpu")
