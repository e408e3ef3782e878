"""A page of `emocache app` with a model that only pretends, and processes that serve one.

What the pretended model does, the first word of a file says: `slow` writes for long, `broken` is no media,
`crash` has a bug, `hostile` holds markup in all that can be text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache.clip import Record, Subtitle
from cache.commit import ClipTokens, Status
from cache.errors import MediaError
from cache.labels import LabelSpace
from eval.live.app import AppServer
from eval.live.clip import SeenClip, SeenFrame
from eval.live.page import Example
from eval.live.replies import LiveReply, ReplyStream
from eval.live.uploads import PageLimits
from eval.predictions import Prediction

REPOSITORY = Path(__file__).resolve().parents[1]
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'`${1+1}{{x}}&lt;"
)
LABELS = ("happy", "sad", "angry")
THOUGHT = "The brows are level. The voice is low and even."
SLOW_PIECES, SLOW_S = 400, 0.05


class FakeModel:
    """Looks and answers at once, from the first word of the file."""

    corpora: tuple[str, ...] = ()
    tasks = ("emotion", "think", "reason")
    trained_tasks = ("emotion", "think", "reason")

    def __init__(self) -> None:
        self.looked: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.closed = 0
        self._guard = threading.Lock()
        self.at_once = self.most_at_once = 0

    def space(self, task: str, corpus: str | None = None) -> LabelSpace | None:
        return None if task == "reason" else LabelSpace(name="emotion", labels=LABELS)

    def look(self, path: Path, **asked: Any) -> SeenClip:
        self.looked.append({"path": path, "mode": path.stat().st_mode, **asked})
        word = path.read_bytes().split()[0].decode(errors="replace")
        if word == "broken":
            raise MediaError(
                f"{path}: cannot be opened as media (InvalidDataError: 'file:{path}')."
            )
        if word == "long":
            raise MediaError(
                f"{path.name}: lasts 2:00:00 (h:min:s), more than the 60 s that are allowed. Cut out the "
                "part that you ask about, or raise --max-duration-s."
            )
        if word == "crash":
            raise RuntimeError(f"a bug at {path}")
        rgb = np.full((40, 60, 3), 90, np.uint8)
        remark = HOSTILE if word == "hostile" else f"Seen from {path}."
        ok = ClipTokens("ab" * 32, Status.OK, np.zeros((1, 1), np.float16))
        return SeenClip(
            name=word,
            path=path,
            record=Record(
                uid="clip/upload",
                media="upload",
                subtitles=(Subtitle(text="Words that were heard."),) if asked["transcribe"] else (),
            ),
            streams={
                "audio": ok,
                "video": ok,
                "image": ClipTokens("ab" * 32, Status.FAILED, reason=remark),
            },
            views={},  # type: ignore[arg-type]
            frames=tuple(SeenFrame(i, i / 4, rgb) for i in range(3)),
            waveform=np.sin(np.arange(16000) / 9).astype(np.float32),
            duration_s=1.0,
            heard_s=1.0,
            remarks=(remark,),
        )

    def with_subtitle(self, seen: SeenClip, subtitle: str, **_: Any) -> SeenClip:
        said = (Subtitle(text=subtitle),) if subtitle.strip() else ()
        return replace(seen, record=seen.record.model_copy(update={"subtitles": said}))

    def likelihoods(
        self, seen: SeenClip, task: str, *, options: Sequence[str] | None = None, **_: Any
    ) -> Mapping[str, float]:
        labels = list(options or LABELS)
        return {label: 1 / len(labels) for label in labels}

    def stream(
        self,
        seen: SeenClip,
        task: str,
        *,
        options: Sequence[str] | None = None,
        max_new_tokens: int = 200,
        **_: Any,
    ) -> ReplyStream:
        labels = tuple(options or LABELS)
        self.asked.append(
            {
                "task": task,
                "options": options,
                "subtitle": [s.text for s in seen.record.subtitles],
                "max_new_tokens": max_new_tokens,
            }
        )
        thought = HOSTILE if seen.name == "hostile" else THOUGHT
        reply = f"<think>{thought}</think><answer>{labels[0]}</answer>"

        def pieces() -> Iterator[str]:
            with self._guard:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if seen.name == "slow":
                    yield "<think>"
                    for at in range(SLOW_PIECES):
                        time.sleep(SLOW_S)
                        yield f"word{at} "
                for word in reply.split(" "):
                    time.sleep(0.002)
                    yield f"{word} "
            finally:
                with self._guard:
                    self.at_once -= 1
                    self.closed += 1

        prediction = Prediction(
            uid="clip/upload", task=task, reply=reply, label=labels[0], parse="tag", truth=None, run="r",
            spec_ids={"audio": "x"}, n_tokens=12,
        )  # fmt: skip
        return ReplyStream(pieces(), lambda: LiveReply(prediction, labels))


class Served:
    """A process that serves a page. A context manager.

    Args:
        command: What to run behind the Python program; its first line on stdout is the URL.
    """

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise AssertionError(self.process.communicate()[1])
        self._told: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._told.extend(self.process.stderr)

    @property
    def told(self) -> str:
        """What the process wrote to stderr so far; all of it once it ended."""
        if self.process.poll() is not None:
            self._reading.join(10)
        return "".join(self._told)

    def end(self, number: int) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reading.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def tell_of_the_network() -> None:
    """Write to stderr whenever this process asks for another machine."""

    def told(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            address = arguments[1] if event == "socket.connect" else arguments[0]
            host = address[0] if isinstance(address, tuple) else address
            if host not in ("127.0.0.1", "localhost", "::1") and not str(host).startswith("/"):
                sys.stderr.write(f"NETWORK {event} {address!r}\n")

    sys.addaudithook(told)


def main() -> None:
    """Serve a page with small limits until somebody ends it."""
    tell_of_the_network()
    limits = PageLimits(max_bytes=100_000, max_waiting=1, concurrency=1)
    example = Path(sys.argv[1])
    model: Any = FakeModel()
    about = f"a pretended run {HOSTILE}"
    with AppServer(model, limits, about=about, examples=[Example(HOSTILE, example)]) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
