"""The batch reader: the same bytes by every path, views, masks, threads, workers, memory."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cache import layout
from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import CacheMissError, CorruptTokensError, SpecMismatchError
from cache.quantize import dequantize_torch, quantize
from cache.reader import TokenDataset, TokenReader
from cache.shards import Access
from cache.spec import TokenSpec
from cache.store import TokenStore
from cache.views import AudioView, ImageView, VideoView
from tests.conftest import key_of, make_clip
from train.presets import demo

Specs = dict[str, TokenSpec]
NAMES = [f"clip-{i}" for i in range(40)]
KEYS = [key_of(name) for name in NAMES]


def length_of(name: str) -> int:
    return 1 + 37 * int(name.split("-")[1])


def clip_of(spec: TokenSpec, name: str) -> ClipTokens:
    return make_clip(spec, name, n_audio=length_of(name))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "s"
    store = TokenStore.open_or_create(folder)
    for spec in demo().tokens.all():
        spec = spec.with_weights("ab" * 32)
        for start in (0, 16, 32):
            store.commit(spec, [clip_of(spec, n) for n in NAMES[start : start + 16]], {})
        store.commit(
            spec,
            [
                ClipTokens(key_of("absent"), Status.ABSENT),
                ClipTokens(key_of("failed"), Status.FAILED, reason="no key frame"),
            ],
            {},
        )
    return folder


def order_of(n_clips: int, batch_size: int) -> list[list[str]]:
    places = np.random.default_rng(3).permutation(n_clips)
    return [[KEYS[i] for i in places[j : j + batch_size]] for j in range(0, n_clips, batch_size)]


def assert_right(batch: object, keys: list[str], specs: Specs) -> None:
    for stream, spec in specs.items():
        part = batch[stream]  # type: ignore[index]
        assert part.tokens.dtype == torch.float16
        for row, key in enumerate(keys):
            wanted = clip_of(spec, NAMES[KEYS.index(key)]).tokens
            assert isinstance(wanted, np.ndarray)
            n_valid = int(part.valid_len[row])
            assert n_valid == len(wanted)
            assert part.tokens[row, :n_valid].numpy().tobytes() == wanted.tobytes()
            assert not part.tokens[row, n_valid:].any()
            assert part.mask[row].tolist() == [i < n_valid for i in range(part.tokens.shape[1])]
        assert part.tokens.shape[1] == int(part.valid_len.max())


@pytest.mark.parametrize("access", ["map", "read", "direct"])
@pytest.mark.parametrize("check", [True, False])
def test_batches_hold_the_committed_bytes(
    root: Path, specs: Specs, access: Access, check: bool
) -> None:
    reader = TokenReader(TokenStore.open(root), specs, access=access, check=check)
    order = order_of(40, 7)
    n = 0
    for keys, batch in zip(order, reader.batches(order), strict=True):
        assert_right(batch, keys, specs)
        n += 1
    assert n == 6
    assert_right(reader.read(order[0]), order[0], specs)


def test_a_batch_that_is_kept_stays_and_one_that_is_dropped_is_used_again(
    root: Path, specs: Specs
) -> None:
    reader = TokenReader(TokenStore.open(root), specs, n_threads=2, n_ahead=2)
    order = order_of(40, 4)
    kept = list(reader.batches(order))
    for keys, batch in zip(order, kept, strict=True):
        assert_right(batch, keys, specs)
    part = kept[0]["image"].tokens[1]  # a view of a view keeps the memory, too
    copy = part.clone()
    del kept, batch
    gc.collect()
    assert sum(len(free) for free in reader._pool._free.values()) > 0
    places = set()
    for keys, batch in zip(order, reader.batches(order), strict=True):
        assert_right(batch, keys, specs)
        places.add(batch["image"].tokens.data_ptr())
    assert torch.equal(part, copy)
    assert len(places) < len(order)


def test_any_subset_of_streams_by_record_or_key(root: Path, specs: Specs) -> None:
    records = [
        Record(uid=f"c/{i}", media=f"{i}.mp4", clip=Clip(sha256=KEYS[i], n_bytes=1))
        for i in range(4)
    ]
    store = TokenStore.open(root)
    for streams in (["video"], ["audio", "image"]):
        chosen = {s: specs[s] for s in streams}
        batch = TokenReader(store, chosen).read(records)
        assert list(batch) == streams
        assert_right(batch, KEYS[:4], chosen)


def test_views_are_what_the_views_say(root: Path, specs: Specs) -> None:
    views = {
        "audio": AudioView(n_tokens=8),
        "video": VideoView(n_frames=4, grid=1),
        "image": ImageView(join=4),
    }
    for access in ("map", "read", "direct"):
        reader = TokenReader(TokenStore.open(root), specs, views, access=access)
        keys = [KEYS[i] for i in (0, 5, 39)]
        batch = reader.read(keys)
        for stream, spec in specs.items():
            view, part = views[stream], batch[stream]
            for row, key in enumerate(keys):
                tokens = clip_of(spec, NAMES[KEYS.index(key)]).tokens
                wanted, mask = view.apply(tokens)
                np.testing.assert_array_equal(part.tokens[row].numpy(), wanted)
                np.testing.assert_array_equal(part.mask[row].numpy(), mask)
                assert int(part.valid_len[row]) == mask.sum()
                if isinstance(view, ImageView):
                    assert part.cls is not None
                    np.testing.assert_array_equal(part.cls[row].numpy(), view.cls(tokens))
    with pytest.raises(SpecMismatchError, match=r"the video view asks for 16 frames of 3x3"):
        TokenReader(TokenStore.open(root), specs, {"video": VideoView(n_frames=16, grid=3)})


def test_what_has_no_tokens_is_refused_or_masked(root: Path, specs: Specs) -> None:
    store = TokenStore.open(root)
    keys = [KEYS[0], key_of("absent"), key_of("failed")]
    with pytest.raises(CacheMissError, match=r"the audio stream is absent.*Mask the stream"):
        TokenReader(store, specs).read(keys)
    for views in (None, {"image": ImageView(join=1), "audio": AudioView(n_tokens=3)}):
        batch = TokenReader(store, specs, views, missing="mask").read(keys)
        for stream in specs:
            part = batch[stream]
            assert part.status == (Status.OK, Status.ABSENT, Status.FAILED)
            assert part.valid_len.tolist()[1:] == [0, 0]
            assert not part.mask[1:].any()
            assert not part.tokens[1:].any()
            assert part.tokens[0].any()
    with pytest.raises(CacheMissError, match=r"no committed audio tokens"):
        TokenReader(store, specs, missing="mask").read([key_of("never")])
    record = Record(uid="c/9", media="9.mp4", clip=Clip(sha256=key_of("never"), n_bytes=1))
    with pytest.raises(CacheMissError, match=r"c/9: no committed audio tokens .*emocache extract"):
        TokenReader(store, specs).read([record])


def test_damage_is_named_in_the_thread_that_asked(tmp_path: Path, specs: Specs) -> None:
    spec = specs["video"]
    store = TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, [clip_of(spec, n) for n in NAMES[:4]], {})
    path = tmp_path / "s" / layout.group(spec) / "tokens" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    reader = TokenReader(TokenStore.open(tmp_path / "s"), {"video": spec})
    with pytest.raises(CorruptTokensError, match=r"CRC-32C differs .*Restore that shard"):
        list(reader.batches([[key] for key in KEYS[:4]]))
    assert not [t for t in threading.enumerate() if t.name.startswith("emocache-read")]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_other_dtypes(tmp_path: Path, specs: Specs, dtype: str) -> None:
    store = TokenStore.open_or_create(tmp_path / "s")
    for stream, base in specs.items():
        spec = base.model_copy(update={"dtype": dtype})
        clips = [
            ClipTokens(c.key, c.status, np.asarray(c.tokens, np.float32), frame_index=c.frame_index,
                       frame_pts_s=c.frame_pts_s)
            for c in (clip_of(base, name) for name in NAMES[:5])
        ]  # fmt: skip
        store.commit(spec, clips, {})
        reader = TokenReader(TokenStore.open(tmp_path / "s"), {base.stream: spec})
        part = reader.read(KEYS[:5])[base.stream]
        for row, clip in enumerate(clips):
            assert isinstance(clip.tokens, np.ndarray)
            n = len(clip.tokens)
            if dtype == "bfloat16":
                assert part.tokens.dtype == torch.bfloat16
                wanted = torch.from_numpy(clip.tokens).to(torch.bfloat16)
                assert torch.equal(part.tokens[row, :n], wanted)
                again = store.read(spec, clip.key).tokens
                assert again.dtype == ml_dtypes.bfloat16
                np.testing.assert_array_equal(again.astype(np.float32), wanted.float().numpy())
            elif dtype == "int8":
                assert part.token_scale is not None
                assert part.channel_exponent is not None
                exact = quantize(clip.tokens)
                assert part.tokens[row, :n].numpy().tobytes() == exact.values.tobytes()
                floats = dequantize_torch(part.tokens, part.token_scale, part.channel_exponent)
                np.testing.assert_array_equal(
                    floats[row, :n].numpy(), store.read(spec, clip.key).tokens
                )
                error = floats[row, :n].numpy() - clip.tokens
                assert np.linalg.norm(error) < 0.01 * np.linalg.norm(clip.tokens)
            else:
                np.testing.assert_array_equal(part.tokens[row, :n].numpy(), clip.tokens)
            fast, entry = store.read_stored(spec, clip.key)
            stored = fast if isinstance(fast, np.ndarray) else fast.values
            assert stored.tobytes() == store.read_with_zarr(spec, entry).tobytes()
        view = {"audio": AudioView(n_tokens=6), "image": ImageView(join=1),
                "video": VideoView(n_frames=2, grid=2)}[stream]  # fmt: skip
        seen = TokenReader(store, {base.stream: spec}, {base.stream: view}).read(KEYS[:5])
        wanted_view, _ = view.apply(store.read(spec, KEYS[2]).tokens)
        np.testing.assert_array_equal(seen[base.stream].tokens[2].numpy(), wanted_view)


def test_compressed_stores_give_the_same_bytes(tmp_path: Path, specs: Specs) -> None:
    store = TokenStore.open_or_create(tmp_path / "s", compression="zstd")
    for spec in specs.values():
        clips = [clip_of(spec, name) for name in NAMES[:8]]
        store.commit(spec, clips, {})
    opened = TokenStore.open(tmp_path / "s")
    assert opened.compression == "zstd"
    assert_right(TokenReader(opened, specs).read(KEYS[:8]), KEYS[:8], specs)
    for spec in specs.values():
        assert opened.plan(spec).compression == "zstd"  # type: ignore[union-attr]
        for entry in opened.index(spec):
            slow = opened.read_with_zarr(spec, entry)
            assert opened.read(spec, entry.key).tokens.tobytes() == slow.tobytes()


def _first_tokens(root: Path, specs: Specs, reader: TokenReader | None, out: object) -> None:
    reader = reader or TokenReader(TokenStore.open(root), specs)
    order = order_of(40, 8)
    for keys, batch in zip(order, reader.batches(order), strict=True):
        assert_right(batch, keys, specs)
    out.put("right")  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_reader_works_in_another_process_while_threads_read_here(
    root: Path, specs: Specs, method: str
) -> None:
    reader = TokenReader(TokenStore.open(root), specs)
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            reader.store.close()
            list(reader.batches(order_of(40, 8)))

    busy = threading.Thread(target=keep_reading)
    busy.start()
    try:
        context = multiprocessing.get_context(method)
        answers = context.Queue()
        others = [
            context.Process(target=_first_tokens, args=(root, specs, reader, answers))
            for _ in range(3)
        ]
        for other in others:
            other.start()
        for other in others:
            other.join(120)
            assert other.exitcode == 0
        assert [answers.get(timeout=10) for _ in others] == ["right"] * 3
    finally:
        stop.set()
        busy.join()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_data_loader_gives_the_same_batches(root: Path, specs: Specs, n_workers: int) -> None:
    dataset = TokenDataset(TokenReader(TokenStore.open(root), specs), KEYS)
    assert len(dataset) == 40
    assert_right(dataset[3], [KEYS[3]], specs)
    loader = DataLoader(
        dataset, batch_size=8, collate_fn=TokenDataset.collate, num_workers=n_workers
    )
    n = 0
    for place, batch in enumerate(loader):
        assert_right(batch, KEYS[8 * place : 8 * place + 8], specs)
        n += 1
    assert n == 5


def test_an_endless_order_is_read_as_far_as_it_is_asked(root: Path, specs: Specs) -> None:
    asked = 0

    def forever() -> Iterator[list[str]]:
        nonlocal asked
        while True:
            asked += 1
            yield KEYS[:2]

    reader = TokenReader(TokenStore.open(root), {"video": specs["video"]}, n_ahead=2)
    batches = reader.batches(forever())
    for _ in range(5):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert 5 <= asked <= 5 + 2 + 4
    assert not [t for t in threading.enumerate() if t.name.startswith("emocache-read")]
