"""Both homes of a store behave alike; an object store also does so while its network fails."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import zarr

from cache.errors import MissingDependencyError, StoreError
from cache.object_storage import (
    ObjectStorage,
    Retry,
    check_capabilities,
    require_exactly_once,
)
from cache.storage import LocalStorage, Storage
from tests.object_store import (
    LATE_S,
    Fault,
    FaultyProxy,
    environment,
    faulty_proxy,
    make_bucket,
    moto_server,
)

pytest.importorskip("obstore")
pytest.importorskip("moto")

BRIEF = Retry(n_retries=4, total_s=5, request_s=5, first_pause_s=0.01, longest_pause_s=0.05)
PUT = frozenset({"PUT"})
POST = frozenset({"POST"})


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    """An empty bucket's folder."""
    bucket = f"test-{uuid.uuid4().hex}"
    make_bucket(server, bucket)
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    return ObjectStorage(f"s3://{bucket}/some/prefix", retry=BRIEF)


@pytest.fixture
def proxy(s3: ObjectStorage, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def faulty(s3: ObjectStorage, proxy: FaultyProxy) -> ObjectStorage:
    """The folder of `s3` through `proxy`."""
    return ObjectStorage(s3.url, retry=BRIEF)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "store")
    found = request.getfixturevalue("s3")
    assert isinstance(found, ObjectStorage)
    return found


def race(n_threads: int, act: Callable[[int], bool]) -> list[bool]:
    """Run `act(0)`, `act(1)`, ... at the same moment."""
    barrier = Barrier(n_threads)

    def run(number: int) -> bool:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(run, range(n_threads)))


# ---------------------------------------------------------------- both alike


def test_a_replaced_file_reads_back_whole_and_in_ranges(storage: Storage) -> None:
    storage.replace("a/b.bin", b"old")
    storage.replace("a/b.bin", bytes(range(100)), durable=False)

    assert storage.read("a/b.bin") == bytes(range(100))
    assert storage.size("a/b.bin") == 100
    assert storage.read_range("a/b.bin", 10, 5) == bytes([10, 11, 12, 13, 14])
    assert storage.read_range("a/b.bin", 98, 50) == bytes([98, 99])
    assert storage.read_range("a/b.bin", 100, 5) == b""
    assert storage.read_range("a/b.bin", 500, 5) == b""
    assert storage.read_range("a/b.bin", 3, 0) == b""


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    storage.replace("empty", b"")

    assert storage.size("empty") == 0
    assert storage.read("empty") == b""
    assert storage.read_range("empty", 0, 4) == b""
    assert storage.names("") == ["empty"]


def test_a_missing_file_is_named_in_the_error(storage: Storage) -> None:
    storage.replace("a/there", b"x")
    for act in (
        lambda: storage.read("a/gone"),
        lambda: storage.read_range("a/gone", 0, 1),
        lambda: storage.read_range("a/gone", 0, 0),
        lambda: storage.size("a/gone"),
    ):
        with pytest.raises(FileNotFoundError, match=r"a/gone"):
            act()


def test_deleting_is_done_once_and_allowed_twice(storage: Storage) -> None:
    storage.replace("a/x", b"x")
    storage.replace("a/y", b"y")
    storage.delete("a/x")
    storage.delete("a/x")
    storage.delete("nowhere/at/all")

    assert storage.names("a") == ["y"]


def test_listings_show_what_is_directly_in_a_folder(storage: Storage) -> None:
    for key in ("top", "a/1", "a/2", "a/.x.1-2.partial", "a/b/3", "a/c/d/4", "ab/5"):
        storage.replace(key, b"x")

    assert storage.names("") == ["top"]
    assert sorted(storage.folders("")) == ["a", "ab"]
    assert sorted(storage.names("a")) == ["1", "2"]
    assert sorted(storage.folders("a")) == ["b", "c"]
    assert storage.names("a/c") == []
    assert storage.names("nowhere") == []
    assert storage.folders("nowhere") == []


def test_a_second_creation_is_refused_and_changes_nothing(storage: Storage) -> None:
    assert storage.create("a/once", b"first") is True
    assert storage.create("a/once", b"second") is False

    assert storage.read("a/once") == b"first"
    assert storage.names("a") == ["once"]


