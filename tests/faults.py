"""What the fault tests share: a store with known content, the invariant, and processes that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from cache.commit import ClipTokens
from cache.errors import EmocacheError
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import make_clip

PROVENANCE = {"torch": "0"}


def unit(spec: TokenSpec, names: Iterable[str]) -> list[ClipTokens]:
    """Return made-up clips, equal for equal names."""
    return [make_clip(spec, name, n_audio=40 + i) for i, name in enumerate(names)]


def store_of(root: Path, spec: TokenSpec, *units: Iterable[str]) -> TokenStore:
    """Return a store with some units committed."""
    store = TokenStore.open_or_create(root)
    for names in units:
        store.commit(spec, unit(spec, names), PROVENANCE)
    return store


def assert_holds(where: Path | str, spec: TokenSpec, *units: Iterable[str]) -> None:
    """The invariant: these units read back byte-equal, and nothing else is visible."""
    store = TokenStore.open(where)
    clips = [clip for names in units for clip in unit(spec, names)]
    assert {entry.key for entry in store.index(spec)} == {clip.key for clip in clips}
    for clip in clips:
        assert clip.tokens is not None
        assert store.read(spec, clip.key).tokens.tobytes() == clip.tokens.tobytes()
    store.close()


def read_or_name(where: Path, spec: TokenSpec, clips: Iterable[ClipTokens]) -> list[EmocacheError]:
    """Read clips of a damaged store: each comes back byte-equal or with an error of ours."""
    errors: list[EmocacheError] = []
    for clip in clips:
        try:
            store = TokenStore.open(where)
            assert spec.spec_id in store.specs
            tokens = store.read(spec, clip.key).tokens
            found = store.frame_times(spec, store.entry(spec, clip.key).row)
        except EmocacheError as error:
            errors.append(error)
            continue
        assert clip.tokens is not None
        assert tokens.tobytes() == clip.tokens.tobytes()
        assert tuple(found[0]) == clip.frame_index
    return errors


def die(*_: object, **__: object) -> None:
    """End this process as a power cut or the kernel's memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
