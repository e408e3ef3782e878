"""A bucket of an object store (S3 and compatible, Google, Azure) as the home of a token store.

Requests go through obstore, which signs, pools connections and repeats what failed in transit.
Credentials, endpoint and region come from the environment under the names of each provider:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, ...; profiles in
`~/.aws` are not read.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from zarr.abc.store import ByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore as ZarrObjectStore

from cache.errors import MissingDependencyError, StoreError
from cache.storage import Bytes, Storage

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

T = TypeVar("T")
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)

_PART_BYTES = 8 * 2**20
"""What one request uploads; a shard of 92 MB is 11 of them."""

_PARTS_AT_ONCE = 4
"""Bounds the memory of an upload to 4 + 1 parts."""

_TRIES = 3
"""How often this module repeats what obstore gave up on at once."""


@dataclass(frozen=True)
class Retry:
    """How long to go on asking a store that does not answer."""

    n_retries: int = 10
    """Repetitions of one request."""
    total_s: float = 120
    """No repetition starts later than this after the first try."""
    request_s: float = 60
    """How long one try may take, its body included."""
    first_pause_s: float = 0.1
    """Pause before the first repetition; later ones grow, with jitter: ten last some 20 s."""
    longest_pause_s: float = 5
    """Bound of the pause."""


class ObjectStorage:
    """Implements `cache.storage.Storage` on a bucket; may be shared between threads and pickled.

    A process that is forked after its parent has sent a request cannot use it (obstore's threads do
    not survive a fork) and gets an OSError at once: start workers with `spawn` or `forkserver`.
    """

    def __init__(self, url: str, *, retry: Retry | None = None) -> None:
        """Use what stands under a URL such as `s3://bucket/prefix`. No request is sent yet.

        Args:
            url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` (with
                `AZURE_STORAGE_ACCOUNT_NAME` in the environment), or one of their usual synonyms.
            retry: Patience with a store that does not answer.

        Raises:
            StoreError: The URL is of another kind, or names no bucket.
            MissingDependencyError: obstore is not installed.
        """
        scheme, separator, rest = url.partition("://")
        self._url = f"{scheme}{separator}{rest.rstrip('/')}"
        self._retry = Retry() if retry is None else retry
        self.single_committer = False
        """True: `create` looks and then writes, which is safe with one writing process only."""
        self._bucket: Any = self._connect("")

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connection behind: another process opens its own, from its own environment."""
        return {**self.__dict__, "_bucket": None}

    @property
    def url(self) -> str:
        """The URL, without a slash at its end."""
        return self._url

    def _connect(self, folder: str) -> Any:
        """Return obstore's store for a folder."""
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise MissingDependencyError(
                f"{self._url}: object stores need the package obstore ({error}). "
                "Install it with: pip install 'emocache[remote]'"
            ) from error
        scheme = self._url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise StoreError(
                f"{self._url}: a store of kind {scheme!r} is not known. "
                f"Give a path or a URL of: {', '.join(f'{s}://' for s in _SCHEMES)}"
            )
        # Path-style requests are obstore's default; AWS_VIRTUAL_HOSTED_STYLE_REQUEST changes it.
        client: ClientConfig = {"timeout": timedelta(seconds=self._retry.request_s)}
        if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
            client["allow_http"] = True
        # The bulk request that obstore prefers even for one key is missing in some S3 servers.
        config = {"disable_bulk_delete": True} if scheme in ("s3", "s3a") else {}
        retry: RetryConfig = {
            "max_retries": self._retry.n_retries,
            "retry_timeout": timedelta(seconds=self._retry.total_s),
            "backoff": {
                "init_backoff": timedelta(seconds=self._retry.first_pause_s),
                "max_backoff": timedelta(seconds=self._retry.longest_pause_s),
                # Each pause is drawn evenly from the first pause to `base` times the last one; with
                # obstore's own base of 2 pauses do not grow, and ten of them last 3 s.
                "base": 4,
            },
        }
        where = f"{self._url}/{folder}" if folder else self._url
        try:
            return from_url(where, client_options=client, retry_config=retry, **config)  # type: ignore[call-overload]
        except (BaseError, ValueError) as error:
            raise StoreError(
                f"{where}: cannot be opened ({_summary(error)}). Give a URL such as "
                "s3://bucket/prefix, and the account or endpoint in the environment."
            ) from error

    @contextmanager
    def _request(self, key: str) -> Iterator[Any]:
        """Yield obstore's store; its exceptions become OSErrors that name the object."""
        with _os_errors(f"{self._url}/{key}" if key else self._url):
            if self._bucket is None:
                self._bucket = self._connect("")
            yield self._bucket

    # ---------------------------------------------------------------- reading

    def read(self, key: str) -> bytes:
        """See `cache.storage.Storage.read`."""
        import obstore

        return self._repeat(key, lambda bucket: obstore.get(bucket, key).bytes().to_bytes())

    def _repeat(self, key: str, ask: Callable[[Any], T]) -> T:
        """Ask again where an answer breaks off in its middle, which obstore does not always do."""
        for last in _tries():
            try:
                with self._request(key) as bucket:
                    return ask(bucket)
            except (ConnectionError, TimeoutError) as error:
                if last or _was_repeated(error):
                    raise
            time.sleep(self._retry.first_pause_s)
        raise AssertionError("the last try returns or raises")

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """See `cache.storage.Storage.read_range`."""
        import obstore

        if n_bytes == 0:  # HTTP has no empty range
            self.size(key)
            return b""
        try:
            return self._repeat(
                key,
                lambda bucket: obstore.get_range(
                    bucket, key, start=start, length=n_bytes
                ).to_bytes(),
            )
        except OSError as error:
            if error.errno == errno.ERANGE:
                return b""
            raise

    def size(self, key: str) -> int:
        """See `cache.storage.Storage.size`."""
        import obstore

        return int(self._repeat(key, lambda bucket: obstore.head(bucket, key)["size"]))

    def modified_s(self, key: str) -> float:
        """See `cache.storage.Storage.modified_s`."""
        import obstore

        found = self._repeat(key, lambda bucket: obstore.head(bucket, key)["last_modified"])
        return float(found.timestamp())

    def names(self, folder: str) -> list[str]:
        """See `cache.storage.Storage.names`."""
        return [
            name
            for name in self._list(folder, want_folders=False)
            # Of a local store that was copied here; this class writes no temporary objects.
            if not name.endswith(".partial")
        ]

    def folders(self, folder: str) -> list[str]:
        """See `cache.storage.Storage.folders`."""
        return self._list(folder, want_folders=True)

    def _list(self, folder: str, *, want_folders: bool) -> list[str]:
        import obstore

        found = self._repeat(folder, lambda bucket: obstore.list_with_delimiter(bucket, folder))
        paths = (
            found["common_prefixes"]
            if want_folders
            else [item["path"] for item in found["objects"]]
        )
        prefix = f"{folder}/" if folder else ""
        # Some tools mark a folder by an empty object of its name, which a listing of it contains.
        return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]

    # ---------------------------------------------------------------- writing

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """See `cache.storage.Storage.create`; equal `data` of two callers counts as one creation.

        An answer may be lost after the object was stored, and the repetition is then refused because
        of our own object. So after a refusal the object is read: if it holds exactly `data`, this
        call created it. That is right only because what must have one owner is unique to the attempt:
        a claim needs a random attempt id, and a commit record names its claimed shard.
        """
        if self.single_committer:
            return self._create_alone(key, data)
        import obstore

        for last in _tries():
            try:
                with self._request(key) as bucket:
                    obstore.put(bucket, key, data, mode="create", use_multipart=False)
                return True
            except FileExistsError:
                try:
                    return self.read(key) == data
                except FileNotFoundError:  # it was deleted, or a create at the same time failed
                    if last:
                        raise
            except (ConnectionError, TimeoutError) as error:
                if last or _was_repeated(error):
                    raise
            time.sleep(self._retry.first_pause_s)
        raise AssertionError("the last try returns or raises")

    def _create_alone(self, key: str, data: bytes) -> bool:
        """Look and write: between the two another process may write, hence the name."""
        with _ONE_BY_ONE:
            try:
                self.size(key)
            except FileNotFoundError:
                self.replace(key, data)
                return True
            return False

    def replace(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """See `cache.storage.Storage.replace`; an object that was acknowledged is durable."""
        import obstore

        with self._request(key) as bucket:
            obstore.put(bucket, key, data, use_multipart=False)

    def write(self, key: str, parts: Iterable[Bytes]) -> int:
        """See `cache.storage.Storage.write`; an exception that `parts` raises comes through as it is.

        What is larger than one part is uploaded in parts, which become an object together. A killed
        upload leaves parts that no listing shows; let a lifecycle rule of the bucket remove them.
        """
        import obstore

        stream = _Stream(parts)
        start = bytearray()
        for part in stream:
            start += part
            if len(start) >= _PART_BYTES:
                break
        else:
            self.replace(key, bytes(start))
            return stream.n_bytes
        try:
            with self._request(key) as bucket:
                obstore.put(
                    bucket,
                    key,
                    itertools.chain([start], stream),
                    use_multipart=True,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except OSError:
            if stream.failure is not None:
                raise stream.failure from None
            # The upload may be complete and only the answer lost: the repeated completion is then
            # refused, because the store has forgotten the upload.
            if not (stream.is_complete and self._holds(key, stream)):
                raise
        return stream.n_bytes

    def _holds(self, key: str, stream: _Stream) -> bool:
        """True if the object reads as what was streamed; False also if that cannot be found out."""
        try:
            if self.size(key) != stream.n_bytes:
                return False
            checksum = 0
            for start in range(0, stream.n_bytes, _PART_BYTES):
                piece = self.read_range(key, start, _PART_BYTES)
                checksum = zlib.crc32(piece, checksum)
        except OSError:  # the caller raises the upload's own error
            return False
        return checksum == stream.crc32

    def delete(self, key: str) -> None:
        """See `cache.storage.Storage.delete`."""
        import obstore

        try:
            with self._request(key) as bucket:
                obstore.delete(bucket, key)
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise

    def zarr_store(self, folder: str, *, read_only: bool = True) -> ZarrObjectStore[Any]:
        """See `cache.storage.Storage.zarr_store`."""
        url = f"{self._url}/{folder}" if folder else self._url
        return _ZarrStore(self._connect(folder), read_only=read_only, url=url)


_ONE_BY_ONE = threading.Lock()
"""Serialises the threads of a single committer."""


class _Stream:
    """Passes parts on as bytes; remembers how many, their checksum and what went wrong."""

    def __init__(self, parts: Iterable[Bytes]) -> None:
        self._parts = iter(parts)
        self.n_bytes = 0
        self.crc32 = 0
        self.is_complete = False
        self.failure: OSError | None = None
        """An error of the source, which must not be taken for one of the store."""

    def __iter__(self) -> Iterator[memoryview]:
        try:
            for part in self._parts:
                view = memoryview(part)
                if view.nbytes:
                    raw = view.cast("B")
                    self.n_bytes += raw.nbytes
                    self.crc32 = zlib.crc32(raw, self.crc32)
                    yield raw
            self.is_complete = True
        except OSError as error:
            self.failure = error
            raise


class _ZarrStore(ZarrObjectStore[Any]):
    """zarr-python's store on obstore, with the errors of this module."""

    def __init__(self, store: Any, *, read_only: bool = False, url: str = "") -> None:
        super().__init__(store, read_only=read_only)
        self._url = url

    def with_read_only(self, read_only: bool = False) -> _ZarrStore:
        return _ZarrStore(self.store, read_only=read_only, url=self._url)

    def __str__(self) -> str:
        return self._url  # obstore's own text of an Azure store may panic

    def _errors(self, key: str) -> AbstractContextManager[None]:
        return _os_errors(f"{self._url}/{key}")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        with self._errors(key):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        with self._errors(""):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        with self._errors(key):
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        with self._errors(key):
            return await super().getsize(key)

    async def set(self, key: str, value: Buffer) -> None:
        with self._errors(key):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with self._errors(key):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with self._errors(key):
            await super().delete(key)

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        with self._errors(prefix):
            async for key in super().list_prefix(prefix):
                yield key

    def list(self) -> AsyncGenerator[str, None]:
        return self.list_prefix("")

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        with self._errors(prefix):
            async for name in super().list_dir(prefix):
                yield name


# -------------------------------------------------------------------- errors

_first_user: int | None = None
"""Process that first sent a request: obstore's threads live there and in no fork of it."""


@contextmanager
def _os_errors(where: str) -> Iterator[None]:
    """Turn the exceptions of obstore into OSErrors; refuse a process in which it would hang."""
    global _first_user
    from obstore.exceptions import BaseError

    if _first_user is None:
        _first_user = os.getpid()
    elif _first_user != os.getpid():
        raise OSError(
            errno.EDEADLK,
            "this process was forked after its parent had used an object store, where requests would "
            "wait for ever. Start worker processes with 'spawn' or 'forkserver' "
            "(DataLoader: multiprocessing_context='spawn')",
            where,
        )
    try:
        yield
    except (BaseError, FileNotFoundError, NotImplementedError) as error:
        raise _as_os_error(error, where) from error


_NO_BUCKET = "the bucket does not exist"
_METADATA_SERVICES = ("169.254.169.254", "/latest/api/token", "metadata.google.internal")
"""Where obstore asks for credentials that the environment does not hold."""


def _as_os_error(error: Exception, where: str) -> OSError:
    """Return the OSError that fits an exception of obstore: class, errno, one sentence, the URL.

    obstore has few classes; what an HTTP server answered stands in the text only.
    """
    text, summary = str(error), _summary(error)
    name = type(error).__name__
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else 0
    if any(service in text for service in _METADATA_SERVICES):
        return PermissionError(
            errno.EACCES,
            "no credentials in the environment (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
            f"profile files are not read) and none from the machine's metadata service: {summary}",
            where,
        )
    if "NoSuchBucket" in text or "ContainerNotFound" in text:
        return FileNotFoundError(errno.ENOENT, f"{_NO_BUCKET}; create it first", where)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", where)
    if name == "AlreadyExistsError":
        return FileExistsError(errno.EEXIST, "the object exists", where)
    if status == 507 or "QuotaExceeded" in text:
        return OSError(errno.ENOSPC, f"the store is full: {summary}", where)
    if name in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied: {summary}", where)
    if name in ("NotSupportedError", "NotImplementedError") or status == 501:
        return OSError(errno.ENOTSUP, f"the store does not support this: {summary}", where)
    if status == 416:
        return OSError(errno.ERANGE, "the range starts past the end of the object", where)
    if "kind: Timeout" in text:
        return TimeoutError(errno.ETIMEDOUT, f"no answer in time: {summary}", where)
    if "HTTP error" in text:
        return ConnectionError(errno.ECONNABORTED, f"the connection failed: {summary}", where)
    return OSError(errno.EIO, summary, where)


def _summary(error: Exception) -> str:
    """Return obstore's message in one line: without debug output and query strings (signatures)."""
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>([^<]*)</Code>", text)
    text = text.partition("<?xml")[0].partition("<Error>")[0]
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", text)
    text = " ".join([*text.split(), *([code[1]] if code else [])])
    return text.rstrip(" :-.")


def _was_repeated(error: OSError) -> bool:
    """True if obstore has repeated the request itself, in vain.

    It does not where an answer breaks off in a listing, or where a write found no answer in time.
    """
    return " retries, max_retries" in str(error.__cause__)


def _tries() -> Iterator[bool]:
    """Yield for each try whether it is the last."""
    for number in range(1, _TRIES + 1):
        yield number == _TRIES


# -------------------------------------------------------------------- what a store can do


@dataclass(frozen=True)
class Capabilities:
    """What a storage was seen to do."""

    create_once: bool
    """The second creation of a key is refused, and of several at once one succeeds."""
    suffix_range: bool
    """zarr-python can read the last bytes of an object."""
    range: bool
    """A range from the middle of an object comes back right."""
    problems: tuple[str, ...]
    """A sentence for each thing that does not work."""


_RACERS = 8
_PROBES = "probes"


def check_capabilities(storage: Storage) -> Capabilities:
    """Try on a small object what the token store relies on, and delete it again.

    Raises:
        OSError: The storage cannot be reached or written at all.
    """
    name = f"probe-{uuid.uuid4().hex}"
    # In a folder of the store's own: another worker may be looking whether the place is empty.
    key = f"{_PROBES}/{name}"
    race_key = f"{key}-race"
    content = bytes(range(64))
    problems = []
    create_once = _refuses_second(storage, key) and _has_one_winner(storage, race_key)
    if not create_once:
        problems.append(
            "create-once is ignored (If-None-Match on S3): two workers could commit the same unit."
        )
    storage.replace(key, content)
    inner = _reads(lambda: storage.read_range(key, 16, 8), content[16:24])
    if not inner:
        problems.append("Byte ranges come back wrong: tokens cannot be read from this store.")
    suffix = _reads(lambda: _read_suffix(storage, key, 8), content[-8:])
    if not suffix:
        problems.append(
            "Ranges that count from the end (bytes=-N) come back wrong: emocache reads without them, "
            "but zarr-python, which uses them for sharded arrays, cannot read this store."
        )
    if name not in storage.names(_PROBES):
        problems.append(
            "A listing lacks an object just written: committed units may be overlooked."
        )
    storage.delete(key)
    storage.delete(race_key)
    return Capabilities(create_once, suffix, inner, tuple(problems))


def _refuses_second(storage: Storage, key: str) -> bool:
    try:
        storage.create(key, b"first")
        return not storage.create(key, b"second") and storage.read(key) == b"first"
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        raise


def _has_one_winner(storage: Storage, key: str) -> bool:
    with ThreadPoolExecutor(_RACERS) as pool:
        wins = pool.map(lambda n: storage.create(key, f"racer {n}".encode()), range(_RACERS))
        return sum(wins) == 1


def _reads(read: Callable[[], bytes], expected: bytes) -> bool:
    """True if the bytes are right; a store that answers something else makes obstore refuse it."""
    try:
        return read() == expected
    except (ConnectionError, PermissionError, TimeoutError):
        raise
    except OSError:
        return False


def _read_suffix(storage: Storage, key: str, n_bytes: int) -> bytes:
    """Read the last bytes as zarr-python does."""
    store = storage.zarr_store("")
    found = sync(store.get(key, default_buffer_prototype(), SuffixByteRequest(n_bytes)))
    return b"" if found is None else found.to_bytes()


def require_exactly_once(storage: Storage, *, single_committer: bool) -> str | None:
    """Refuse to write where two workers could both commit a unit.

    Args:
        storage: Where units will be committed.
        single_committer: The user states that exactly one process writes. A storage that ignores
            create-once is then switched to looking and writing (`ObjectStorage.single_committer`).

    Returns:
        A warning for the user, or None where create-once is honoured.

    Raises:
        StoreError: Create-once is ignored, and `single_committer` is False or cannot help.
        OSError: The storage cannot be reached or written at all.
    """
    if check_capabilities(storage).create_once:
        return None
    if not isinstance(storage, ObjectStorage):
        raise StoreError(
            f"{storage.url}: the file system does not keep create-once (a hard link must fail where "
            "the name exists), so two workers could commit the same unit. Use another file system."
        )
    if not single_committer:
        raise StoreError(
            f"{storage.url}: the store ignores create-once (If-None-Match), so two workers could "
            "commit the same unit. Use a store that honours it, or pass --single-committer, which "
            "permits exactly one writing process."
        )
    storage.single_committer = True
    return (
        f"{storage.url}: the store ignores create-once; with --single-committer exactly one process "
        "may write, and a second one at the same time would go unnoticed and lose data."
    )
