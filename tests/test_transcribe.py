"""Speech recognition: small Whisper models in the upstream format, beside the whisper library itself.

One has random weights. Others are made to say a given text: without attention, a token's successor
depends on its position alone, so the position embedding is the script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from pydantic import ValidationError
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from cache.clip import Record, Subtitle
from cache.errors import CheckpointError, SchemaError
from extract.annotate.evidence.media import MediaLimits, MediaReader
from extract.annotate.evidence.transcribe import TranscribeOptions, Transcriber
from extract.decode import decode
from tests.media import sine

# The library leaves the file of its vocabulary open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning")

WIDTH = 64
ONCE = TranscribeOptions(temperatures=(0.0,))


def dims_of(n_vocab: int = 51865) -> ModelDimensions:
    return ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=1,
        n_vocab=n_vocab, n_text_ctx=64, n_text_state=WIDTH, n_text_head=2, n_text_layer=1,
    )  # fmt: skip


def save(model: Whisper, path: Path) -> Path:
    """Write it as openai does, in half precision."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"dims": asdict(model.dims), "model_state_dict": state}, path)
    return path


def random_model(n_vocab: int = 51865) -> Whisper:
    torch.manual_seed(1)
    dims = dims_of(n_vocab)
    dims.n_text_state = dims.n_audio_state  # as in every published model
    model = Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.5)
    return model


def scripted_model(
    tokens: Sequence[int], sot: Sequence[tuple[int, float]], loudness: float
) -> Whisper:
    """Return a model that says `tokens`, whatever it hears.

    Args:
        tokens: The first stands behind the three that say what to do.
        sot: What it thinks of the start: tokens and their weights.
        loudness: Length of the embeddings; a short one makes it unsure.
    """
    torch.manual_seed(2)
    dims = dims_of()
    dims.n_audio_state = WIDTH
    model = Whisper(dims)
    embedding = torch.nn.functional.normalize(torch.randn(dims.n_vocab, WIDTH), dim=-1)
    script = torch.zeros(dims.n_text_ctx, WIDTH)
    script[0] = sum(weight * embedding[token] for token, weight in sot)
    for position, token in enumerate(tokens, start=2):
        script[position] = embedding[token]
    embedding *= loudness
    embedding[no_speech()] *= 8 / loudness
    with torch.no_grad():
        model.decoder.token_embedding.weight.copy_(embedding)
        model.decoder.positional_embedding.copy_(1000 * script)
        for block in model.decoder.blocks:
            for last in (block.attn.out, block.cross_attn.out, block.mlp[2]):
                last.weight.zero_()
                last.bias.zero_()
    return model


def tokenizer() -> Any:
    return get_tokenizer(True, num_languages=99, language="en", task="transcribe")


def no_speech() -> int:
    return int(tokenizer().no_speech)


def says(text: str, language: str = "en") -> Whisper:
    words = tokenizer()
    begin = words.timestamp_begin
    tokens = [begin, *words.encode(text), begin + 100, words.eot]  # until 2.00 s
    return scripted_model(tokens, [(words.to_language_token(language), 1.0)], 8.0)


def hears_nothing() -> Whisper:
    words = tokenizer()
    start = [(no_speech(), 1.0), (words.to_language_token("de"), 0.9)]
    return scripted_model([words.timestamp_begin, *words.encode(" you"), words.eot], start, 0.5)


def transcriber_of(
    model: Whisper, folder: Path, options: TranscribeOptions | None = None, name: str = "mine.pt"
) -> Transcriber:
    return Transcriber.load(save(model, folder / name), options=options)


def tone(seconds: float, loudness: float = 0.5) -> np.ndarray:
    return np.ascontiguousarray(2 * loudness * sine(220, seconds, 16000, 1)[0])


# ---- what it says ---------------------------------------------------------------------------------


def test_speech_becomes_a_subtitle(tmp_path: Path) -> None:
    found = transcriber_of(says(" Hello there."), tmp_path).transcribe(tone(3.0))
    assert found.subtitle == Subtitle(text="Hello there.", language="en", origin="asr:whisper-mine")
    assert found.language == "en"
    [window] = found.windows
    assert window.temperature == 0.0
    assert window.no_speech_prob < 0.01
    assert window.avg_logprob > -0.1
    assert (found.no_speech_prob, found.avg_logprob) == (
        window.no_speech_prob,
        window.avg_logprob,
    )


