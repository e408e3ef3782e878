"""A process that decodes clips for another one, so that a fatal file kills this one alone.

`python -m extract.decode_worker PARENT_PID MEMORY_BYTES [DETECTOR]` reads a `DecodeJob` per line on stdin
and answers each on stdout: a JSON document with facts of the container, then `extract.inputs`. Before the
first it sends an empty document, to say that it is ready: a detector of faces is loaded then. It ends with
stdin, or with its parent. `extract.decode_pool` is the other side.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cache.errors import MediaError
from extract.faces import BoxDetector, FaceOrder, finder_of, load_box_detector
from extract.inputs import InputRequest, prepare_inputs
from extract.media import open_media, picture_format
from extract.wire import write_document, write_inputs

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""
_SPARE_ADDRESSES_BYTES = 2**30
"""Address space beyond twice the memory: threads and allocators reserve more than they use."""
_IGNORED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""A terminal and a batch system send these to every process of a job; the parent decides what they
mean for a clip that is being decoded."""


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode."""

    path: Path
    sha256: str
    """Digest of the bytes that were indexed."""
    media: str
    """The record's media path, for messages."""
    requests: tuple[InputRequest, ...]
    picture_decoder: Literal["auto", "pyav"] = "auto"
    """See `extract.decode.decode`."""
    faces: FaceOrder | None = None
    """Where the face is, for requests with a crop."""


def job_line(job: DecodeJob, *, state_facts: bool, dump_after_s: float) -> bytes:
    """Return the line that asks for a job.

    Args:
        job: The clip.
        state_facts: Whether to send what the container states before decoding starts, for the case
            that decoding never ends.
        dump_after_s: When to write to stderr where the process is, should it still be at work.
    """
    order = {
        "path": str(job.path),
        "sha256": job.sha256,
        "media": job.media,
        "requests": [request.model_dump() for request in job.requests],
        "picture_decoder": job.picture_decoder,
        "faces": None if job.faces is None else job.faces.model_dump(),
        "state_facts": state_facts,
        "dump_after_s": dump_after_s,
    }
    return json.dumps(order).encode() + b"\n"  # ASCII: any file name survives


def memory_of(pid: int | str) -> tuple[int, int]:
    """Return a process's address space and resident memory in bytes; zeros where nobody tells."""
    try:
        size, resident, *_ = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:  # it has ended, or this is no Linux
        return 0, 0
    page_bytes = resource.getpagesize()
    return int(size) * page_bytes, int(resident) * page_bytes


def stated_facts(path: Path) -> dict[str, Any]:
    """Return what a file's header states, without decoding; empty if it does not open."""
    try:
        kind = picture_format(path)
        if kind is not None:
            return {"container": kind, "n_bytes": path.stat().st_size}
        with open_media(path) as container:
            return {
                "container": container.format.name,
                "n_bytes": path.stat().st_size,
                "streams": [_stream_facts(stream) for stream in container.streams],
            }
    except (MediaError, OSError):  # decoding will say so, too
        return {}


def _stream_facts(stream: Any) -> dict[str, Any]:
    """Return one stream's kind, codec and sizes, as far as the header has them."""
    facts: dict[str, Any] = {"type": stream.type}
    context = stream.codec_context
    if context is not None:
        names = ("name", "width", "height", "sample_rate", "channels")
        facts |= {name: getattr(context, name, None) for name in names}
    return {name: fact for name, fact in facts.items() if fact is not None}


def main() -> None:
    """Decode what stdin asks for until it ends."""
    parent_pid, memory_bytes = (int(argument) for argument in sys.argv[1:3])
    orders, answers = _take_pipes()
    _end_with(parent_pid)
    # Ahead of the bound on memory: that is for clips, whatever libraries a detector needs.
    detector = load_box_detector(sys.argv[3]) if len(sys.argv) > 3 else None
    _bound(memory_bytes)
    write_document(answers, b"{}")
    answers.flush()
    for line in orders:
        _answer(json.loads(line), detector, answers)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return stdin and stdout, and let libraries that print write to stderr instead."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return orders, answers


def _end_with(parent_pid: int) -> None:
    """See to it that no decoder outlives its parent, and that only its parent ends it."""
    faulthandler.enable()  # a crash leaves its Python stack on stderr
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent_pid:  # it ended before we asked to be told
        sys.exit(f"the parent process {parent_pid} has ended")


def _bound(memory_bytes: int) -> None:
    """Leave no core files, and stop runaway allocations that are too quick for the parent to see."""
    _lower(resource.RLIMIT_CORE, 0)
    used_bytes, _ = memory_of("self")
    if used_bytes:
        _lower(resource.RLIMIT_AS, used_bytes + 2 * memory_bytes + _SPARE_ADDRESSES_BYTES)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    if hard == resource.RLIM_INFINITY or value < hard:
        resource.setrlimit(limit, (value, value))


def _answer(order: dict[str, Any], detector: BoxDetector | None, answers: BinaryIO) -> None:
    path = Path(order["path"])
    told = order["faces"]
    requests = [InputRequest.model_validate(request) for request in order["requests"]]
    faulthandler.dump_traceback_later(order["dump_after_s"])
    facts = stated_facts(path) if order["state_facts"] else {}
    write_document(answers, json.dumps(facts).encode())
    answers.flush()
    inputs = prepare_inputs(
        path,
        order["sha256"],
        order["media"],
        requests,
        picture_decoder=order["picture_decoder"],
        faces=None if told is None else finder_of(FaceOrder.model_validate(told), detector),
    )
    write_inputs(answers, inputs)
    answers.flush()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
