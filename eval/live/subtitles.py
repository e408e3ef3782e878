"""What is said in a raw clip: given, recognised, or not shown to the model, and then told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cache.clip import Subtitle
from eval.live.clip import SeenClip
from train.config import PromptConfig

if TYPE_CHECKING:
    from extract.annotate.evidence.transcribe import Transcriber

_BEGIN = "The subtitle"
"""How a remark on it begins."""


def with_subtitle(
    seen: SeenClip, config: PromptConfig, text: str, language: str | None, origin: str
) -> SeenClip:
    """Return a clip with another subtitle, and a remark where the model is not shown it.

    Args:
        seen: The clip.
        config: How the run reads subtitles.
        text: What is said; blank takes the subtitle away.
        language: `en`, `zh`, ...; None takes the language in which the run reads subtitles when it is
            asked.
        origin: Who says so, see `cache.clip.Subtitle`.
    """
    text = " ".join(text.split())
    remarks = [remark for remark in seen.remarks if not remark.startswith(_BEGIN)]
    if not text:
        record = seen.record.model_copy(update={"subtitles": ()})
        return replace(seen, record=record, remarks=tuple(remarks))
    wanted = config.language(seen.record.corpus, asking=True)
    said = Subtitle(text=text, language=language or wanted, origin=origin)
    if not config.use_subtitle:
        remarks.append(f"{_BEGIN} is not shown to the model: the run was trained without.")
    elif wanted is not None and said.language != wanted:
        remarks.append(
            f"{_BEGIN} is not shown to the model: it is in '{said.language}', and the run reads those in "
            f"'{wanted}'."
        )
    elif origin.startswith("asr:"):
        remarks.append(f'{_BEGIN} was recognised by {origin[4:]}: "{text}"')
    record = seen.record.model_copy(update={"subtitles": (said,)})
    return replace(seen, record=record, remarks=tuple(remarks))


def transcribed(
    seen: SeenClip, config: PromptConfig, transcriber: Transcriber, language: str | None
) -> SeenClip:
    """Return a clip with what is heard in it as its subtitle; nothing of one without sound.

    Raises:
        SchemaError: The model does not know the language.
    """
    if seen.waveform is None:
        return seen
    found = transcriber.transcribe(seen.waveform, language).subtitle
    if found is None:
        remark = f"{_BEGIN} is missing: no speech was recognised."
        return replace(seen, remarks=(*seen.remarks, remark))
    return with_subtitle(seen, config, found.text, found.language, found.origin)
