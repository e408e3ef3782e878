"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from cache.commit import ClipTokens, Status
from cache.spec import TokenSpec
from extract import tiny
from extract.encoders.bank import EncoderBank
from train.presets import demo

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread per test process: tests run side by side, and torch's threads spin when cores are taken.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# The same examples every time, and no deadline that a busy machine could miss.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """The folder of real media beside the project, where there is one."""
    folder = SHARED / "clips"
    if not folder.is_dir():
        pytest.skip("needs the real clips in ../shared/clips")
    return folder


@pytest.fixture(autouse=True)
def _own_cache_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the digest memo of real checkpoints out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))


@pytest.fixture(autouse=True)
def _record_faults(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """Tell the summary which faults a test causes: `@pytest.mark.fault("kill -9 of a worker")`."""
    for mark in request.node.iter_markers("fault"):
        record_property("faults", (mark.args[0], 1))


def key_of(name: str) -> str:
    """Return a token key for a made-up clip."""
    return hashlib.sha256(name.encode()).hexdigest()


def make_clip(spec: TokenSpec, name: str, n_audio: int = 120) -> ClipTokens:
    """Return random tokens of a spec for a made-up clip, equal for equal names."""
    rng = np.random.default_rng(list(name.encode()))
    shape = (n_audio, spec.max_shape[1]) if spec.stream == "audio" else spec.max_shape
    n_frames = spec.frames.n_frames if spec.frames else 0
    return ClipTokens(
        key_of(name),
        Status.OK,
        rng.standard_normal(shape).astype(spec.dtype),
        frame_index=tuple(range(n_frames)),
        frame_pts_s=tuple(i / 25 for i in range(n_frames)),
    )


@pytest.fixture(scope="session")
def specs() -> dict[str, TokenSpec]:
    """The demo preset's specs, with made-up weights."""
    return {spec.stream: spec.with_weights("ab" * 32) for spec in demo().tokens.all()}


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, Path]:
    """The bundled checkpoints, by encoder kind."""
    return {
        kind: Path(tiny.__file__).parent / name for kind, name in demo().bundled_weights.items()
    }


@pytest.fixture(scope="session")
def bank(tiny_weights: dict[str, Path]) -> EncoderBank:
    """The demo preset's encoders."""
    return EncoderBank(demo().tokens.all(), tiny_weights)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many faults were caused on purpose, by kind, and how many were survived."""
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "faults":
                    kind, n = value
                    tried[kind] += n
                    survived[kind] += n * (outcome == "passed")
    n_failed = sum(
        "test_faults" in report.nodeid for report in terminalreporter.stats.get("failed", [])
    )
    if not tried and not n_failed:
        return
    terminalreporter.section("faults caused on purpose")
    for kind in sorted(tried):
        terminalreporter.line(f"{kind:<48} tried {tried[kind]:>5}  survived {survived[kind]:>5}")
    terminalreporter.line(
        f"{'together':<48} tried {tried.total():>5}  survived {survived.total():>5}"
        + (f"; {n_failed} fault tests failed" if n_failed else "")
    )
