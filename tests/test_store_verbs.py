"""`emocache store ...` as a user types it, on a store that the demo's encoders made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import emocache
from cache import layout
from cache.errors import StoreError
from cache.manifest import read_manifest
from cache.store import TokenStore
from eval.verbs import console
from eval.verbs.store import VERBS
from extract.encoders.bank import EncoderBank
from extract.plan import NEVER, OTHER_SPEC, RETRY, make_plan
from tests.media import write_clip
from train.config import configure
from train.presets import demo


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 220)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with media, a manifest and an extracted store; tests copy what they change."""
    root = tmp_path_factory.mktemp("verbs")
    (root / "clips").mkdir()
    for seed in range(4):
        write_clip(root / "clips" / f"c{seed}.mp4", seed=seed)
    (root / "clips" / "broken.mp4").write_text("no media")
    assert emocache.main(["index", str(root / "clips"), "--out", str(root / "m.parquet")]) == 1
    given = ["--manifest", str(root / "m.parquet"), "--store", str(root / "s")]
    assert emocache.main(["extract", "demo", *given]) == 1  # the broken one failed
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = emocache.main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_help_shows_the_verbs_in_the_order_of_their_purpose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, shown, _ = run(capsys, "store", "--help")
    assert code == 0
    places = [shown.index(f"│ {verb} ") for verb in VERBS]
    assert places == sorted(places)


