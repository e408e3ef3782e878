"""How clips are annotated: the settings of a pipeline, and the three pipelines that have a name.

`mmeverse` is Algorithm 1 of the paper; `merr-coarse` and `merr-fine` are those of its predecessor's
data. Settings change as `key=value`, for example `visual_objective.base_url=http://gpu1:8000/v1`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from cache.overrides import configured
from cache.schema import Model, canonical_json
from extract.annotate.endpoints.budget import Caps
from extract.annotate.endpoints.costs import Assumptions, Price
from extract.annotate.endpoints.questions import Sampling
from extract.annotate.endpoints.transport import NO_KEY, EndpointOptions
from extract.annotate.evidence.action_units import Unit
from extract.annotate.evidence.media import MediaLimits
from extract.annotate.evidence.openface import DEADLINE_S
from extract.annotate.evidence.transcribe import TranscribeOptions
from extract.annotate.results import Step

Role = Literal["visual_objective", "audio_tone", "consolidate"]
"""What a model is asked for."""
ROLES: tuple[Role, ...] = ("visual_objective", "audio_tone", "consolidate")


Wording = Literal["mmeverse", "merr-fine", "merr-coarse"]


class RoleOptions(EndpointOptions):
    """A model that is asked, and the endpoint where it is."""

    model: str = Field(min_length=1)
    """Name of the model, as the endpoint knows it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; None: as the prompt file says."""
    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    """0 takes the likeliest word; None leaves it to the server, as some reasoning models demand."""
    seed: int | None = 0
    """Given to the server, which may ignore it; None sends none."""
    stop_s: float = Field(default=60.0, ge=0)
    """How long requests in flight may take to be answered when the work is stopped: they are paid for."""
    price: Price | None = None
    """Per million tokens; None leaves money out of estimates and reports."""

    @property
    def endpoint(self) -> EndpointOptions:
        """Where questions of this role are sent, and how."""
        return EndpointOptions(**self.model_dump(include=set(EndpointOptions.model_fields)))

    def sampling(self, max_tokens: int) -> Sampling:
        """Return how the model chooses words.

        Args:
            max_tokens: Of the prompt.
        """
        return Sampling(
            temperature=self.temperature,
            max_tokens=self.max_tokens or max_tokens,
            seed=self.seed,
        )


class DetectorOptions(Model):
    """Who finds action units."""

    kind: str = "openface"
    """`openface` runs its program, `openface-csv` reads tables that it wrote, `none` uses the units and
    the peak that the records have; anything else is `module:attribute`, a detector of your own."""
    program: str | None = None
    """Of kind `openface`: path or name of the program; None: FeatureExtraction on PATH."""
    folder: Path | None = None
    """Of kind `openface-csv`: where the tables are."""
    min_confidence: float = Field(default=0.0, ge=0.0, le=1.0)
    """Frames in which the detector is less sure of the face do not count."""
    deadline_s: float = Field(default=DEADLINE_S, gt=0)
    """For one clip."""
    options: tuple[str, ...] = ()
    """Arguments of a detector of your own."""

    @model_validator(mode="after")
    def _whole(self) -> DetectorOptions:
        kinds = ("openface", "openface-csv", "none")
        if self.kind not in kinds and ":" not in self.kind:
            raise ValueError(
                f"kind: no detector {self.kind!r}.{near_miss(self.kind, kinds)} Allowed: "
                f"{', '.join(kinds)}, and module:attribute"
            )
        if self.kind == "openface-csv" and self.folder is None:
            raise ValueError("kind openface-csv needs detector.folder=DIR")
        return self


class UnitOptions(Model):
    """What is made of action units."""

    table: Path | None = None
    """JSON of names, phrases and rules that takes the place of the built-in one, or of parts of it."""
    without: tuple[Unit, ...] = ()
    """Units that do not count for the peak, AU45 (blinks) for example. The paper counts all."""
    rules: str = "merr"
    """Set of rules by which units hint at an emotion."""


class SpeechOptions(TranscribeOptions):
    """Who writes down what is said, where a record has no subtitle."""

    checkpoint: Path
    """An openai-whisper checkpoint (.pt)."""
    name: str | None = None
    """What the model is called in a subtitle's origin; None: by its file."""
    device: str = "cpu"