def test_a_deleted_file_can_be_created_again(storage: Storage) -> None:
    storage.create("a", b"first")
    storage.delete("a")

    assert storage.create("a", b"second")
    assert storage.read("a") == b"second"


def test_of_sixteen_creations_at_once_one_wins(storage: Storage) -> None:
    wins = race(16, lambda n: storage.create("claims/7", f"attempt {n}".encode()))

    assert sum(wins) == 1
    assert storage.read("claims/7") == f"attempt {wins.index(True)}".encode()


@pytest.mark.parametrize("n_parts", [0, 1, 5])
def test_a_large_file_is_written_from_its_parts(storage: Storage, n_parts: int) -> None:
    # 5 parts of 4 MB are more than two requests' worth; the parts are views of other kinds of number
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 999, (1000, 1000), np.int32) for _ in range(n_parts)]
    parts = [b"start", *(memoryview(array) for array in arrays), b""]
    whole = b"start" + b"".join(array.tobytes() for array in arrays)

    assert storage.write("c/0/0", iter(parts)) == len(whole)
    assert storage.size("c/0/0") == len(whole)
    assert hashlib.sha256(storage.read("c/0/0")).digest() == hashlib.sha256(whole).digest()
    assert storage.names("c/0") == ["0"]


@pytest.mark.parametrize("n_good", [1, 30])
@pytest.mark.parametrize("error", [ValueError("mine"), FileNotFoundError(2, "mine", "source")])
def test_a_source_that_fails_leaves_no_file(
    storage: Storage, n_good: int, error: Exception
) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b"x" * 2**20] * n_good
        raise error

    with pytest.raises(type(error), match=r"mine") as caught:
        storage.write("c/0", parts())
    assert caught.value is error
    assert storage.names("c") == []


def test_zarr_writes_and_reads_in_it(storage: Storage) -> None:
    group = zarr.create_group(storage.zarr_store("tokens.zarr", read_only=False))
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    group.create_array("x", data=values, chunks=(1, 10), shards=(3, 10))

    again = storage.zarr_store("tokens.zarr")
    assert list(zarr.open_group(again, mode="r")) == ["x"]
    x = zarr.open_array(again, path="x", mode="r")
    np.testing.assert_array_equal(x[2:5], values[2:5])
    assert storage.url in str(again)
    assert storage.names("tokens.zarr/x/c/1") == ["0"]
    with pytest.raises(ValueError, match=r"read-only"):
        zarr.create_group(storage.zarr_store("other.zarr"))
    writable = storage.zarr_store("tokens.zarr").with_read_only(False)
    zarr.open_array(writable, path="x", mode="r+")[0] = 7
    assert storage.zarr_store("tokens.zarr") == storage.zarr_store("tokens.zarr")
    np.testing.assert_array_equal(x[0], np.full(10, 7, np.float32))


def test_a_spawned_worker_opens_its_own(storage: Storage) -> None:
    storage.replace("a", b"from the parent")
    pickled = pickle.dumps(storage)
    assert b"testing" not in pickled, "no credentials travel"
    assert b"obstore" not in pickled, "no connection travels"

    assert pickle.loads(pickled).read("a") == b"from the parent"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(storage.read, "a").result(timeout=60) == b"from the parent"


def test_a_good_store_has_no_problems_and_keeps_no_probe(storage: Storage) -> None:
    found = check_capabilities(storage)

    assert (found.create_once, found.suffix_range, found.range) == (True, True, True)
    assert found.problems == ()
    assert (storage.names(""), storage.names("probes")) == ([], [])
    assert require_exactly_once(storage, single_committer=True) is None
    assert not getattr(storage, "single_committer", False)


# ---------------------------------------------------------------- listings of S3


