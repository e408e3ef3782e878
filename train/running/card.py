"""The model card beside trained weights: what they are, what they need, how to use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from train.config import Preset, StageConfig

_TEXT = """# {name}, {stage}

Trained by emocache: pre-fusion and modal adapters (`fusion_adapters.safetensors`) and LoRA (`lora/`, a peft
adapter folder) for the frozen language model `{llm}`. Neither the language model nor the encoders are
part of this folder; their licences hold for what is built on them, and so do those of the corpora.

| | |
|---|---|
| stage | `{stage}`, behind step {step:,} of {n_steps:,} |
| tasks | {tasks} |
| clips seen in this stage | {n_clips:,} |
| trained parameters | {n_trained:,} ({parts}) |
| prefix | {prefix} |
| pre-fusion | `{fusion}` |
| LoRA | r={r}, alpha={alpha} on {targets} |
{numbers}

## Tokens that it reads

| input | encoder | spec_id |
|---|---|---|
{inputs}

Tokens of another spec are refused: the weights would not fit them.

## Use

```
emocache evaluate RUN --manifest corpus.parquet --store tokens --split test
```

`lora/` alone loads with `peft.PeftModel.from_pretrained(llm, "lora")`. Stage 1 of another run can start here:
`emocache train PRESET ... init=FOLDER`.
"""


def write_card(
    folder: Path,
    preset: Preset,
    stage: StageConfig,
    *,
    step: int,
    n_clips: int,
    trainable: Mapping[str, int],
    numbers: Mapping[str, float],
) -> None:
    """Write README.md with the front matter that model hubs read.

    Args:
        folder: Where.
        preset: The resolved configuration.
        stage: Which of its stages.
        step: Optimizer steps that are done.
        n_clips: Clips trained on in this stage.
        trainable: Component -> trained parameters.
        numbers: Latest loss and validation.
    """
    llm = preset.model.llm.path
    front = {
        "library_name": "emocache",
        "base_model": llm,
        "pipeline_tag": "video-text-to-text",
        "tags": ["emotion-recognition", "multimodal", "lora", preset.name],
    }
    lora = preset.model.lora
    text = _TEXT.format(
        name=preset.name,
        stage=stage.name,
        llm=llm,
        step=step,
        n_steps=stage.n_steps,
        tasks=", ".join(f"{task} {share:g}" for task, share in stage.tasks.items()),
        n_clips=n_clips,
        n_trained=sum(trainable.values()),
        parts=", ".join(f"{name} {n:,}" for name, n in trainable.items()),
        prefix=", ".join(f"{n} {name}" for name, n in preset.layout().blocks),
        fusion=preset.model.fusion.kind,
        r=lora.r,
        alpha=lora.alpha,
        targets=", ".join(lora.targets),
        numbers="\n".join(
            f"| {name.replace('_', ' ')} | {value:.4g} |"
            for name, value in numbers.items()
            if "loss" in name or "accuracy" in name
        ),
        inputs="\n".join(
            f"| {name} | {spec.encoder.kind} | `{spec.spec_id}` |"
            for name, spec in preset.tokens.by_input().items()
        ),
    )
    header = yaml.safe_dump(front, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{header}---\n\n{text}", encoding="utf-8")
