"""The small world that the tiny language model knows: cues, emotions, and chats about them.

How a face looks (three ways) and how a voice sounds (three ways) name one of six emotions; no cue
alone does. Chats have the form of `train.prompt`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from train.prompt import PromptTokens, render, tokenize
from train.text.instructions import load_instructions

MAX_ANSWER_TOKENS = 160


@dataclass(frozen=True)
class Cue:
    """One way to look or to sound: the sentence that describes it and short phrases for it."""

    sentence: str
    phrases: tuple[str, ...]


def _cue(sentence: str, phrases: str) -> Cue:
    return Cue(sentence, tuple(phrases.split(", ")))


LOOKS = (
    _cue(
        "The eyes are wide, the brows are raised and the mouth is open.",
        "wide eyes, raised brows, an open mouth, lifted brows, eyes opened wide, a dropped jaw, "
        "staring eyes, brows pulled up, parted lips",
    ),
    _cue(
        "The brows are drawn down and the corners of the mouth are turned down.",
        "lowered brows, a frown, a mouth turned down, knitted brows, mouth corners pulled down, "
        "brows drawn together, tight lips, a heavy brow",
    ),
    _cue(
        "The brows are level, the eyes are relaxed and the mouth is softly curved.",
        "level brows, relaxed eyes, a softly curved mouth, calm brows, a gentle curve of the lips, "
        "easy eyes, a smooth brow, loose lips",
    ),
)
SOUNDS = (
    _cue(
        "The voice is high, bright and lively, with quick rising notes.",
        "a high voice, a bright tone, lively speech, quick rising notes, a ringing voice, "
        "high notes, a rising tune, a light bright sound",
    ),
    _cue(
        "The voice is low, quiet and slow, with an even tone.",
        "a low voice, quiet speech, a slow pace, an even tone, a hushed voice, low notes, "
        "slow words, a flat quiet sound",
    ),
    _cue(
        "The voice is loud, rough and fast, with hard irregular beats.",
        "a loud voice, rough speech, a fast pace, hard irregular beats, a harsh voice, "
        "loud blows, fast words, a rough hard sound",
    ),
)
EMOTIONS = {  # label: (look, sound)
    "happy": (2, 0),
    "surprised": (0, 0),
    "sad": (1, 1),
    "neutral": (2, 1),
    "angry": (1, 2),
    "fearful": (0, 2),
}
OTHER_NAMES = {
    "happy": "joy",
    "surprised": "surprise",
    "sad": "sadness",
    "neutral": "calm",
    "angry": "anger",
    "fearful": "fear",
}
FRAMES = ("there is {}", "one notices {}", "we find {}", "the clip has {}", "it shows {}", "{}")
FILLER = (
    "then and so with the a of in now here next still again also frame clip scene room light wall "
    "table door street person face voice sound picture moment part second time left right near "
    "far small large some other red blue green , . : ;"
).split()
SUBJECTS = ("the train", "my sister", "the meeting", "the parcel", "our plan", "the letter")
PREDICATES = ("comes at nine", "is here", "was yesterday", "starts again", "has to wait", "ended")
OPENERS = ("", "well, ", "you know, ", "look, ", "I think ", "they say ", "so ")


@dataclass(frozen=True)
class Chat:
    """A chat before tokenisation."""

    task: str
    label: str
    look: int | None
    sound: int | None
    evidence: tuple[str, ...]
    """Pieces of text between the tags, cue pieces and no filler."""

    options: tuple[str, ...]
    instruction: str
    subtitle: str | None

    @property
    def reasoning(self) -> str:
        """The text inside `<think>`: the reference sentences of the given cues, a conclusion."""
        look = LOOKS[self.look].sentence if self.look is not None else ""
        sound = SOUNDS[self.sound].sentence if self.sound is not None else ""
        given = [sentence for sentence in (look, sound) if sentence]
        point = "Together these cues point" if len(given) == 2 else "This alone may point"
        return " ".join([*given, f"{point} to {self.label}."])

    def tokens(self, tokenizer: Any, *, with_answer: bool = True) -> PromptTokens:
        """Render with the renderer of every other stage."""
        prompt = render(
            self.task,
            self.instruction,
            self.options,
            subtitle=self.subtitle,
            label=self.label if with_answer else None,
            description=self.reasoning,
        )
        return tokenize(prompt, tokenizer, max_answer_tokens=MAX_ANSWER_TOKENS)


_pools = cache(load_instructions)


def cue_text(cue: Cue, rng: random.Random) -> str:
    """Word a cue: the reference sentence, its parts in another order, or some short phrases."""
    kind = rng.random()
    if kind < 0.25:
        return cue.sentence
    if kind < 0.4:
        words = cue.sentence.replace(",", "").replace(".", "").lower().split()
        rng.shuffle(words)
        return " ".join(words)
    phrases = rng.sample(cue.phrases, rng.randint(1, 4))
    if kind < 0.7:
        return ", ".join(phrases)
    return rng.choice(FRAMES).format(" and ".join(phrases)) + "."


def plain_sentence(rng: random.Random) -> str:
    """Write a sentence without emotional cue, as a subtitle may be."""
    text = f"{rng.choice(OPENERS)}{rng.choice(SUBJECTS)} {rng.choice(PREDICATES)}"
    return text[0].upper() + text[1:]


def draw_options(label: str, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Draw a label list that holds the truth; return the name of the truth in it, and the list."""
    kind = rng.random()
    rename = kind > 0.8
    others = [name for name in EMOTIONS if name != label]
    if 0.65 < kind < 0.9:
        others = rng.sample(others, rng.randint(1, 4))
    names = {
        name: OTHER_NAMES[name] if rename and rng.random() < 0.8 else name
        for name in [label, *others]
    }
    options = list(names.values())
    rng.shuffle(options)
    return names[label], tuple(options)


def draw_chat(rng: random.Random, *, p_one_cue: float = 0.12) -> Chat:
    """Draw a chat: an emotion, its cues in some wording, a question with its label list."""
    emotion = rng.choice(tuple(EMOTIONS))
    look: int | None
    sound: int | None
    look, sound = EMOTIONS[emotion]
    if rng.random() < p_one_cue:
        look, sound = (look, None) if rng.random() < 0.5 else (None, sound)
    given = [LOOKS[look]] if look is not None else []
    given += [SOUNDS[sound]] if sound is not None else []
    pieces = []
    for cue in given:
        pieces += [cue_text(cue, rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 5)))]
    if rng.random() < 0.7:
        rng.shuffle(pieces)
    task = "emotion" if rng.random() < 0.6 else "think"
    label, options = draw_options(emotion, rng)
    subtitle = plain_sentence(rng) if rng.random() < 0.7 else None
    instruction = rng.choice(_pools().of(task))
    return Chat(task, label, look, sound, tuple(pieces), options, instruction, subtitle)


def plain_text(rng: random.Random) -> str:
    """Write text about the world outside a chat."""
    emotion = rng.choice(tuple(EMOTIONS))
    look, sound = EMOTIONS[emotion]
    name = rng.choice((emotion, OTHER_NAMES[emotion]))
    a, b = rng.choice(LOOKS[look].phrases), rng.choice(SOUNDS[sound].phrases)
    return rng.choice(
        (
            f"{plain_sentence(rng)}. {plain_sentence(rng)}.",
            f"When {a} comes with {b}, the word is {name}.",
            f"{name}: {LOOKS[look].sentence} {SOUNDS[sound].sentence}",
            f"Another word for {emotion} is {OTHER_NAMES[emotion]}.",
            f"{b[0].upper()}{b[1:]} and {a} go with {name}.",
        )
    )