def test_a_listing_of_many_pages_is_whole(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    for number in range(10):
        faulty.replace(f"a/{number}", b"")
        faulty.replace(f"a/folder {number}/x", b"")
    pages = proxy.add(Fault("small pages"))

    assert sorted(faulty.names("a")) == [str(n) for n in range(10)]
    assert sorted(faulty.folders("a")) == [f"folder {n}" for n in range(10)]
    assert pages.n_done >= 2 * 20 / 3


def test_the_mark_of_a_folder_is_no_file_in_it(s3: ObjectStorage, server: str) -> None:
    s3.replace("a/x", b"")
    bucket, _, prefix = s3.url.removeprefix("s3://").partition("/")
    make_bucket(server, f"{bucket}/{prefix}/a/")  # a PUT of nothing, as consoles mark a folder

    assert s3.names("a") == ["x"]


# ---------------------------------------------------------------- a network that fails


@pytest.mark.parametrize("kind", ["drop before", "drop after", "cut body", "unavailable"])
def test_every_operation_survives_a_failing_network(
    faulty: ObjectStorage, proxy: FaultyProxy, kind: str
) -> None:
    fault = proxy.add(Fault(kind, every=3))  # type: ignore[arg-type]
    large = np.random.default_rng(1).bytes(20_000_000)

    for number in range(4):
        assert faulty.create(f"a/{number}", f"content {number}".encode())
        assert not faulty.create(f"a/{number}", b"another")
        faulty.replace(f"b/{number}", b"x" * number)
    assert faulty.write("large", [large]) == len(large)
    assert faulty.read("large") == large
    assert faulty.read_range("large", 5_000_000, 9_000_000) == large[5_000_000:14_000_000]
    for number in range(4):
        assert faulty.read(f"a/{number}") == f"content {number}".encode()
        assert faulty.size(f"b/{number}") == number
        assert sorted(faulty.names("a")) == ["0", "1", "2", "3"]
        faulty.delete(f"b/{number}")
    assert faulty.names("b") == []
    assert fault.n_done >= 10
    assert not any("?delete" in request for request in proxy.requests), "not every store knows it"


def test_a_listing_that_breaks_off_is_repeated(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    faulty.replace("a/x", b"")
    proxy.add(Fault("cut body", times=2, target="list-type"))
    assert faulty.names("a") == ["x"]

    always = proxy.add(Fault("cut body", target="list-type"))
    with pytest.raises(ConnectionError, match=r"s3://test-.*/some/prefix/a"):
        faulty.names("a")
    assert always.n_done == 3


def test_a_create_whose_answer_was_lost_is_ours(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    lost = proxy.add(Fault("drop after", times=1, methods=PUT))

    assert faulty.create("claim", b"attempt 1") is True
    assert lost.n_done == 1
    assert sum(r.startswith("PUT") for r in proxy.requests) == 2, "the repetition was refused"
    assert faulty.create("claim", b"attempt 2") is False
    assert faulty.read("claim") == b"attempt 1"


def test_a_create_that_gets_no_answer_in_time_is_repeated(
    s3: ObjectStorage, proxy: FaultyProxy
) -> None:
    proxy.add(Fault("late answer", times=1, methods=PUT))
    impatient = ObjectStorage(s3.url, retry=Retry(4, 5, LATE_S / 3, 0.01, 0.05))

    assert impatient.create("claim", b"attempt 1") is True
    assert s3.read("claim") == b"attempt 1"


def test_lost_answers_in_a_race_make_neither_two_winners_nor_none(
    faulty: ObjectStorage, proxy: FaultyProxy
) -> None:
    lost = proxy.add(Fault("drop after", every=2, methods=PUT))
    for round_ in range(5):
        key = f"claims/{round_}"
        wins = race(8, lambda n, key=key: faulty.create(key, f"attempt {n}".encode()))  # type: ignore[misc]
        assert sum(wins) == 1
        assert faulty.read(key) == f"attempt {wins.index(True)}".encode()
    assert lost.n_done >= 20


def test_a_create_refused_by_an_object_that_is_gone_again_is_repeated(
    faulty: ObjectStorage, proxy: FaultyProxy, s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.create("claim", b"another's")
    read = ObjectStorage.read

    def read_after_deletion(self: ObjectStorage, key: str) -> bytes:
        s3.delete(key)
        return read(self, key)

    monkeypatch.setattr(ObjectStorage, "read", read_after_deletion)
    assert faulty.create("claim", b"ours") is True
    assert read(s3, "claim") == b"ours"


def test_an_upload_whose_completion_was_lost_and_forgotten_is_whole(
    faulty: ObjectStorage, proxy: FaultyProxy
) -> None:
    lost = proxy.add(Fault("drop after", times=1, methods=POST, target=r"\?uploadId="))
    forgotten = proxy.add(
        Fault("no such upload", every=2, times=1, methods=POST, target=r"\?uploadId=")
    )
    large = np.random.default_rng(1).bytes(9_000_000)

    assert faulty.write("large", [large[:100], large[100:]]) == len(large)
    assert (lost.n_done, forgotten.n_done) == (1, 1)
    assert faulty.read("large") == large


def test_an_upload_that_was_never_completed_is_an_error(
    faulty: ObjectStorage, proxy: FaultyProxy
) -> None:
    faulty.replace("large", b"o" * 9_000_000)  # of the same size, but not what is written
    proxy.add(Fault("no such upload", methods=POST, target=r"\?uploadId="))

    with pytest.raises(FileNotFoundError, match=r"some/prefix/large"):
        faulty.write("large", [b"n" * 9_000_000])
    assert faulty.read("large") == b"o" * 9_000_000


def test_a_refused_request_is_a_permission_error(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    faulty.replace("a", b"x")
    values = zarr.create_array(
        faulty.zarr_store("z", read_only=False), data=np.arange(3), overwrite=True
    )
    proxy.add(Fault("forbidden"))
    for act in (
        lambda: faulty.read("a"),
        lambda: faulty.size("a"),
        lambda: faulty.names(""),
        lambda: faulty.create("b", b""),
        lambda: faulty.replace("b", b""),
        lambda: faulty.write("b", [b"x" * 9_000_000]),
        lambda: faulty.delete("a"),
        lambda: values[:],
        lambda: check_capabilities(faulty),
    ):
        with pytest.raises(PermissionError, match=r"access denied.*403.*s3://test-") as caught:
            act()
        assert "?" not in str(caught.value), "query strings may hold signatures"
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what stores cannot do


@pytest.mark.parametrize("kind", ["ignore preconditions", "conditions unknown"])
def test_a_store_without_create_once_takes_a_single_committer_only(
    faulty: ObjectStorage, proxy: FaultyProxy, kind: str
) -> None:
    proxy.add(Fault(kind))  # type: ignore[arg-type]

    found = check_capabilities(faulty)
    assert (found.create_once, found.suffix_range, found.range) == (False, True, True)
    assert len(found.problems) == 1
    assert "two workers could commit the same unit" in found.problems[0]

    with pytest.raises(StoreError, match=r"If-None-Match.*--single-committer.*exactly one"):
        require_exactly_once(faulty, single_committer=False)
    assert not faulty.single_committer

    warning = require_exactly_once(faulty, single_committer=True)
    assert warning is not None
    assert "exactly one process" in warning
    assert pickle.loads(pickle.dumps(faulty)).single_committer
    assert faulty.create("a", b"first") is True
    assert faulty.create("a", b"second") is False
    assert faulty.read("a") == b"first"
    assert sum(race(8, lambda n: faulty.create("b", f"thread {n}".encode()))) == 1


def test_a_file_system_without_create_once_is_refused(tmp_path: Path) -> None:
    class Forgetful(LocalStorage):
        def create(self, key: str, data: bytes) -> bool:
            self.replace(key, data)
            return True

    for single_committer in (False, True):
        with pytest.raises(StoreError, match=r"does not keep create-once"):
            require_exactly_once(Forgetful(tmp_path), single_committer=single_committer)


def test_a_store_that_lets_two_win_a_race_is_found_out(tmp_path: Path) -> None:
    class Hasty(LocalStorage):
        """Looks, and some time later writes."""

        def create(self, key: str, data: bytes) -> bool:
            if self.path(key).exists():
                return False
            time.sleep(0.1)
            self.replace(key, data)
            return True

    assert not check_capabilities(Hasty(tmp_path)).create_once


def test_wrong_suffix_ranges_are_found_out(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    proxy.add(Fault("wrong suffix"))
    found = check_capabilities(faulty)

    assert (found.create_once, found.suffix_range, found.range) == (True, False, True)
    assert len(found.problems) == 1
    assert "zarr-python" in found.problems[0]
    assert require_exactly_once(faulty, single_committer=False) is None
    # another worker that looks into an empty place meanwhile must see nothing foreign
    assert all("probes/probe-" in r or "list-type" in r for r in proxy.requests)


def test_ignored_ranges_are_found_out(faulty: ObjectStorage, proxy: FaultyProxy) -> None:
    proxy.add(Fault("ignore range"))
    found = check_capabilities(faulty)

    assert (found.create_once, found.suffix_range, found.range) == (True, False, False)
    assert "tokens cannot be read" in found.problems[0]
    faulty.replace("a", b"abc")
    with pytest.raises(OSError, match=r"non-partial"):
        faulty.read_range("a", 1, 1)


# ---------------------------------------------------------------- wrong addresses


def test_a_missing_bucket_is_named(s3: ObjectStorage) -> None:
    nowhere = ObjectStorage("s3://no-such-bucket/x", retry=BRIEF)
    for act in (
        lambda: nowhere.read("a"),
        lambda: nowhere.names(""),
        lambda: nowhere.create("a", b""),
        lambda: nowhere.write("a", [b"x" * 9_000_000]),
        lambda: nowhere.delete("a"),
        lambda: check_capabilities(nowhere),
    ):
        with pytest.raises(FileNotFoundError, match=r"bucket does not exist.*s3://no-such-bucket"):
            act()
    with pytest.raises(FileNotFoundError, match=r"or no such bucket.*s3://no-such-bucket"):
        nowhere.size("a")


def test_a_wrong_endpoint_is_given_up_in_bounded_time(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    nowhere = ObjectStorage(s3.url, retry=BRIEF)
    start = time.monotonic()
    for act in (
        lambda: nowhere.size("a"),
        lambda: nowhere.names(""),
        lambda: nowhere.create("a", b""),
        lambda: require_exactly_once(nowhere, single_committer=False),
    ):
        with pytest.raises(ConnectionError, match=r"connection failed.*http://127.0.0.1:9.*s3://"):
            act()
    assert time.monotonic() - start < 5


def test_what_was_repeated_in_vain_is_not_repeated_again(
    faulty: ObjectStorage, proxy: FaultyProxy
) -> None:
    fault = proxy.add(Fault("drop before"))
    for act in (lambda: faulty.create("a", b""), lambda: faulty.names("")):
        fault.n_done = 0
        with pytest.raises(ConnectionError, match=r"after 4 retries"):
            act()
        assert fault.n_done == 1 + 4


def test_missing_credentials_are_named(s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PermissionError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        ObjectStorage(s3.url, retry=BRIEF).read("a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://bucket/x", r"kind 'ftp' is not known.*s3://"),
        ("s3://", r"s3://: cannot be opened"),
        ("s3:///prefix", r"cannot be opened"),
    ],
)
def test_a_wrong_url_is_refused_before_any_request(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        ObjectStorage(url)


@pytest.mark.parametrize("url", ["gs://bucket/x", "az://container/x/"])
def test_other_providers_open_without_a_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    storage = ObjectStorage(url)

    assert storage.url == url.rstrip("/")
    assert str(storage.zarr_store("t")) == f"{storage.url}/t"


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emocache\[remote\]'"):
        ObjectStorage("s3://bucket/x")


# ---------------------------------------------------------------- processes

_FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")  # Python warns of every fork beside threads
from cache.object_storage import ObjectStorage

storage = ObjectStorage(sys.argv[1])

def fork() -> None:
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            print(storage.read("a").decode())
        except OSError as error:
            print(type(error).__name__, error)
        sys.stdout.flush()
        os._exit(0)
    os.wait()

fork()
print("parent", storage.read("a").decode())
fork()
"""


def test_a_fork_after_the_first_request_is_refused_instead_of_hanging(s3: ObjectStorage) -> None:
    s3.replace("a", b"content")
    done = subprocess.run(
        [sys.executable, "-c", _FORK, s3.url],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    before, parent, after = done.stdout.splitlines()
    assert before == "content"
    assert parent == "parent content"
    assert after.startswith("OSError")
    assert "'spawn' or 'forkserver'" in after
