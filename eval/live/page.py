"""What is on the page of `emocache app`, and what happens when it is used."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import EmocacheError, SchemaError
from eval.live import looks
from eval.live.jobs import Job, JobLine, Say, Stopped, Waiting
from eval.live.uploads import Upload, Uploads
from train.text.tasks import TASK_TABLE, check_task

if TYPE_CHECKING:
    from eval.live.answer import LiveModel
    from eval.live.clip import SeenClip
    from eval.live.replies import ReplyStream

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parents[1] / "templates"
"""Styles and scripts of pages."""
_NAME = "upload"
"""What the model and all messages call a clip, whatever its file was called."""
_MAX_SUBTITLE = 2000
_MAX_LABELS, _MAX_LABEL = 64, 64
_MAX_TOKENS = 512
_PAUSE_S = 0.06
"""Shortest time between two pictures of a reply that is being written."""
_NO_MEDIA = (
    "This file cannot be read as a video, a sound or a picture. Check that it is complete, or save it as "
    ".mp4, .webm, .wav, .mp3, .png or .jpeg."
)
_NO_CLIP = "Give a clip first: drop one, choose a file, record one, or take an example."


@dataclass(frozen=True)
class Example:
    """A clip that the page offers to whoever has none at hand."""

    name: str
    path: Path


class Page:
    """What is on the page, and what happens when it is used."""

    def __init__(
        self,
        model: LiveModel,
        uploads: Uploads,
        line: JobLine,
        transcribe: bool,
        examples: Sequence[Example],
        about: str,
    ) -> None:
        self._model = model
        self._uploads = uploads
        self._line = line
        self._transcribe = transcribe
        self._examples = examples
        self._about = about
        self._corpora = model.corpora
        self._jobs: dict[str, Job] = {}
        self._gradio: Any = None

    # ---- how it looks ------------------------------------------------------------------------

    def blocks(self, gr: Any) -> Any:
        """Return the page."""
        self._gradio = gr
        tasks = self._model.trained_tasks or self._model.tasks
        first = next((name for name in ("think", "emotion") if name in tasks), tasks[0])
        corpora = self._corpora
        own = self._labels(first, corpora[0] if corpora else None)
        with gr.Blocks(title="emocache", analytics_enabled=False, fill_width=False) as page:
            gr.HTML(
                f'<header class="ec-head"><h1>emocache</h1><p>{looks.escaped(self._about)}</p></header>'
            )
            with gr.Row(elem_classes="ec-columns"):
                with gr.Column(scale=5, min_width=320):
                    clip = gr.HTML(
                        "",
                        html_template=(TEMPLATES / "app_clip.html").read_text(encoding="utf-8"),
                        js_on_load=(TEMPLATES / "app_clip.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                        elem_id="clip",
                        max_bytes=self._uploads.limits.max_bytes,
                        max_duration_s=self._uploads.limits.max_duration_s,
                        examples=[example.name for example in self._examples],
                    )
                    subtitle = gr.Textbox(
                        label="What is said (optional)",
                        placeholder="written down by the machine if left empty"
                        if self._transcribe
                        else "the words, if you know them",
                        lines=2,
                        max_length=_MAX_SUBTITLE,
                        elem_id="subtitle",
                    )
                    corpus = gr.Dropdown(
                        choices=list(corpora),
                        value=corpora[0] if corpora else None,
                        label="Answer as for",
                        info="This run learned the labels of several corpora.",
                        visible=len(corpora) > 1,
                        elem_id="corpus",
                    )
                    task = gr.Radio(
                        choices=[(_capital(looks.title(name)), name) for name in tasks],
                        value=first,
                        label="What to ask for",
                        elem_id="task",
                    )
                    with gr.Accordion("Labels and length", open=False, elem_id="more"):
                        labels = gr.Textbox(
                            value=own,
                            label="Labels to choose from, with commas between",
                            info="Those of the run; write others to try them. Empty it to get them back.",
                            lines=2,
                            elem_id="labels",
                        )
                        length = gr.Slider(
                            8,
                            _MAX_TOKENS,
                            value=200,
                            step=8,
                            label="Longest reply, in tokens",
                            elem_id="length",
                        )
                    with gr.Row(elem_classes="ec-actions"):
                        ask = gr.Button("Ask", variant="primary", interactive=False, elem_id="ask")
                        stop = gr.Button("Stop", elem_id="stop", interactive=False)
                with gr.Column(scale=6, min_width=320):
                    seen = gr.HTML(looks.told(_NO_CLIP), elem_id="seen", apply_default_css=False)
                    answer = gr.HTML("", elem_id="answer", apply_default_css=False)
            gr.HTML(
                '<footer class="ec-foot">A clip stays on this machine. Its file is deleted as soon as the '
                "model has looked at it; what was seen is forgotten when you leave the page. What a model "
                "says about feelings is a guess about a recording, not knowledge of a person.</footer>"
            )
            before = gr.State(own)
            quiet = {
                "show_progress": "hidden",
                "concurrency_limit": None,
                "api_visibility": "private",
            }
            ask.click(
                self.ask,
                [clip, subtitle, corpus, task, labels, length],
                [answer, ask, stop],
                trigger_mode="once",
                **quiet,
            )
            clip.change(
                self.look,
                [clip, subtitle, corpus],
                [seen, answer, subtitle, ask, stop],
                trigger_mode="always_last",
                **quiet,
            )
            # Gradio's own way to cancel loses the race with what is on its way to the browser.
            stop.click(self.stop, [clip], None, **quiet)
            for changed in (task, corpus):
                changed.change(
                    self.fitting_labels, [task, corpus, labels, before], [labels, before], **quiet
                )
        page.queue(max_size=256, default_concurrency_limit=None, api_open=False)
        return page

    def _labels(self, task: str, corpus: str | None) -> str:
        if not _names_labels(task):
            return ""
        space = self._model.space(task, corpus)
        return "" if space is None else ", ".join(space.labels)

    # ---- what happens ------------------------------------------------------------------------

    def fitting_labels(
        self, task: str, corpus: str | None, labels: str, before: str
    ) -> tuple[Any, str]:
        """Put the labels of a task into their box; those that the user wrote for the like of it stay there.

        Args:
            task: What is asked for now.
            corpus: Whose labels.
            labels: What is in the box.
            before: What stood there when the page put it there.

        Returns:
            The change of the box, and the next `before`.
        """
        wants = _names_labels(task)
        fitting = self._labels(task, corpus)
        if not wants or (fitting == before and labels.strip()):
            return self._gradio.update(visible=wants), before
        return self._gradio.update(value=fitting, visible=True), fitting

    def stop(self, clip_id: str) -> None:
        """End what is being done about a clip; whoever waits for it hears of that."""
        job = self._jobs.get(clip_id)
        if job is not None:
            job.stop()

    def forget(self, clip_id: str) -> None:
        """Forget a clip, and end what is being done about it."""
        self._uploads.forget(clip_id)
        self.stop(clip_id)

    async def look(
        self, clip_id: str, subtitle: str, corpus: str | None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Show what the model sees of a clip that was given."""
        gr = self._gradio
        same, off = gr.skip(), gr.update(interactive=False)
        if not clip_id:
            yield looks.told(_NO_CLIP), "", same, off, off
            return
        yield looks.told("Looking at the clip …"), "", same, off, off

        def work(_: Say) -> Any:
            with self._uploads.in_hand(clip_id) as upload:
                return self._seen(upload, subtitle, corpus)

        is_seen = False
        try:
            async for told in self._followed(work, clip_id):
                if isinstance(told, str):
                    yield told, "", same, off, off
                    continue
                is_seen = True
                said = [s.text for s in told.record.subtitles]
                words = same if subtitle.strip() or not said else gr.update(value=said[0])
                panel = self._without_paths(looks.seen_panel(told), clip_id)
                yield panel, "", words, gr.update(interactive=True), off
        except Stopped:  # the clip was removed, or the server is ending
            yield looks.told(_NO_CLIP), "", same, off, off
        finally:
            if not is_seen:  # refused, failed, or nobody waits for it any more
                self._uploads.forget(clip_id)

    async def ask(
        self,
        clip_id: str,
        subtitle: str,
        corpus: str | None,
        task: str,
        labels: str,
        length: float,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Ask about the clip, and show the answer as it is written."""
        gr = self._gradio
        on, off = gr.update(interactive=True), gr.update(interactive=False)
        yield looks.told("Asking …"), off, on
        wants_label = _names_labels(task)

        def work(say: Say) -> str:
            options = self._options(task, corpus, labels)
            began = time.monotonic()
            with self._uploads.in_hand(clip_id) as upload:
                seen = self._seen(upload, subtitle, corpus)
                seen = self._model.with_subtitle(seen, subtitle[:_MAX_SUBTITLE])
                asked: dict[str, Any] = {"corpus": corpus, "options": options}
                bars = self._model.likelihoods(seen, task, **asked) if wants_label else None
                panel: dict[str, Any] = {"wants_label": wants_label, "likelihoods": bars}
                say(looks.answer_panel(task, **panel))
                stream = self._model.stream(
                    seen, task, max_new_tokens=min(max(1, int(length)), _MAX_TOKENS), **asked
                )
                written = _read(
                    stream, lambda text: say(looks.answer_panel(task, text=text, **panel))
                )
                return looks.answer_panel(
                    task,
                    text=written,
                    reply=stream.reply,
                    took_s=time.monotonic() - began,
                    **panel,
                )

        latest = ""
        try:
            async for told in self._followed(work, clip_id):
                latest = told
                yield told, off, on
        except Stopped:
            if clip_id not in self._uploads:  # removed: the page may be about another one by now
                yield "", gr.skip(), off
                return
            latest = looks.stopped(latest)
        yield latest, on, off

    def _seen(self, upload: Upload, subtitle: str, corpus: str | None) -> SeenClip:
        """Return what the model saw of a clip; it looks only once."""
        if upload.seen is None:
            upload.seen = self._model.look(
                upload.path,
                name=_NAME,
                corpus=corpus,
                subtitle=subtitle.strip()[:_MAX_SUBTITLE] or None,
                transcribe=self._transcribe and not subtitle.strip(),
                max_duration_s=self._uploads.limits.max_duration_s,
            )
        return upload.seen

    def _options(self, task: str, corpus: str | None, labels: str) -> list[str] | None:
        """Return the labels that the user wrote, None for those of the run.

        Raises:
            SchemaError: There are too many, they are too long, or one stands there twice.
        """
        if not _names_labels(task) or not labels.strip():
            return None
        if labels.strip() == self._labels(task, corpus):
            return None
        found = [" ".join(part.split()) for part in labels.replace("\n", ",").split(",")]
        found = [label for label in found if label]
        if not 2 <= len(found) <= _MAX_LABELS:
            raise SchemaError(
                f"{len(found)} labels are written; 2 to {_MAX_LABELS} are possible, with commas between. "
                "Empty the box to get those of the run."
            )
        for label in found:
            if len(label) > _MAX_LABEL:
                raise SchemaError(
                    f"the label {label[:24]!r}… has {len(label)} characters; at most {_MAX_LABEL} are "
                    "possible. Write commas between labels."
                )
            if [other.casefold() for other in found].count(label.casefold()) > 1:
                raise SchemaError(f"the label {label!r} is written twice; write each once.")
        return found

    async def _followed(self, work: Callable[[Say], Any], clip_id: str) -> AsyncIterator[Any]:
        """Do work in its turn and yield what it says; what goes wrong comes as words for the user."""
        job = None
        try:
            job = self._jobs[clip_id] = self._line.submit(work)
            async for told in job.follow():
                if isinstance(told, Waiting):
                    if told.n_ahead:
                        yield looks.told(f"Waiting: {told.n_ahead} ahead of you.")
                else:
                    yield told
        except EmocacheError as error:
            logger.info("the page could not answer: %s", error)
            yield looks.told(self._words(error, clip_id), "problem")
        except Stopped:
            raise
        except Exception as error:
            logger.error("a question of the page failed: %s", error, exc_info=error)
            yield looks.told(
                "Something went wrong that is not your clip's fault. Whoever runs this page finds the reason "
                "in its log.",
                "problem",
            )

        finally:
            if job is not None and self._jobs.get(clip_id) is job:
                del self._jobs[clip_id]

    def _words(self, error: EmocacheError, clip_id: str) -> str:
        """Return an error's text for a visitor: no path of this machine, no words of a decoder library."""
        if "cannot be opened as media" in str(error):
            return _NO_MEDIA
        words = self._without_paths(str(error), clip_id)
        # What only the owner of the page could do about it is of no use here.
        words = words.replace(", or raise --max-duration-s", "").replace(
            "clip: lasts", "clip lasts"
        )
        return words[:1].upper() + words[1:]

    def _without_paths(self, text: str, clip_id: str) -> str:
        folder = re.escape(f"{self._uploads.folder}{os.sep}")
        return re.sub(rf"(?:file:)?(?:{folder})?{re.escape(clip_id)}", "the clip", text)


def _read(stream: ReplyStream, show: Callable[[str], None]) -> str:
    """Read a reply to its end, showing it now and then, and return it."""
    text, shown = "", 0.0
    try:
        for piece in stream:
            text += piece
            now = time.monotonic()
            if now - shown >= _PAUSE_S:
                show(text)
                shown = now
    finally:
        stream.close()
    return text


def theme(gr: Any) -> Any:
    """Return plain looks in the project's colours, with fonts that are on the reader's machine."""
    blue, dark_blue = "#0072b2", "#2f93d1"
    shades = ["#f0f7fc", "#dcecf7", "#b9d9ee", "#8cc0e2", "#5ba6d5", dark_blue, blue, "#005f96", "#004c78",
              "#00395a", "#002a43"]  # fmt: skip
    names = ["c50", "c100", "c200", "c300", "c400", "c500", "c600", "c700", "c800", "c900", "c950"]
    ours = gr.themes.Color(**dict(zip(names, shades, strict=True)), name="emocache")
    panel, rule = ("#f6f8fa", "#1c2026"), ("#d5dae1", "#363c45")
    colors = {
        "body_background_fill": ("#ffffff", "#14171b"),
        "background_fill_primary": ("#ffffff", "#14171b"),
        "background_fill_secondary": panel,
        "block_background_fill": ("#ffffff", "#14171b"),
        "body_text_color": ("#1b1f24", "#e4e7eb"),
        "body_text_color_subdued": ("#5d6570", "#9aa3ae"),
        "block_label_text_color": ("#5d6570", "#9aa3ae"),
        "block_title_text_color": ("#1b1f24", "#e4e7eb"),
        "block_info_text_color": ("#5d6570", "#9aa3ae"),
        "border_color_primary": rule,
        "block_border_color": rule,
        "input_background_fill": panel,
        "input_border_color": rule,
        "input_placeholder_color": ("#767f8b", "#7e8894"),
        "checkbox_label_background_fill": panel,
        "checkbox_label_background_fill_hover": ("#e6eaef", "#2b3139"),
        "checkbox_label_background_fill_selected": ("#dcecf7", "#123148"),
        "checkbox_background_color_selected": (blue, dark_blue),
        "checkbox_border_color_selected": (blue, dark_blue),
        "slider_color": (blue, dark_blue),
        "button_primary_background_fill": (blue, dark_blue),
        "button_primary_background_fill_hover": ("#005f96", "#4ea6dd"),
        "button_primary_text_color": ("#ffffff", "#08131b"),
        "button_secondary_background_fill": panel,
        "button_secondary_background_fill_hover": ("#e6eaef", "#2b3139"),
        "button_secondary_border_color": rule,
    }
    themed = {name: light for name, (light, _) in colors.items()}
    themed |= {f"{name}_dark": dark for name, (_, dark) in colors.items()}
    sans = [
        "system-ui",
        "-apple-system",
        "Segoe UI",
        "Roboto",
        "Helvetica Neue",
        "Arial",
        "sans-serif",
    ]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    return gr.themes.Base(
        primary_hue=ours,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=sans,
        font_mono=mono,
    ).set(**themed)


def _names_labels(task: str) -> bool:
    return TASK_TABLE[check_task(task)].label is not None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
