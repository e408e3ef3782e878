"""Who leads a sweep: one process at a time, whoever else starts, looks or ends meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from cache.errors import StoreError
from eval.sweep.running import at_work
from eval.sweep.running.at_work import holding, is_held, leader, leading
from eval.sweep.state import LOCK_FILE


@pytest.mark.fault("sweep: a second start is refused")
def test_who_is_refused_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "_LOOK_S", 0.05)
    out = tmp_path / "out"
    with leading(out):
        for _ in range(2):
            with pytest.raises(StoreError, match=f"process {os.getpid()} on .* runs this sweep"):
                leading(out).__enter__()
            assert (out / LOCK_FILE).exists()
        assert leader(out) is not None
    assert not out.exists(), "nothing was begun: it leaves no trace"


def test_who_only_looks_is_waited_for(tmp_path: Path) -> None:
    with leading(tmp_path):
        (tmp_path / "sweep.json").touch()
    look = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
    fcntl.flock(look, fcntl.LOCK_SH)
    assert leader(tmp_path) is None, "who looks is no leader to another one who looks"
    after = threading.Timer(0.2, os.close, (look,))
    after.start()
    with leading(tmp_path):
        assert leader(tmp_path) is not None
    after.join()


def test_a_lock_that_was_deleted_before_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who led before may delete the file between our opening and our locking it."""
    real, deleted = at_work._lock, []

    def lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
        if not deleted:
            (tmp_path / LOCK_FILE).unlink()
            deleted.append(descriptor)
        return real(descriptor, kind)

    monkeypatch.setattr(at_work, "_lock", lock)
    with leading(tmp_path):
        assert deleted
        assert leader(tmp_path) is not None


def test_who_led_a_folder_that_was_removed_leaves_the_next_one_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = leading(out)
    first.__enter__()
    shutil.rmtree(out)
    with leading(out):
        first.__exit__(None, None, None)
        assert leader(out) is not None
    with leading(out):
        shutil.rmtree(out)  # and its own end is no error
    assert not out.exists()


def test_a_run_is_held_by_one_and_looked_at_by_many(tmp_path: Path) -> None:
    assert not is_held(tmp_path, "a")
    with holding(tmp_path, "a"):
        assert is_held(tmp_path, "a")
        assert not is_held(tmp_path, "b")
    assert not is_held(tmp_path, "a")
