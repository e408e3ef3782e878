"""Ways to read clips of tokens from a disk: one small class per candidate of `store.py`.

A candidate writes the same clips in its own format and reads shuffled batches of them, each a dict
of tensors as a training loop wants it. Every candidate offers the modes that its users would try;
`store.py` tries them all and keeps the fastest. Packages that only the benchmark needs are imported
when their candidate is used, so that a missing one costs a row of the table and no more.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, default_collate

STREAMS = ("audio", "video", "image")
TAILS = {"audio": (1280,), "video": (16, 4, 1408), "image": (1025, 1408)}
"""Shape of a clip under preset v2; audio is (T, 1280)."""
BATCH = 8
GROUP = 32
"""Clips per file or shard, where the format has such a thing."""
N_AHEAD = 4
"""Batches that thread pools prepare ahead."""

Halfs = npt.NDArray[np.float16]
Batch = dict[str, torch.Tensor]
"""A tensor per stream, `audio_len` (B,) and `clip` (B,), the clips' numbers."""
Order = Sequence[Sequence[int]]

# The tensors are views of read-only buffers until they are copied into a batch.
warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")


class MadeUpClips:
    """Clips with the entropy of real activations: the truth that every candidate is held to.

    Gaussian, times a log-normal scale of the channel and one of the token; 1 of 128 channels is an
    outlier, 10 to 50 times as large. A clip depends on its number alone.
    """

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(100, 400, count, endpoint=True)
        self._channel_scale = {}
        for stream, tail in TAILS.items():
            scale = rng.lognormal(0, 0.5, tail[-1])
            outliers = rng.permutation(tail[-1])[: tail[-1] // 128]
            scale[outliers] *= rng.uniform(10, 50, len(outliers))
            self._channel_scale[stream] = scale.astype(np.float32)

    def __getitem__(self, clip: int) -> dict[str, Halfs]:
        """Return the tokens of a clip by stream."""
        rng = np.random.default_rng([1, clip])
        found = {}
        for stream, tail in TAILS.items():
            shape = (int(self.lengths[clip]), *tail) if stream == "audio" else tail
            values = rng.standard_normal(shape, np.float32)
            values *= self._channel_scale[stream]
            values *= rng.lognormal(0, 0.3, (*shape[:-1], 1)).astype(np.float32)
            found[stream] = values.astype(np.float16)
        return found

    def n_bytes(self, clips: Sequence[int], streams: Iterable[str]) -> int:
        """Return the size of these clips' tokens."""
        n_rows = {s: self.lengths[clips].sum() if s == "audio" else len(clips) for s in streams}
        return sum(int(n * np.prod(TAILS[s]) * 2) for s, n in n_rows.items())


class FlatFiles:
    """The same clips from `Memmap`'s files: one flat file per stream and the audio's offsets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets = np.load(folder / "offsets.npy")
        self.lengths = np.diff(self._offsets)
        self._maps: dict[str, Any] = {
            # Copy-on-write, as torch wants writable memory; nothing is ever written to it.
            s: np.memmap(folder / f"{s}.bin", np.float16, "c").reshape(-1, *tail)
            for s, tail in TAILS.items()
        }

    def view(self, stream: str, clip: int) -> Halfs:
        """Return a clip's tokens without copying them."""
        rows = slice(*self._offsets[clip : clip + 2]) if stream == "audio" else clip
        return np.asarray(self._maps[stream][rows])

    def __getitem__(self, clip: int) -> dict[str, Halfs]:
        """Return the tokens of a clip by stream."""
        return {stream: self.view(stream, clip) for stream in STREAMS}


Source = MadeUpClips | FlatFiles


def every_clip(source: Source) -> Iterator[tuple[int, dict[str, Halfs]]]:
    """Yield the number and the tokens of every clip."""
    return ((clip, source[clip]) for clip in range(len(source.lengths)))


def groups(source: Source, size: int = GROUP) -> Iterator[range]:
    """Yield the numbers of all clips, cut into groups."""
    n_clips = len(source.lengths)
    return (range(i, min(i + size, n_clips)) for i in range(0, n_clips, size))


@dataclass(frozen=True)
class Mode:
    """How a candidate is run: in the caller's thread, or by so many threads or worker processes."""

    how: Literal["in line", "threads", "workers"]
    n: int = 0
    variant: str = ""

    def __str__(self) -> str:
        name = f"{self.n} {self.how}".replace("1 threads", "1 thread") if self.n else self.how
        return f"{name}, {self.variant}" if self.variant else name


IN_LINE, WORKERS = Mode("in line"), Mode("workers", 2)
THREADS = (Mode("threads", 2), Mode("threads", 4))


class Candidate(ABC):
    """A format and the ways to read it."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """What must be importable."""
    folder: ClassVar[str]
    """Where its data stand; candidates that read the same data name the same folder."""
    modes: ClassVar[tuple[Mode, ...]] = (IN_LINE, *THREADS, WORKERS)
    n_layouts: ClassVar[int] = 1
    """How often it writes the data, so that its modes can read them in several layouts."""
    is_streaming: ClassVar[bool] = False
    """True if it yields whole epochs in an order of its own."""
    is_packaged: ClassVar[bool] = False
    """True for the data-loading packages, of which the goals ask for the best."""
    root: Path
    streams: tuple[str, ...]
    mode: Mode
    _loader: Any = None

    def write(self, source: Source, root: Path) -> None:
        """Write all clips to a new folder."""
        root.mkdir(parents=True)
        self._write(source, root)

    def open(self, root: Path, streams: Sequence[str], mode: Mode) -> None:
        """Get ready to read these streams."""
        self.root, self.streams, self.mode = root, tuple(streams), mode
        self._open()

    @abstractmethod
    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of `order`, or an epoch in an order of its own if streaming."""

    def close(self) -> None:
        """End worker processes."""
        self._loader = None

    @abstractmethod
    def _write(self, source: Source, root: Path) -> None: ...

    @abstractmethod
    def _open(self) -> None: ...


def collate(clips: Sequence[int], tokens: dict[str, list[torch.Tensor]]) -> Batch:
    """Copy clips into a batch; audio is zero-padded to the longest of them."""
    batch = {"clip": torch.as_tensor(clips)}
    for stream, parts in tokens.items():
        if stream == "audio":
            batch["audio_len"] = torch.tensor([len(part) for part in parts])
            batch[stream] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        else:
            batch[stream] = default_collate(parts)  # in a worker, copies to shared memory at once
    return batch


def collate_items(streams: Sequence[str], items: Sequence[dict[str, Any]]) -> Batch:
    """Make a batch of items, whose streams are tensors or raw bytes."""
    tokens = {s: [_tensor(item[s], s) for item in items] for s in streams}
    return collate([int(item["clip"]) for item in items], tokens)


def _tensor(data: Any, stream: str) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data
    tokens = torch.frombuffer(data, dtype=torch.float16)
    return tokens.view(-1, *TAILS[stream]) if stream == "audio" else tokens.view(TAILS[stream])


# ---------------------------------------------------------------- random access


class RandomAccess(Candidate):
    """A candidate that reads any clip at any time; for DataLoader, it is the dataset."""

    def _open(self) -> None:
        self._is_connected = False
        self._order: list[Any] = []
        if self.mode.how == "workers":
            self._loader = DataLoader(
                self,  # type: ignore[arg-type]
                batch_sampler=self._order,  # its content is replaced while the workers stay
                collate_fn=lambda batch: batch,
                num_workers=self.mode.n,
                persistent_workers=True,
            )
        else:
            if self.mode.how == "threads":
                torch.set_num_threads(1)  # else each of them copies with threads of its own
            self._connect()

    def __getitems__(self, clips: Sequence[int]) -> Batch:
        """Return a batch; what DataLoader's workers call."""
        if not self._is_connected:
            self._connect()
            self._is_connected = True
        return self._load(clips)

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of `order`."""
        if self.mode.how == "workers":
            self._order[:] = order
            return iter(self._loader)
        return self._ahead(order) if self.mode.how == "threads" else map(self._load, order)

    def _ahead(self, order: Order) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.mode.n) as pool:
            pending = deque(pool.submit(self._load, clips) for clips in order[:N_AHEAD])
            for clips in order[N_AHEAD:]:
                yield pending.popleft().result()
                pending.append(pool.submit(self._load, clips))
            while pending:
                yield pending.popleft().result()

    @abstractmethod
    def _connect(self) -> None: ...

    def _load(self, clips: Sequence[int]) -> Batch:
        return collate(clips, {s: [self._tokens(s, c) for c in clips] for s in self.streams})

    def _tokens(self, stream: str, clip: int) -> torch.Tensor:
        raise NotImplementedError


class Memmap(RandomAccess):
    """`np.memmap`: one flat file per stream and offsets."""

    name = "np.memmap"
    folder = "memmap"

    def _write(self, source: Source, root: Path) -> None:
        np.save(root / "offsets.npy", np.concatenate([[0], np.cumsum(source.lengths)]))
        with contextlib.ExitStack() as stack:
            files = {s: stack.enter_context((root / f"{s}.bin").open("wb")) for s in STREAMS}
            for _, tokens in every_clip(source):
                for stream, values in tokens.items():
                    files[stream].write(values.data)

    def _connect(self) -> None:
        self._files = FlatFiles(self.root)

    def _tokens(self, stream: str, clip: int) -> torch.Tensor:
        return torch.from_numpy(self._files.view(stream, clip))


class Npy(RandomAccess):
    """One `.npy` file per clip and stream."""

    name = ".npy per clip"
    folder = "npy"

    def _write(self, source: Source, root: Path) -> None:
        for clip, tokens in every_clip(source):
            for stream, values in tokens.items():
                np.save(root / f"{clip:06d}.{stream}.npy", values)

    def _connect(self) -> None:
        pass

    def _tokens(self, stream: str, clip: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self.root / f"{clip:06d}.{stream}.npy"))


class Safetensors(RandomAccess):
    """safetensors: 32 clips per file, which stays mapped, or a file per clip, which cannot."""

    name = "safetensors"
    packages = ("safetensors.torch",)
    folder = "safetensors"
    n_layouts = 2
    modes = tuple(
        Mode(mode.how, mode.n, variant)
        for variant in ("32 clips/file", "file per clip")
        for mode in (IN_LINE, *THREADS, WORKERS)
    )

    def _write(self, source: Source, root: Path) -> None:
        save = import_module("safetensors.torch").save_file
        for size in (1, GROUP):
            (root / str(size)).mkdir()
            for number, clips in enumerate(groups(source, size)):
                items = {
                    f"{c}.{s}": torch.from_numpy(x) for c in clips for s, x in source[c].items()
                }
                save(items, root / str(size) / f"{number:06d}.safetensors")

    def _connect(self) -> None:
        self._size = GROUP if self.mode.variant == "32 clips/file" else 1
        self._kept: dict[int, Any] = {}

    def _load(self, clips: Sequence[int]) -> Batch:
        size = self._size
        files = {n: self._kept.get(n) or self._file(n) for n in {c // size for c in clips}}
        if size > 1:
            self._kept.update(files)
        tokens = {s: [files[c // size].get_tensor(f"{c}.{s}") for c in clips] for s in self.streams}
        return collate(clips, tokens)

    def _file(self, number: int) -> Any:
        path = self.root / str(self._size) / f"{number:06d}.safetensors"
        return import_module("safetensors").safe_open(path, framework="pt")


class H5py(RandomAccess):
    """HDF5, contiguous data sets, read straight into the batch. Its library has one global lock."""

    name = "h5py"
    packages = ("h5py",)
    folder = "h5py"
    modes = (IN_LINE, Mode("threads", 1), WORKERS)

    def _write(self, source: Source, root: Path) -> None:
        offsets = np.concatenate([[0], np.cumsum(source.lengths)])
        with import_module("h5py").File(root / "clips.h5", "w", libver="latest") as file:
            file["offsets"] = offsets
            for stream, tail in TAILS.items():
                n_rows = offsets[-1] if stream == "audio" else len(source.lengths)
                file.create_dataset(stream, (n_rows, *tail), "f2")
            for clip, tokens in every_clip(source):
                for stream, values in tokens.items():
                    rows = slice(*offsets[clip : clip + 2]) if stream == "audio" else clip
                    file[stream][rows] = values

    def _connect(self) -> None:
        file = import_module("h5py").File(self.root / "clips.h5", "r", libver="latest")
        self._offsets = file["offsets"][:]
        self._sets = {s: file[s] for s in self.streams}

    def _load(self, clips: Sequence[int]) -> Batch:
        spans = [slice(*self._offsets[clip : clip + 2].tolist()) for clip in clips]
        lengths = torch.tensor([span.stop - span.start for span in spans])
        batch = {"clip": torch.as_tensor(clips), "audio_len": lengths}
        for stream in self.streams:
            ragged = stream == "audio"
            shape = (len(clips), *([int(lengths.max())] if ragged else []), *TAILS[stream])
            make = torch.zeros if ragged else torch.empty
            batch[stream] = make(shape, dtype=torch.float16)
            for place, clip in enumerate(clips):
                out = np.s_[place, : int(lengths[place])] if ragged else np.s_[place]
                rows = spans[place] if ragged else clip
                self._sets[stream].read_direct(batch[stream].numpy(), np.s_[rows], out)
        return batch


class HuggingFace(RandomAccess):
    """Hugging Face datasets: a mapped Arrow file, a binary column per stream, rows not copied."""

    name = "HF datasets"
    packages = ("datasets",)
    folder = "huggingface"
    is_packaged = True

    def _write(self, source: Source, root: Path) -> None:
        datasets = import_module("datasets")
        writer = import_module("datasets.arrow_writer").ArrowWriter
        types = {s: datasets.Value("large_binary") for s in STREAMS}
        features = datasets.Features({"clip": datasets.Value("int64"), **types})
        with writer(features=features, path=str(root / "clips.arrow"), writer_batch_size=1) as file:
            for clip, tokens in every_clip(source):
                file.write({"clip": clip, **{s: x.tobytes() for s, x in tokens.items()}})
            file.finalize()

    def _connect(self) -> None:
        table = import_module("datasets").Dataset.from_file(str(self.root / "clips.arrow"))
        self._rows = table.select_columns(list(self.streams)).with_format("arrow")

    def _load(self, clips: Sequence[int]) -> Batch:
        rows = [self._rows[clip] for clip in clips]  # a list of numbers would be gathered: a copy
        buffers = [{s: row[s][0].as_buffer() for s in self.streams} for row in rows]
        return collate(clips, {s: [_tensor(b[s], s) for b in buffers] for s in self.streams})


# ---------------------------------------------------------------- streaming formats


class Streaming(Candidate):
    """A candidate that reads epochs in an order of its own, through its loader."""

    modes = (IN_LINE, WORKERS)
    is_streaming = True
    is_packaged = True

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield an epoch; `order` says nothing here."""
        return iter(self._loader)

    def _open(self) -> None:
        self._loader = self._loader_class()(
            self._dataset(),
            batch_size=BATCH,
            collate_fn=functools.partial(collate_items, self.streams),
            num_workers=self.mode.n,
            persistent_workers=self.mode.n > 0,
        )

    def _loader_class(self) -> Any:
        return DataLoader

    @abstractmethod
    def _dataset(self) -> Any: ...


class LitData(Streaming):
    """LitData's optimised chunks of 32 clips, with tensors."""

    name = "LitData"
    packages = ("litdata",)
    folder = "litdata"

    def _write(self, source: Source, root: Path) -> None:
        assert isinstance(source, FlatFiles), "LitData's own process opens the source itself"
        import_module("litdata").optimize(
            fn=functools.partial(_litdata_item, source.folder),
            inputs=list(range(len(source.lengths))),
            output_dir=str(root),
            chunk_size=GROUP,
            num_workers=1,
            verbose=False,
        )

    def _loader_class(self) -> Any:
        return import_module("litdata").StreamingDataLoader

    def _dataset(self) -> Any:
        return import_module("litdata").StreamingDataset(str(self.root), shuffle=True, seed=0)


def _litdata_item(folder: Path, clip: int) -> dict[str, Any]:
    return {"clip": clip, **{s: torch.from_numpy(x) for s, x in FlatFiles(folder)[clip].items()}}


class MosaicStreaming(Streaming):
    """MosaicML Streaming: MDS shards of about 32 clips of raw bytes, its cheapest column type."""

    name = "MosaicML Streaming"
    packages = ("streaming",)
    folder = "mds"

    def _write(self, source: Source, root: Path) -> None:
        columns = {"clip": "int", **dict.fromkeys(STREAMS, "bytes")}
        writer = import_module("streaming").MDSWriter
        with writer(out=str(root), columns=columns, size_limit=1 << 27) as file:
            for clip, tokens in every_clip(source):
                file.write({"clip": clip, **{s: x.tobytes() for s, x in tokens.items()}})

    def _dataset(self) -> Any:
        # Its processes share state by name, which outlives one that is killed.
        import_module("streaming.base.util").clean_stale_shared_memory()
        return import_module("streaming").StreamingDataset(
            local=str(self.root), shuffle=True, batch_size=BATCH, num_canonical_nodes=1
        )


class WebDataset(Streaming):
    """WebDataset: tar files of 32 clips of raw bytes, shuffled by file and in a buffer of 32."""

    name = "WebDataset"
    packages = ("webdataset",)
    folder = "webdataset"

    def _write(self, source: Source, root: Path) -> None:
        writer = import_module("webdataset").TarWriter
        for number, clips in enumerate(groups(source)):
            with writer(str(root / f"{number:06d}.tar")) as tar:
                for clip in clips:
                    parts = {s: x.tobytes() for s, x in source[clip].items()}
                    tar.write({"__key__": f"{clip:06d}", "clip": str(clip).encode(), **parts})

    def _dataset(self) -> Any:
        files = [str(path) for path in sorted(self.root.glob("*.tar"))]
        wanted = (".clip", *(f".{stream}" for stream in self.streams))
        tars = import_module("webdataset").WebDataset(
            files, shardshuffle=len(files), seed=0, select_files=lambda name: name.endswith(wanted)
        )
        return tars.shuffle(GROUP)


# ---------------------------------------------------------------- the store


def key(clip: int) -> str:
    """Return the token key of a clip in the store."""
    return f"{clip:064x}"


@functools.cache
def specs() -> dict[str, Any]:
    """Return preset v2's token specs by stream, for made-up weights."""
    from train.presets import v2

    return {s.stream: s.with_weights("00" * 32) for s in v2().tokens.all()}


def make_unit(spec: Any, clips: Sequence[int], tokens: Sequence[Halfs]) -> list[Any]:
    """Return what `TokenStore.commit` takes."""
    from cache.commit import ClipTokens, Status

    n_frames = spec.frames.n_frames if spec.frames else 0
    times = tuple(i / 25 for i in range(n_frames))
    return [
        ClipTokens(key(c), Status.OK, x, frame_index=tuple(range(n_frames)), frame_pts_s=times)
        for c, x in zip(clips, tokens, strict=True)
    ]


def commit_unit(store: Any, clips: Sequence[int], tokens: Sequence[dict[str, Halfs]]) -> None:
    """Commit up to 32 clips of all streams."""
    for stream, spec in specs().items():
        store.commit(spec, make_unit(spec, clips, [x[stream] for x in tokens]), {})


class OnStore(RandomAccess):
    """A reader of the token store."""

    folder = "store"

    def _write(self, source: Source, root: Path) -> None:
        from cache.store import TokenStore

        store = TokenStore.open_or_create(root)
        for clips in groups(source):
            commit_unit(store, clips, [source[clip] for clip in clips])

    def _connect(self) -> None:
        from cache.store import TokenStore

        store, wanted = TokenStore.open(self.root), specs()

        @functools.cache
        def row(stream: str, clip: int) -> tuple[int, int]:
            entry = store.entry(wanted[stream], key(clip))
            return entry.row, entry.valid_len

        self._row = row
        paths = {s: self.root / "tokens.zarr" / f"{s}-{wanted[s].spec_id}" for s in self.streams}
        self._arrays = {s: self._open_array(path / "tokens") for s, path in paths.items()}

    def _open_array(self, path: Path) -> Any:
        raise NotImplementedError


class ZarrPython(OnStore):
    """zarr-python, a clip at a time: gathering rows of a sharded array at once is far slower."""

    name = "zarr-python"
    packages = ("zarr",)

    def _open_array(self, path: Path) -> Any:
        return import_module("zarr").open_array(path, mode="r", zarr_format=3)

    def _tokens(self, stream: str, clip: int) -> torch.Tensor:
        row, length = self._row(stream, clip)
        return torch.from_numpy(self._arrays[stream][row, :length])


class TensorStore(OnStore):
    """tensorstore: all reads of a batch are started before the first is awaited.

    "gathered" asks for a batch's rows of video and image with one call, straight into a batch.
    """

    name = "tensorstore"
    packages = ("tensorstore",)
    modes = (*OnStore.modes, Mode("in line", 0, "gathered"), Mode("threads", 2, "gathered"))

    def _open_array(self, path: Path) -> Any:
        kvstore = {"driver": "file", "path": str(path)}
        return import_module("tensorstore").open({"driver": "zarr3", "kvstore": kvstore}).result()

    def _load(self, clips: Sequence[int]) -> Batch:
        reads, gathered = {}, {}
        for stream, array in self._arrays.items():
            rows = [self._row(stream, clip) for clip in clips]
            if self.mode.variant and stream != "audio":
                gathered[stream] = array[[row for row, _ in rows]].read()
            else:
                reads[stream] = [array[row, :length].read() for row, length in rows]
        tokens = {s: [torch.from_numpy(x.result()) for x in found] for s, found in reads.items()}
        whole = {s: torch.from_numpy(read.result()) for s, read in gathered.items()}
        return collate(clips, tokens) | whole


class Ours(OnStore):
    """The store's own reader, with every clip's checksum compared."""

    name = "emocache"
    modes = (
        *(IN_LINE, Mode("threads", 1), Mode("threads", 2)),
        *(Mode("threads", 2, "direct"), Mode("threads", 4, "direct")),
    )
    check: ClassVar[bool] = True

    def _connect(self) -> None:
        from cache.reader import TokenReader
        from cache.store import TokenStore

        wanted: Any = {s: spec for s, spec in specs().items() if s in self.streams}
        store, n_threads = TokenStore.open(self.root), max(1, self.mode.n)
        access: Any = self.mode.variant or "map"
        self._reader = TokenReader(
            store, wanted, n_threads=n_threads, check=self.check, access=access
        )

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of `order`."""
        keys = [[key(clip) for clip in clips] for clips in order]
        is_in_line = self.mode == IN_LINE
        found = map(self._reader.read, keys) if is_in_line else self._reader.batches(keys)
        for clips, parts in zip(order, found, strict=True):
            batch = {str(stream): part.tokens for stream, part in parts.items()}
            if "audio" in parts:
                batch["audio_len"] = parts["audio"].valid_len
            yield batch | {"clip": torch.as_tensor(clips)}


class OursUnchecked(Ours):
    """The same without checksums, to see what they cost."""

    name = "emocache unchecked"
    check = False


CANDIDATES: tuple[type[Candidate], ...] = (
    *(Ours, OursUnchecked, Memmap, Npy, Safetensors, H5py),
    *(LitData, MosaicStreaming, WebDataset, HuggingFace, TensorStore, ZarrPython),
)