def test_plan_counts_hits_and_misses_by_reason(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = ["--manifest", made / "m.parquet", "--store", made / "s"]
    code, shown, _ = run(capsys, "store", "plan", "demo", *write)
    assert code == 0
    assert "in the store" in shown
    assert NEVER not in shown
    code, shown, _ = run(capsys, "store", "plan", "demo", *write, "--retry-failed")
    assert RETRY in shown
    # A finer grid cannot be had from a coarser one, a coarser one can from a finer.
    code, shown, _ = run(capsys, "store", "plan", "demo", *write, "tokens.video.grid=4")
    assert OTHER_SPEC in shown
    code, shown, _ = run(capsys, "store", "plan", "demo", *write, "tokens.video.grid=1")
    assert code == 0
    assert "come from the richer spec" in shown
    TokenStore.open_or_create(tmp_path / "empty")
    write = ["--manifest", made / "m.parquet", "--store", tmp_path / "empty"]
    code, shown, _ = run(capsys, "store", "plan", "demo", *write)
    assert NEVER in shown
    assert "≈" in shown


def test_the_bytes_of_a_plan_are_about_what_is_written(made: Path, tmp_path: Path) -> None:
    records = [r for r in read_manifest(made / "m.parquet").records if "broken" not in r.media]
    store = TokenStore.open(made / "s")
    plan = make_plan(records, demo().tokens.all(), TokenStore.open_or_create(tmp_path / "empty"))
    for spec in store.specs.values():
        (label,) = (label for label in plan.labels if label.startswith(spec.stream))
        stored = sum(
            store.read(spec, entry.key).tokens.nbytes
            for entry in store.index(spec)
            if entry.valid_len
        )
        # Sound may be some hundredths of a second longer than its container says.
        assert stored * 0.9 <= plan.n_bytes[label] <= stored * 1.1


def test_extraction_encodes_nothing_that_a_richer_spec_holds(
    made: Path, tiny_weights: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--manifest", made / "m.parquet", "--store", made / "s"]
    before = set(TokenStore.open(made / "s").specs)
    code, shown, _ = run(capsys, "extract", "demo", *given, "tokens.video.grid=1")
    assert code == 1, "the broken clip is still failed"
    assert "nothing to do" in shown
    assert set(TokenStore.open(made / "s").specs) == before
    preset = configure(demo(), ["tokens.video.grid=1"])
    bank = EncoderBank(preset.tokens.all(), tiny_weights)
    store = TokenStore.open(made / "s")
    plan = make_plan(read_manifest(made / "m.parquet").records, bank.specs, store)
    assert not plan.units
    assert sum(plan.served[plan.labels[1]].values()) == 5


def test_diff_prints_the_differing_fields_and_nothing_else(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "store", "diff", "v2/video", "v2/image")
    assert code == 1
    assert {line.split(":")[0] for line in shown.splitlines()} == {
        "frames.kind", "frames.n_frames", "grid", "pixels.size_px", "stream",
    }  # fmt: skip
    code, shown, _ = run(capsys, "store", "diff", "v2/video", "v2/video")
    assert (code, shown) == (0, "")
    code, shown, _ = run(capsys, "store", "diff", "demo/audio", "audio", "--store", made / "s")
    assert code == 1
    assert shown.startswith("encoder.weights_sha256: None '")
    assert len(shown.splitlines()) == 1
    code, _, problem = run(capsys, "store", "diff", "v2/video", "v3/video")
    assert code == 2
    assert "v3" in problem


def test_verify_doctor_and_deep_verification(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "s", tmp_path / "s")
    code, shown, problem = run(
        capsys, "store", "verify", tmp_path / "s", "--manifest", made / "m.parquet",
        "--deep", 2, "--preset", "demo",
    )  # fmt: skip
    assert code == 0, shown + problem
    assert shown.count("equal") >= 4
    assert "whole" in shown
    for path in (tmp_path / "s" / layout.ZARR).glob("*/valid_len/c/0"):
        path.unlink()
    code, shown, _ = run(capsys, "store", "verify", tmp_path / "s")
    assert code == 1
    assert "store doctor" in shown
    code, shown, _ = run(capsys, "store", "doctor", tmp_path / "s", "--dry-run")
    assert code == 0
    assert "would be repaired" in shown
    code, shown, _ = run(capsys, "store", "doctor", tmp_path / "s")
    assert code == 0
    code, shown, _ = run(capsys, "store", "doctor", tmp_path / "s")
    assert "nothing to repair" in shown
    assert run(capsys, "store", "verify", tmp_path / "s")[0] == 0
    code, _, problem = run(capsys, "store", "verify", tmp_path / "s", "--deep", 2)
    assert code == 2
    assert "--manifest" in problem


def test_gc_says_what_it_would_do_until_it_is_told_to(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "s"
    shutil.copytree(made / "s", root)
    n_files = sum(p.is_file() for p in root.rglob("*"))
    code, shown, _ = run(capsys, "store", "gc", root)
    assert (code, "nothing to remove" in shown) == (0, True)
    code, shown, _ = run(capsys, "store", "gc", root, "--keep-presets", "v2")
    assert code == 0
    assert "would be removed; nothing was. Remove with --delete" in shown
    assert sum(p.is_file() for p in root.rglob("*")) == n_files
    code, shown, _ = run(capsys, "store", "gc", root, "--keep-presets", "demo,v2", "--delete")
    assert "nothing to remove" in shown
    code, shown, _ = run(capsys, "store", "gc", root, "--keep-presets", "v2", "--delete")
    assert code == 0
    assert "removed" in shown
    assert not TokenStore.open(root).specs
    code, _, problem = run(capsys, "store", "gc", root, "--keep-presets", "v22")
    assert code == 2
    assert "v22" in problem


def test_compact_sync_and_ls(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(
        capsys, "store", "sync", made / "s", tmp_path / "b", "--compression", "zstd"
    )
    assert code == 0
    assert "were there" in shown
    assert " 0 were there" in shown
    code, shown, _ = run(capsys, "store", "sync", made / "s", tmp_path / "b")
    assert shown.startswith("0 clips copied")
    assert run(capsys, "store", "compact", tmp_path / "b")[0] == 0
    code, shown, _ = run(capsys, "store", "ls", tmp_path / "b")
    assert code == 0
    code, _, problem = run(
        capsys, "store", "sync", made / "s", tmp_path / "c", "--compression", "lzma"
    )
    assert code == 2
    assert "Allowed: none, zstd" in problem
    assert not (tmp_path / "c").exists()


def test_card_and_stats(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "store", "card", made / "s", "audio")
    assert code == 0
    spec = next(s for s in TokenStore.open(made / "s").specs.values() if s.stream == "audio")
    assert spec.spec_id in shown
    assert str(spec.encoder.weights_sha256) in shown
    code, shown, _ = run(
        capsys, "store", "card", made / "s", "audio", "--out", tmp_path / "card.md"
    )
    assert spec.spec_id in (tmp_path / "card.md").read_text()
    code, shown, _ = run(capsys, "store", "stats", made / "s", "--out", tmp_path / "stats")
    assert code == 0
    assert len(list((tmp_path / "stats").glob("*.png"))) == 3
    numbers = json.loads((tmp_path / "stats" / f"audio-{spec.spec_id}.json").read_text())
    assert numbers["n_clips"] == 4
    code, _, problem = run(capsys, "store", "card", made / "s", "ffff")
    assert code == 2
    assert "no spec fit" in problem


def test_export_and_import(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "store", "export", made / "s", "--hdf5", tmp_path / "t.h5")
    assert code == 0
    code, shown, _ = run(capsys, "store", "export", made / "s", "--hdf5", tmp_path / "t.h5")
    assert shown.startswith("nothing to do")
    code, shown, _ = run(capsys, "store", "import", tmp_path / "b", "--hdf5", tmp_path / "t.h5")
    assert code == 0
    old, new = TokenStore.open(made / "s"), TokenStore.open(tmp_path / "b")
    assert old.specs == new.specs
    for spec in old.specs.values():
        for entry in old.index(spec):
            if entry.valid_len:
                tokens = new.read(spec, entry.key).tokens
                assert tokens.tobytes() == old.read(spec, entry.key).tokens.tobytes()
    (tmp_path / "no.h5").write_bytes(b"not HDF5")
    code, _, problem = run(capsys, "store", "import", tmp_path / "c", "--hdf5", tmp_path / "no.h5")
    assert code == 2
    assert not (tmp_path / "c").exists()
    code, shown, problem = run(
        capsys, "store", "export", made / "s", "--npy", tmp_path / "npy", "--spec", "video",
        "--manifest", made / "m.parquet",
    )  # fmt: skip
    assert code == 0, problem
    assert len(list((tmp_path / "npy").glob("*.npy"))) == 4
    code, shown, problem = run(
        capsys, "store", "import", tmp_path / "d", "--npy", tmp_path / "npy", "--spec",
        "demo/video", "--manifest", made / "m.parquet", "--name", "from a colleague",
    )  # fmt: skip
    assert code == 0, problem
    assert "origin unknown" in shown
    code, _, problem = run(capsys, "store", "import", tmp_path / "e")
    assert code == 2
    assert "give either --hdf5 FILE or --npy FOLDER" in problem


def test_training_reads_clips_from_the_spec_that_has_them(made: Path, tmp_path: Path) -> None:
    """Some clips stand under the wanted spec, some under a richer one only; both serve."""
    from train.batches.reading import ViewReader

    records = [r for r in read_manifest(made / "m.parquet").records if "broken" not in r.media]
    old = TokenStore.open(made / "s")
    (video,) = (s for s in old.specs.values() if s.stream == "video")
    mixed = TokenStore.open_or_create(tmp_path / "s")
    for spec in old.specs.values():
        for place, record in enumerate(records):
            clip = old.clip_tokens(spec, old.entry(spec, record.token_key(spec)))
            target = spec
            if spec == video and place % 2:
                target = spec.model_copy(update={"dtype": "float32"})
                assert isinstance(clip.tokens, np.ndarray)
            mixed.commit(target, [clip], {})
    preset = demo()
    plain, reader = ViewReader(old, preset), ViewReader(TokenStore.open(tmp_path / "s"), preset)
    for record in records:
        wanted, got = plain.read([record]), reader.read([record])
        assert wanted.tokens.keys() == got.tokens.keys()
        for name, tokens in wanted.tokens.items():
            np.testing.assert_array_equal(tokens, got.tokens[name])


def test_a_store_of_a_url_without_the_extra_or_the_bucket_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, problem = run(capsys, "store", "ls", "ftp://somewhere/s")
    assert code == 2
    assert "a store of kind 'ftp' is not known" in problem
    with pytest.raises(StoreError, match=r"not known"):
        TokenStore.open_or_create("ftp://somewhere/s")
