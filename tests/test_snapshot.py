"""The index: columns and snapshots against a dictionary that is built the plain way."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import layout
from cache.commit import Commit, Entry, Status, write_commit
from cache.index import Index, read_index, read_snapshot, write_snapshot
from cache.layout import CLIPS_PER_SHARD
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from tests.conftest import key_of
from tests.faults import assert_holds, store_of

SPEC_ID = "0123456789abcdef"


def commit_of(
    number: int,
    clips: list[tuple[str, Status]],
    replaces: tuple[str, ...] = (),
    *,
    abandoned: bool = False,
) -> Commit:
    return Commit(
        unit_id=name_of(number),
        spec_id=SPEC_ID,
        shard=number,
        created="2026-11-20T12:00:00+00:00",
        provenance={},
        n_bytes=1000 + number,
        clips=tuple(
            Entry(
                key=key_of(name),
                row=number * CLIPS_PER_SHARD + place,
                status=status,
                valid_len=7 + place if status is Status.OK else 0,
                crc32c=number * 31 + place if status is Status.OK else None,
                reason=f"broken in {number}" if status is Status.FAILED else None,
                remark="odd" if name == "c" else None,
                truncated=name == "d",
            )
            for place, (name, status) in enumerate(clips)
        ),
        replaces=replaces,
        abandoned=abandoned,
    )


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:24]


clip_lists = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.sampled_from(list(Status))),
    min_size=1,
    max_size=5,
    unique_by=lambda clip: clip[0],
)
histories = st.lists(
    st.tuples(clip_lists, st.sets(st.integers(0, 7), max_size=2), st.booleans()),
    min_size=1,
    max_size=8,
)


def reference(commits: list[Commit]) -> dict[str, Entry]:
    """What counts, by the words of the documentation."""
    gone = {identity for commit in commits for identity in commit.replaces}
    best: dict[str, Entry] = {}
    for commit in sorted(commits, key=lambda c: c.shard):
        if commit.abandoned or commit.unit_id in gone:
            continue
        for entry in commit.clips:
            known = best.get(entry.key)
            if known is None or (
                known.status is Status.FAILED and entry.status is not Status.FAILED
            ):
                best[entry.key] = entry
    return best


@given(histories, st.integers(0, 8), st.randoms(use_true_random=False))
def test_the_index_is_what_a_dictionary_would_be(
    tmp_path_factory: pytest.TempPathFactory, history: object, n_in_snapshot: int, random: object
) -> None:
    commits = [
        commit_of(
            number,
            [] if abandoned else clips,
            # A unit takes over earlier ones only, and all that counts of them.
            tuple(name_of(n) for n in sorted(replaced) if n < number and not abandoned),
            abandoned=abandoned,
        )
        for number, (clips, replaced, abandoned) in enumerate(history)  # type: ignore[arg-type, var-annotated]
    ]
    storage = LocalStorage(tmp_path_factory.mktemp("index"))
    order = list(commits)
    random.shuffle(order)  # type: ignore[attr-defined]
    for commit in order[:n_in_snapshot]:
        write_commit(storage, commit)
    if n_in_snapshot % 2:
        write_snapshot(storage, SPEC_ID, read_index(storage, SPEC_ID))
    for commit in order[n_in_snapshot:]:
        write_commit(storage, commit)
    found = read_index(storage, SPEC_ID)
    wanted = reference(commits)
    # A snapshot forgets losers; when a later commit replaces the winner, it takes the clip over.
    replaced_keys = {
        e.key for c in commits for e in c.clips if any(c.unit_id in d.replaces for d in commits)
    }
    for name in "abcdefg":
        key = key_of(name)
        if key in replaced_keys and n_in_snapshot % 2:
            continue
        assert found.get(key) == wanted.get(key), name
        assert (key in found) == (key in wanted)
        failed = {
            c.unit_id
            for c in commits
            for e in c.clips
            if e.key == key and e.status is Status.FAILED
            and not any(c.unit_id in d.replaces for d in commits)
        }  # fmt: skip
        assert failed <= found.failed_in(key)
    if not n_in_snapshot % 2:
        assert list(found) == [wanted[key] for key in sorted(wanted)]
        assert len(found) == len(wanted)
        assert found.counts() == Index(commits).counts()
    assert found.n_units == sum(
        not c.abandoned and not any(c.unit_id in d.replaces for d in commits) for c in commits
    )


def test_looking_up_many_is_looking_up_one_by_one() -> None:
    index = Index(
        commit_of(n, [(f"{n}-{i}", list(Status)[i % 3]) for i in range(30)]) for n in range(9)
    )
    added = commit_of(20, [("new", Status.OK), ("0-1", Status.OK)])
    index.add(added)
    names = [f"{n}-{i}" for n in range(10) for i in range(31)] + ["new"]
    found = index.locate([key_of(name) for name in names])
    for place, name in enumerate(names):
        entry = index.get(key_of(name))
        if entry is None:
            assert found.status[place] == -1
            continue
        assert found.status[place] == entry.status.code
        assert (found.row[place], found.valid_len[place]) == (entry.row, entry.valid_len)
        assert found.crc32c[place] == (entry.crc32c or 0)
    settled = index.settled()
    assert [settled.get(key_of(name)) for name in names] == [
        index.get(key_of(name)) for name in names
    ]
    assert len(settled) == len(index) == 271


def test_keys_that_share_their_first_bytes_are_told_apart() -> None:
    keys = ["0" * 63 + digit for digit in "0123456789abcdef"]
    entries = [Entry(key=key, row=row, status=Status.OK, valid_len=row) for row, key in
               enumerate(keys)]  # fmt: skip
    commit = commit_of(0, []).model_copy(update={"clips": tuple(entries)})
    index = Index([commit])
    assert index.locate(keys).row.tolist() == list(range(16))
    assert [index.get(key) for key in keys] == [e.model_copy(update={"crc32c": 0}) for e in entries]


def test_a_store_opens_from_its_snapshot_without_reading_commit_records(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store = store_of(root, spec, "ab", "cd")
    key = store.write_snapshot(spec)

    def refuse(*_: object) -> None:
        raise AssertionError("a commit record was read")

    with monkeypatch.context() as patched:
        patched.setattr("cache.index.read_commit", refuse)
        assert_holds(root, spec, "ab", "cd")
    store_of(root, spec, "ef")  # what came later is read from its record
    assert_holds(root, spec, "ab", "cd", "ef")
    assert store.write_snapshot(spec) != key
    assert len(store.storage.names(layout.snapshots(spec.spec_id))) == 1


def test_a_damaged_snapshot_is_passed_over_with_a_word(
    tmp_path: Path, specs: dict[str, TokenSpec], caplog: pytest.LogCaptureFixture
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    key = store_of(root, spec, "ab").write_snapshot(spec)
    path = root / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert_holds(root, spec, "ab")
    assert "passed over (its checksum differs)" in caplog.text
    assert "store doctor" in caplog.text


def test_a_snapshot_takes_less_than_100_bytes_a_clip_in_memory_and_on_disk(tmp_path: Path) -> None:
    n = 200_000
    rng = np.random.default_rng(0)
    index = Index()
    for name, column in index.columns.items():
        top = {"row": n, "valid_len": 1500, "flags": 1}.get(name, 2**32 - 1)
        index.columns[name] = rng.integers(0, top, n).astype(column.dtype)
    index.columns["k0"].sort()
    storage = LocalStorage(tmp_path)
    key = write_snapshot(storage, SPEC_ID, index)
    assert storage.size(key) < 50 * n
    found = read_snapshot(storage, key)
    assert sum(column.nbytes for column in found.columns.values()) == 43 * n
    for name, column in index.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)
        assert not found.columns[name].flags.owndata, "mapped, not copied"