def test_the_language_is_detected_or_given(tmp_path: Path) -> None:
    transcriber = transcriber_of(says(" 你好", language="zh"), tmp_path)
    detected = transcriber.transcribe(tone(1.0))
    assert detected.subtitle is not None
    assert (detected.subtitle.language, detected.subtitle.text) == ("zh", "你好")
    for language in ("de", "German", " GERMAN "):
        given = transcriber.transcribe(tone(1.0), language=language)
        assert given.subtitle is not None
        assert (given.subtitle.language, given.language) == ("de", "de")


def test_sound_beyond_the_window_is_heard_too(tmp_path: Path) -> None:
    # The script goes by positions, which the text of an earlier window would shift.
    options = TranscribeOptions(condition_on_previous_text=False)
    transcriber = transcriber_of(says(" Hello there."), tmp_path, options)
    for seconds, n_windows in ((29.9, 1), (30.0, 1), (30.2, 2), (61.0, 3)):
        found = transcriber.transcribe(tone(seconds))
        assert len(found.windows) == n_windows
        assert found.subtitle is not None
        assert found.subtitle.text == " ".join(["Hello there."] * n_windows)


def test_where_nobody_speaks_there_is_no_subtitle(tmp_path: Path) -> None:
    found = transcriber_of(hears_nothing(), tmp_path, ONCE).transcribe(tone(3.0))
    assert found.subtitle is None
    assert found.language == "de"
    [window] = found.windows  # what whisper.transcribe itself does not tell
    assert window.no_speech_prob > 0.99
    assert window.avg_logprob < -1.0


@pytest.mark.parametrize("text", [" ...", " ?", "!!"])
def test_signs_without_words_are_no_subtitle(tmp_path: Path, text: str) -> None:
    found = transcriber_of(says(text), tmp_path, ONCE).transcribe(tone(1.0))
    assert found.subtitle is None
    assert len(found.windows) == 1


@pytest.mark.parametrize(("loudness", "heard"), [(0.0, False), (3.1e-4, False), (3.3e-4, True)])
def test_silence_is_not_given_to_the_model(tmp_path: Path, loudness: float, heard: bool) -> None:
    # -70 dB of full scale is 10 ** -3.5 = 3.16e-4.
    found = transcriber_of(says(" Thank you."), tmp_path).transcribe(tone(1.0, loudness))
    assert (found.subtitle is not None) == heard
    assert len(found.windows) == heard
    if not heard:
        assert (found.language, found.no_speech_prob, found.avg_logprob) == (None, None, None)


def test_no_sound_at_all_is_silence(tmp_path: Path) -> None:
    found = transcriber_of(says(" Hello."), tmp_path).transcribe(np.zeros(0, np.float32))
    assert found.subtitle is None


# ---- beside the library ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(), tmp_path_factory.mktemp("whisper") / "whisper-random.pt")


