"""Emotion-LLaMA in small, for tests: its inputs, splice points and prompts, no fusion."""

from __future__ import annotations

from cache.views import AudioView, VideoView
from train.config import Preset, PromptConfig, Tokens, Views, configure
from train.presets import demo, v1

RANK, ALPHA = 3, 5
"""Of LoRA."""


def small(*changes: str) -> Preset:
    """Return Emotion-LLaMA with the demo preset's encoders and language model."""
    made = demo()
    one = VideoView(n_frames=1, grid=1)
    tokens, views = made.tokens, made.views
    return configure(
        made.model_copy(
            update={
                "tokens": Tokens.model_validate({**dict(tokens), "local": tokens.video}),
                "views": Views(
                    audio=AudioView(n_tokens=1), video=one, local=one, image=views.image
                ),
                "prefix": v1().prefix,
                "prompt": PromptConfig(style="v1", instructions="emocache/v1"),
            }
        ),
        ["model.fusion.kind=none", f"model.lora.r={RANK}", f"model.lora.alpha={ALPHA}", *changes],
    )