class Preset(Model):
    """Everything that decides how a record is annotated."""

    name: str
    wording: Wording = "mmeverse"
    """Which of the shipped prompts are used."""
    detector: DetectorOptions = DetectorOptions()
    units: UnitOptions = UnitOptions()
    media: MediaLimits = MediaLimits()
    """Size of the picture and length of the sound that models get."""
    speech: SpeechOptions | None = None
    """None: a record without subtitle stays without."""
    visual_objective: RoleOptions | None = None
    """Vision-language model; None leaves the step out."""
    audio_tone: RoleOptions | None = None
    """Audio-language model; None leaves the step out."""
    consolidate: RoleOptions | None = None
    """Chat model that writes the description out of the clues; None takes the template of clues."""
    targets: tuple[LabelField, ...] = ("emotion", "sentiment", "intent", "emotion_multi")
    """Labels that guide a description of their own, where a record has them."""
    unlabelled: Literal["skip", "pseudo", "adopt"] = "skip"
    """A record without any of them gets no description, or one guided by what its action units hint at;
    `adopt` also makes that the record's emotion, where the manifest's label space has it."""
    need: tuple[Step, ...] = ()
    """Steps without which nothing is consolidated; where one failed, the description fails, too."""
    prompts: Path | None = None
    """Folder of prompt files that take the place of the built-in ones of the same name."""
    budget: Caps = Caps()
    """What the whole annotation may use up, all endpoints and all workers together."""
    assumptions: Assumptions = Assumptions()
    """For the estimate."""

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        if self.consolidate is None and "multimodal" in self.need:
            raise ValueError("need: 'multimodal' is what the other steps are needed for")
        return self

    @property
    def roles(self) -> dict[Role, RoleOptions]:
        """The models that are asked, by role."""
        found = {role: getattr(self, role) for role in ROLES}
        return {role: options for role, options in found.items() if options is not None}

    def digest(self, prompt_ids: Sequence[str]) -> str:
        """Return a digest of what decides the texts: not where a model is, nor how often it is asked.

        Args:
            prompt_ids: Of the prompts in use, which tell their content.
        """
        told: dict[str, Any] = {
            "detector": self.detector.model_dump(
                mode="json", include={"kind", "min_confidence", "options", "folder"}
            ),
            "units": {
                **self.units.model_dump(mode="json", exclude={"table"}),
                "table": None if self.units.table is None else _file_digest(self.units.table),
            },
            "media": self.media.model_dump(mode="json"),
            "speech": (
                None
                if self.speech is None
                else self.speech.model_dump(mode="json", exclude={"checkpoint", "device"})
                | {"checkpoint": self.speech.checkpoint.name}
            ),
            "roles": {
                role: options.model_dump(
                    mode="json", include={"model", "max_tokens", "temperature", "seed"}
                )
                for role, options in self.roles.items()
            },
            "wording": self.wording,
            "targets": self.targets,
            "unlabelled": self.unlabelled,
            "need": self.need,
            "prompts": sorted(prompt_ids),
        }
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SchemaError(
            f"{path}: cannot be read ({error.strerror}). Check units.table."
        ) from None


def _local(port: int, model: str, repairs: int = 0) -> RoleOptions:
    return RoleOptions(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key_env=NO_KEY,
        model=model,
        in_flight=32,
        repairs=repairs,
    )


def mmeverse() -> Preset:
    """The paper's pipeline, with its models."""
    return Preset(
        name="mmeverse",
        visual_objective=_local(8000, "Qwen/Qwen2.5-VL-72B-Instruct"),
        audio_tone=_local(8001, "Qwen/Qwen2-Audio-7B-Instruct"),
        consolidate=RoleOptions(
            base_url="https://api.openai.com/v1",
            model="gpt-4o",
            in_flight=32,
            repairs=1,
        ),
    )


def merr_coarse() -> Preset:
    """MERR's coarse set: clues put together by a template, pseudo-labels from action units.

    Its scene descriptions came from MiniGPT-v2 and its tones from Qwen-Audio, which no
    OpenAI-compatible server serves; their successors take their places.
    """
    return Preset(
        name="merr-coarse",
        wording="merr-coarse",
        visual_objective=_local(8000, "Qwen/Qwen2.5-VL-7B-Instruct"),
        audio_tone=_local(8001, "Qwen/Qwen2-Audio-7B-Instruct"),
        targets=("emotion",),
        unlabelled="pseudo",
    )


def merr_fine() -> Preset:
    """MERR's fine set: the coarse one, refined by a chat model."""
    return merr_coarse().model_copy(
        update={
            "name": "merr-fine",
            "wording": "merr-fine",
            "consolidate": _local(8002, "meta-llama/Meta-Llama-3-8B-Instruct", repairs=1),
        }
    )


PRESETS = {"mmeverse": mmeverse, "merr-coarse": merr_coarse, "merr-fine": merr_fine}


def preset(name: str) -> Preset:
    """Return a preset by its name; raises SchemaError for an unknown one."""
    if name not in PRESETS:
        raise SchemaError(
            f"no preset '{name}' of annotation.{near_miss(name, PRESETS)} Allowed: {', '.join(PRESETS)}"
        )
    return PRESETS[name]()


def configure(name: str, overrides: Sequence[str] = (), with_file: Path | None = None) -> Preset:
    """Return a preset with the user's settings on top; raises SchemaError for one that does not fit."""
    return configured(
        preset(name),
        overrides,
        with_file,
        name=name,
        example="visual_objective.base_url=http://127.0.0.1:8000/v1",
        shown_by="emocache annotate show",
    )
