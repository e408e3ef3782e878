"""The tiny Whisper: the real one in small, its encoder pre-trained on synthesised voices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from numpy.typing import NDArray
from torch import Tensor, nn
from whisper.model import AudioEncoder, ModelDimensions, Whisper

from extract.corpora.demo_sounds import (
    VOICE_RANGES,
    Sound,
    sample_voice,
    synthesise,
    voice_values,
)
from extract.tiny.optimise import (
    HELD_OUT,
    VOICES,
    Recipe,
    Scores,
    Weights,
    batch_rng,
    optimise,
    r_squared,
    round_to_half,
)

WHISPER_DIMS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,  # 30 s at 50 frames per second, as in every real Whisper
    n_audio_state=64,
    n_audio_head=4,
    n_audio_layer=2,
    n_vocab=64,  # the decoder is there for the file layout alone and stays untrained
    n_text_ctx=8,
    n_text_state=64,
    n_text_head=4,
    n_text_layer=1,
)

_TOKEN_SAMPLES = 320  # samples of 16 kHz per encoder frame: 50 frames per second
_SHORT_CTX = 250  # encoder frames of a short context: 5 s


def audio_tokens(encoder: AudioEncoder, mel: Tensor) -> Tensor:
    """Run Whisper's encoder over any length; its own `forward` insists on 30 s.

    Args:
        encoder: The encoder.
        mel: `(B, 80, 2 * T)` float32, T at most 1500.

    Returns:
        `(B, T, 64)` float32.
    """
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).permute(0, 2, 1)
    x = x + encoder.positional_embedding[: x.shape[1]]
    for block in encoder.blocks:
        x = block(x)
    tokens: Tensor = encoder.ln_post(x)
    return tokens


@dataclass(frozen=True)
class VoiceBatch:
    """Voices with free parameters, padded with silence to the context."""

    mel: Tensor
    """`(B, 80, 2 * T)` float32."""
    valid: Tensor
    """`(B, T)` float32: 1 on the encoder frames of the sound, 0 on those of the padding."""
    values: Tensor
    """`(B, 10)` float32: parameters of the voice, scaled to -1..1."""
    tracks: Tensor
    """`(B, T, 2)` float32: pitch, scaled to -1..1, and envelope, 0..1, of each frame."""


def voice_batch(n: int, n_ctx: int, rng: np.random.Generator) -> VoiceBatch:
    """Synthesise `n` voices of 1.5 to 4.5 s in a context of `n_ctx` encoder frames."""
    mels, tracks, values = [], [], []
    valid = torch.zeros(n, n_ctx)
    for place in range(n):
        voice = sample_voice(rng)
        sound = synthesise(voice, float(rng.uniform(1.5, 4.5)), rng)
        n_samples = len(sound.samples)
        padding = n_ctx * _TOKEN_SAMPLES - n_samples
        mels.append(whisper.log_mel_spectrogram(sound.samples, padding=padding))
        valid[place, : math.ceil(n_samples / _TOKEN_SAMPLES)] = 1
        tracks.append(_frame_tracks(sound, n_ctx))
        values.append(voice_values(voice))
    return VoiceBatch(
        mel=torch.stack(mels),
        valid=valid,
        values=torch.from_numpy(np.stack(values)),
        tracks=torch.from_numpy(np.stack(tracks)),
    )


def _frame_tracks(sound: Sound, n_ctx: int) -> NDArray[np.float32]:
    """Average the tracks of a sound over each encoder frame: `(n_ctx, 2)` float32."""
    low, high = VOICE_RANGES["pitch"]
    scaled = np.stack([2 * (sound.pitch - low) / (high - low) - 1, sound.envelope], axis=1)
    padded = np.zeros((n_ctx * _TOKEN_SAMPLES, 2), dtype=np.float32)
    padded[: len(scaled)] = scaled
    means: NDArray[np.float32] = padded.reshape(n_ctx, _TOKEN_SAMPLES, 2).mean(axis=1)
    return means


class VoiceHeads(nn.Module):
    """Linear regressions of the voice from the mean frame and of the tracks from each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.voice = nn.Linear(width, len(VOICE_RANGES))
        self.track = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the guesses `(B, 10)` of the voice and `(B, T, 2)` of the tracks."""
        weight = (valid / valid.sum(dim=1, keepdim=True)).unsqueeze(2)
        return self.voice((tokens * weight).sum(dim=1)), self.track(tokens)


def pretrain_whisper(recipe: Recipe) -> tuple[Weights, Scores]:
    """Train the encoder of the tiny Whisper.

    Args:
        recipe: How.

    Returns:
        float16 weights in Whisper's own key layout, and R^2 of each parameter of the voice and of
        its tracks, guessed from those weights with 30 s of context.
    """
    torch.manual_seed(recipe.seed + 1)
    model = Whisper(WHISPER_DIMS)
    nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # else uninitialised memory
    heads = VoiceHeads(WHISPER_DIMS.n_audio_state)
    n_steps = recipe.whisper_steps + recipe.whisper_full_steps

    def loss(step: int) -> Tensor:
        full = step >= recipe.whisper_steps
        n = recipe.voices_per_step // 4 if full else recipe.voices_per_step
        n_ctx = WHISPER_DIMS.n_audio_ctx if full else _SHORT_CTX
        batch = voice_batch(n, n_ctx, batch_rng(recipe, VOICES, step))
        voice, tracks = heads(audio_tokens(model.encoder, batch.mel), batch.valid)
        pitch_error, envelope_error = (tracks - batch.tracks).square().unbind(dim=2)
        sung = batch.valid * (batch.tracks[..., 1] > 0.3)
        local = (pitch_error * sung).sum() / sung.sum()
        local = local + (envelope_error * batch.valid).sum() / batch.valid.sum()
        total: Tensor = F.mse_loss(voice, batch.values) + 0.5 * local
        return total

    optimise(nn.ModuleList([model.encoder, heads]), loss, n_steps, recipe.lr, "Whisper")
    weights = round_to_half(model)
    with torch.inference_mode():
        rng = batch_rng(recipe, VOICES, HELD_OUT)
        batch = voice_batch(recipe.held_out, WHISPER_DIMS.n_audio_ctx, rng)
        parts = [audio_tokens(model.encoder, mel) for mel in torch.split(batch.mel, 8)]
        voice, tracks = heads(torch.cat(parts), batch.valid)
    scores = r_squared(voice, batch.values, list(VOICE_RANGES))
    sung = (batch.valid > 0) & (batch.tracks[..., 1] > 0.3)
    scores |= r_squared(tracks[sung], batch.tracks[sung], ["frame pitch", "frame envelope"])
    return weights, scores