def sounds(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for name in ("jfk.flac", "emodb_03a07Wc.wav", "commercial_mono.wav"):
        track = decode(folder / name, want_audio=True, frame_choices=[]).audio
        assert track is not None
        found[name] = track.waveform
    return found


@pytest.mark.parametrize("language", [None, "en"])
def test_real_sound_gives_what_the_library_gives(
    random_pt: Path, shared_clips: Path, language: str | None
) -> None:
    theirs = whisper.load_model(str(random_pt), device="cpu")
    ours = Transcriber.load(random_pt, options=ONCE)
    for waveform in sounds(shared_clips).values():
        expected = theirs.transcribe(waveform, temperature=(0.0,), language=language, fp16=False)
        found = ours.transcribe(waveform, language)
        assert found.subtitle is not None
        assert found.subtitle.text == " ".join(expected["text"].split())
        assert found.subtitle.language == expected["language"]
        assert found.subtitle.origin == "asr:whisper-random"
        told = {(s["no_speech_prob"], s["avg_logprob"]) for s in expected["segments"]}
        assert {(w.no_speech_prob, w.avg_logprob) for w in found.windows} == told


def test_chance_has_a_seed_and_touches_nobody_elses(random_pt: Path) -> None:
    options = TranscribeOptions(temperatures=(0.0, 5.0), seed=5)
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    ours = Transcriber.load(random_pt, options=options)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = ours.transcribe(noise)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    ours.transcribe(tone(1.0))  # a clip between changes nothing
    assert ours.transcribe(noise) == first
    [window] = first.windows  # it repeats itself at the first, so the second was tried
    assert window.temperature == 5.0
    theirs = whisper.load_model(str(random_pt), device="cpu")
    torch.manual_seed(5)
    expected = theirs.transcribe(noise, temperature=(0.0, 5.0), fp16=False)
    assert first.subtitle is not None
    assert first.subtitle.text == " ".join(expected["text"].split())
    other = Transcriber.load(random_pt, options=TranscribeOptions(temperatures=(0.0, 5.0), seed=6))
    assert other.transcribe(noise) != first


def test_a_clip_from_its_file(random_pt: Path, shared_clips: Path) -> None:
    transcriber = Transcriber.load(random_pt, name="large-v9", options=ONCE)
    path = shared_clips / "no_duration.webm"  # digitally silent
    with MediaReader(MediaLimits(max_sound_s=None)) as reader:
        silent = reader.read(Record(uid="c/a", media=path.name), path).sound
        path = shared_clips / "grid_bbaf2n.mpg"
        spoken = reader.read(Record(uid="c/b", media=path.name), path).sound
    assert silent.waveform is not None
    assert transcriber.transcribe(silent.waveform).subtitle is None
    assert spoken.waveform is not None
    found = transcriber.transcribe(spoken.waveform, "en")
    assert found.subtitle is not None
    assert found.subtitle.origin == "asr:large-v9"


# ---- refusals -------------------------------------------------------------------------------------


def test_languages_that_the_model_does_not_know(random_pt: Path, tmp_path: Path) -> None:
    ours = Transcriber.load(random_pt)
    with pytest.raises(SchemaError, match=r"no language 'englisch'.*mean 'english'"):
        ours.transcribe(tone(1.0), "englisch")
    english = transcriber_of(random_model(51864), tmp_path, ONCE, "small.en.pt")
    with pytest.raises(SchemaError, match=r"whisper-small.en knows English alone.*'zh'"):
        english.transcribe(tone(1.0), "zh")
    found = english.transcribe(tone(1.0))
    assert found.language == "en"


def test_waveforms_of_another_form_are_refused(random_pt: Path) -> None:
    ours = Transcriber.load(random_pt)
    for waveform in (np.zeros((2, 5), np.float32), np.zeros(5), np.zeros(5, np.int16)):
        with pytest.raises(ValueError, match=r"needs \(N,\) float32"):
            ours.transcribe(waveform)  # type: ignore[arg-type]


def without_dims(found: dict[str, Any]) -> None:
    del found["dims"]


def short_dims(found: dict[str, Any]) -> None:
    del found["dims"]["n_text_head"]


def other_width(found: dict[str, Any]) -> None:
    found["dims"]["n_vocab"] = 51864


def lost_tensor(found: dict[str, Any]) -> None:
    del found["model_state_dict"]["decoder.ln.weight"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (without_dims, "not an openai-whisper checkpoint"),
        (short_dims, "no usable n_text_head"),
        (other_width, "1 tensors have another shape.*token_embedding"),
        (lost_tensor, "1 of .* tensors are missing, first: decoder.ln.weight"),
    ],
)
def test_checkpoints_that_do_not_fit(
    random_pt: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], problem: str
) -> None:
    found = torch.load(random_pt, weights_only=True)
    damage(found)
    torch.save(found, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match=problem):
        Transcriber.load(tmp_path / "damaged.pt")


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_checkpoints_never_run_code(tmp_path: Path) -> None:
    code = Code(tmp_path / "made")
    torch.save({"dims": {}, "model_state_dict": code}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="need code to load are refused"):
        Transcriber.load(tmp_path / "code.pt")
    assert not code.path.exists()
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        Transcriber.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="a folder"):
        Transcriber.load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"temperatures": ()},
        {"temperatures": (0.2, 0.1)},
        {"temperatures": (-0.1,)},
        {"no_speech_threshold": 1.5},
        {"silence_dbfs": 3.0},
        {"beam": 5},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TranscribeOptions(**options)


def test_importing_it_needs_no_torch() -> None:
    code = "import extract.annotate.evidence.transcribe, sys; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
