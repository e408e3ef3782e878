"""The server of the transformers library, a real one, asked through our client.

It serves tiny models that the tests make in upstream's format: a text model (the shipped one), a
vision-language model (Qwen2-VL) and an audio-language model (Qwen2-Audio), both with random weights.
What it answers is what the model generates in this process from the same messages. It takes no
`response_format`: it logs that and goes on, so that schemas are checked here alone.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.annotate.endpoints.answers import Answer, AnswerCache
from extract.annotate.endpoints.endpoint import EndpointClient
from extract.annotate.endpoints.questions import MediaPart, Question, Sampling
from extract.annotate.endpoints.replies import Outcome
from extract.annotate.endpoints.transport import EndpointOptions

TINY = Path(__file__).resolve().parents[1] / "train" / "tiny" / "llm"
N_TOKENS = 12
START_S = 120
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LANGUAGE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SEES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HEARS = ("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tokenizer(*special: str) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(TINY)
    made.add_special_tokens({"additional_special_tokens": [*special, "<|im_start|>", "<|im_end|>"]})
    return made


def make_text(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(len(made))
    model.save_pretrained(folder)


def make_vision(folder: Path) -> None:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    made = tokenizer(*SEES)
    start, end, image, video = made.convert_tokens_to_ids(list(SEES))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=LANGUAGE | {"vocab_size": len(made), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    save(Qwen2VLForConditionalGeneration(config), folder)
    pictures = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    Qwen2VLProcessor(
        pictures, made, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    ).save_pretrained(folder)


def make_audio(folder: Path) -> None:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    made = tokenizer(*HEARS)
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
        },
        text_config=LANGUAGE | {"model_type": "qwen2", "vocab_size": len(made)},
        audio_token_index=made.convert_tokens_to_ids(HEARS[2]),
    )
    save(Qwen2AudioForConditionalGeneration(config), folder)
    Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=128), made, chat_template=TEMPLATE
    ).save_pretrained(folder)


def save(model: Any, folder: Path) -> None:
    # Larger weights than usual, so that what is seen and heard changes the words.
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in (("text", make_text), ("vision", make_vision), ("audio", make_audio)):
        make(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("server")
    command = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    log = home / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"the server did not start within {START_S} s: {log.read_text()}")


def picture(red: int) -> MediaPart:
    pixels = np.random.default_rng(red).integers(0, 255, (96, 96, 3), np.uint8)
    pixels[..., 0] = red
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return MediaPart.of("image/jpeg", data.getvalue())


def sound(pitch_hz: float) -> MediaPart:
    wave_form = np.sin(2 * np.pi * pitch_hz * np.arange(8000) / 16000)
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((wave_form * 20000).astype("<i2").tobytes())
    return MediaPart.of("audio/wav", data.getvalue(), 0.5)


def asking(model: Path, media: tuple[MediaPart, ...] = ()) -> Question:
    return Question(
        "r", str(model), "p@1", "Describe it.", media, sampling=Sampling(max_tokens=N_TOKENS)
    )


def ask(base_url: str, questions: list[Question], folder: Path) -> list[Answer]:
    options = EndpointOptions(base_url=base_url, api_key_env="none", in_flight=2)
    with EndpointClient(options, AnswerCache(folder)) as client:
        found = {q.key: a for q, a in client.ask_all(questions)}
        assert client.report().requests == len(questions)
        list(client.ask_all(questions))
        assert client.report().requests == len(questions)  # all of them were kept
    answers = [found[q.key] for q in questions]
    assert all(isinstance(a, Answer) for a in answers), answers
    return [a for a in answers if isinstance(a, Answer)]


def assert_generated(answer: Answer, n_in: int, tokens: torch.Tensor, reader: Any) -> None:
    """The answer is what the model generates here, token by token."""
    words = reader.decode(tokens[0, n_in:], skip_special_tokens=True)
    assert words.strip()
    assert answer.prompt_tokens == n_in
    assert answer.completion_tokens == tokens.shape[1] - n_in
    # The server leaves the head of the turn and the end mark in the text of a multimodal model.
    assert " ".join(words.split()) in " ".join(answer.text.split())
    ended = answer.completion_tokens < N_TOKENS
    assert answer.outcome is (Outcome.OK if ended else Outcome.TRUNCATED)


def test_a_text_model(base_url: str, models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    question = asking(models["text"])
    (answer,) = ask(base_url, [question], tmp_path)
    reader = AutoTokenizer.from_pretrained(models["text"])
    inputs = reader.apply_chat_template(
        question.messages(), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = LlamaForCausalLM.from_pretrained(models["text"])
    tokens = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
    assert answer.text
    assert answer.model == f"{models['text']}@main"
    assert_generated(answer, inputs["input_ids"].shape[1], tokens, reader)


def test_a_vision_language_model_sees_the_picture(
    base_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    pictures = [picture(250), picture(5)]
    questions = [asking(models["vision"], (part,)) for part in pictures]
    answers = ask(base_url, questions, tmp_path)
    reader = AutoProcessor.from_pretrained(models["vision"])
    model = Qwen2VLForConditionalGeneration.from_pretrained(models["vision"])
    for part, answer in zip(pictures, answers, strict=True):
        inputs = reader(
            text=[reader.apply_chat_template(shape_of("image"), add_generation_prompt=True)],
            images=[Image.open(io.BytesIO(part.load()))],
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
        assert_generated(answer, inputs["input_ids"].shape[1], tokens, reader)
    assert answers[0].text != answers[1].text


@pytest.mark.skipif(
    not (find_spec("soundfile") and find_spec("soxr")),
    reason="transformers' server decodes sound with soundfile and soxr (transformers[audio])",
)
def test_an_audio_language_model_hears_the_sound(
    base_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    sounds = [sound(150), sound(1500)]
    questions = [asking(models["audio"], (part,)) for part in sounds]
    answers = ask(base_url, questions, tmp_path)
    reader = AutoProcessor.from_pretrained(models["audio"])
    model = Qwen2AudioForConditionalGeneration.from_pretrained(models["audio"])
    for part, answer in zip(sounds, answers, strict=True):
        with wave.open(io.BytesIO(part.load())) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        inputs = reader(
            text=[reader.apply_chat_template(shape_of("audio"), add_generation_prompt=True)],
            audio=[samples.astype(np.float32)],
            sampling_rate=16000,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
        assert_generated(answer, inputs["input_ids"].shape[1], tokens, reader)
    assert answers[0].text != answers[1].text


def shape_of(kind: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Describe it."}]}]


def test_a_schema_that_the_server_ignores_is_checked_all_the_same(
    base_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"description": {"type": "string"}}}
    question = Question("r", str(models["text"]), "p@1", "Describe it.", answer_schema=schema)
    (answer,) = ask(base_url, [question], tmp_path)
    assert answer.outcome in (Outcome.INVALID, Outcome.TRUNCATED)
