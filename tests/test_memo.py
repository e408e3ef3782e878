"""What is remembered between runs: losing it costs time, never a wrong answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from cache.spec import TokenSpec
from extract.encoders.bank import EncoderBank
from extract.memo import Memo, cache_home
from train.presets import demo


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_two_processes_write_is_kept() -> None:
    first, second = Memo("a/b.json"), Memo("a/b.json")
    first.put("x", [1, "é"])
    first.save()
    second.put("y", None)
    second.put("z", 2)
    second.save()
    found = Memo("a/b.json")
    assert (found.get("x"), found.get("z"), found.get("none")) == ([1, "é"], 2, None)


@pytest.mark.fault("damaged memo")
@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_counts_as_none(home: Path, damaged: bytes) -> None:
    (home / "emocache").mkdir(parents=True)
    (home / "emocache" / "m.json").write_bytes(damaged)
    memo = Memo("m.json")
    assert memo.get("x") is None
    memo.put("x", 1)
    memo.save()
    assert Memo("m.json").get("x") == 1


@pytest.mark.fault("cache folder that cannot be written")
def test_a_folder_that_cannot_be_written_is_borne(home: Path) -> None:
    home.write_text("in the way")
    memo = Memo("m.json")
    memo.put("x", 1)
    memo.save()
    assert memo.get("x") == 1
    assert Memo("m.json").get("x") is None


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/nobody")
    assert cache_home() == Path("/nobody/.cache")


def test_a_checkpoint_is_read_once_until_it_changes(
    tmp_path: Path, tiny_weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(tiny_weights["whisper"].read_bytes())
    spec = demo().tokens.audio
    loads: list[Path] = []
    real = EncoderBank._load

    def counted(self: EncoderBank, spec: TokenSpec, path: Path) -> object:
        loads.append(path)
        return real(self, spec, path)

    monkeypatch.setattr(EncoderBank, "_load", counted)

    def resolved() -> Sequence[TokenSpec]:
        return EncoderBank([spec], {"audio": path}).specs

    first = resolved()
    assert resolved() == first
    assert len(loads) == 1
    os.utime(path, (1, 1))
    assert resolved() == first
    assert len(loads) == 2
