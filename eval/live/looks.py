"""What the page shows, as HTML. Whatever a clip, a user or the model says is escaped: text stays text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.commit import ClipTokens, Status
from cache.encoders import SAMPLE_RATE_HZ
from eval.pages import page_environment
from eval.results.pictures import WAVE_HEIGHT, WAVE_WIDTH, data_uri, waveform_path
from extract.annotate.evidence.media import jpeg_bytes

if TYPE_CHECKING:
    from jinja2 import Environment

    from eval.live.answer import LiveReply
    from eval.live.clip import SeenClip

_NAMES = {"video": "Video", "image": "Picture", "audio": "Sound", "local": "Video, second encoder"}
_STRIP_PX = 132
_TITLES = {
    "emotion": "emotion",
    "sentiment": "sentiment",
    "intent": "intent",
    "multi-label": "several emotions",
    "open-vocabulary": "emotions in its own words",
    "think": "explanation and emotion",
    "think-sentiment": "explanation and sentiment",
    "think-intent": "explanation and intent",
    "think-multi-label": "explanation and several emotions",
    "reason": "explanation",
    "audio": "description of the voice",
    "image": "description of the picture",
}
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def title(task: str) -> str:
    """Return what a task is called on the page."""
    return _TITLES.get(task, task)


def escaped(text: str) -> str:
    """Return a text as HTML."""
    return html.escape(text)


def stopped(answer: str) -> str:
    """Return an answer that was not finished as one that nobody writes on any more."""
    if "is-writing" not in answer:
        return told("Stopped.")
    return answer.replace("is-writing", "is-stopped").replace(
        'aria-busy="true"', 'aria-busy="false"'
    )


def told(text: str, kind: str = "status") -> str:
    """Return one line about how things stand; `kind` is `status` or `problem`."""
    return _page().get_template("app_told.html.j2").render(told=text, kind=kind)


def seen_panel(seen: SeenClip) -> str:
    """Return what was taken in of a clip: status of each stream, frames, waveform, remarks."""
    wave = None
    if seen.waveform is not None and len(seen.waveform):
        length_s = len(seen.waveform) / SAMPLE_RATE_HZ
        wave = {
            "path": waveform_path(seen.waveform),
            "width": WAVE_WIDTH,
            "height": WAVE_HEIGHT,
            "told": _seconds(length_s),
        }
    return (
        _page()
        .get_template("app_seen.html.j2")
        .render(
            streams=[_stream(name, clip) for name, clip in seen.streams.items()],
            frames=[_frame(frame.rgb, frame.pts_s) for frame in seen.frames],
            wave=wave,
            duration="" if seen.duration_s is None else _seconds(seen.duration_s),
            remarks=seen.remarks,
        )
    )


def answer_panel(
    task: str,
    *,
    wants_label: bool,
    text: str = "",
    likelihoods: Mapping[str, float] | None = None,
    reply: LiveReply | None = None,
    took_s: float | None = None,
) -> str:
    """Return what the model says, as far as it is.

    Args:
        task: What was asked.
        wants_label: Whether the answer names a label.
        text: The reply so far; the whole one counts once there is one.
        likelihoods: Of the offered labels, if they were computed.
        reply: Once it is complete.
        took_s: How long that took.
    """
    labels: Sequence[str] = () if reply is None else reply.labels
    shown = text if reply is None else reply.reply
    written = _explanation(shown, wants_label)
    facts = []
    if reply is not None:
        if reply.prediction.n_tokens is not None:
            n = reply.prediction.n_tokens
            facts.append(f"{n:,} token{'s' * (n != 1)}")
        if took_s is not None:
            facts.append(f"{took_s:.1f} s")
        if reply.prediction.unread:
            facts.append(f"not on the list: {', '.join(reply.prediction.unread)}")
    off_list = ""
    if reply is not None and wants_label and not labels:
        is_empty = reply.prediction.parse == "empty"
        off_list = "the reply is empty" if is_empty else "the reply names none of the offered ones"
    return (
        _page()
        .get_template("app_answer.html.j2")
        .render(
            title=title(task),
            writing=reply is None,
            wants_label=wants_label,
            labels=labels,
            off_list=off_list,
            text=written,
            bars=_bars(likelihoods or {}, labels),
            facts=" · ".join(facts),
            raw="" if reply is None or reply.reply == written else reply.reply,
        )
    )


def _explanation(reply: str, wants_label: bool) -> str:
    """Return what a reader wants of a reply: the thought without its tags, not the label once more."""
    if "<think>" not in reply:
        is_only_label = wants_label or reply.lstrip().startswith("<answer>")
        return "" if is_only_label and "<answer>" in reply else reply.strip()
    thought = reply.partition("<think>")[2].partition("</think>")[0].partition("<answer>")[0]
    # A tag that is still being written does not flash up.
    for tag in _TAGS:
        for n in range(len(tag) - 1, 0, -1):
            if thought.endswith(tag[:n]):
                return thought[:-n].strip()
    return thought.strip()


def _bars(likelihoods: Mapping[str, float], named: Iterable[str]) -> list[dict[str, Any]]:
    names = set(named)
    ordered = sorted(likelihoods.items(), key=lambda item: -item[1])
    return [
        {
            "label": label,
            "percent": f"{100 * p:.2f}",
            "told": f"{100 * p:.1f} %",
            "named": label in names,
        }
        for label, p in ordered
    ]


def _stream(stream: str, clip: ClipTokens) -> dict[str, str]:
    if clip.status is Status.OK:
        verb = "heard" if stream == "audio" else "seen"
        return {
            "name": _NAMES[stream],
            "status": "ok",
            "told": f"{verb}, the start of it" if clip.truncated else verb,
        }
    is_absent = clip.status is Status.ABSENT
    said = "absent" if is_absent else f"failed: {clip.reason or 'no reason told'}"
    return {"name": _NAMES[stream], "status": "absent" if is_absent else "failed", "told": said}


def _frame(rgb: npt.NDArray[np.uint8], pts_s: float) -> dict[str, Any]:
    picture = Image.fromarray(rgb)
    picture.thumbnail((_STRIP_PX * 2, _STRIP_PX))
    return {
        "uri": data_uri("image/jpeg", jpeg_bytes(picture, 82)),
        "time": f"{pts_s:.1f} s",
        "width": picture.width,
        "height": picture.height,
    }


def _seconds(length_s: float) -> str:
    return f"{length_s:.1f} s"


@cache
def _page() -> Environment:
    return page_environment("The page")
