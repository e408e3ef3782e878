"""`emocache train` and `emocache import-checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from cache.errors import SchemaError
from eval.verbs.console import DONE, err, out, verb

if TYPE_CHECKING:
    from cache.manifest import Manifest
    from cache.store import TokenStore
    from train.config import Preset, StageConfig
    from train.loop import TrainResult

PresetArgument = Annotated[
    str, typer.Argument(metavar="PRESET", help="v2, demo, ...; `emocache show` lists them")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. stages.0.n_steps=100"),
]
WithOption = Annotated[
    Path | None, typer.Option("--with", help="YAML or JSON file of settings, under KEY=VALUE.")
]
ManifestOption = Annotated[Path, typer.Option("--manifest", help="Manifest from `emocache index`.")]
StoreOption = Annotated[
    str, typer.Option("--store", help="Folder or URL (s3://...) of the token store.")
]


@verb
def train_command(
    preset: PresetArgument,
    manifest: ManifestOption,
    store: StoreOption,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; the same one continues it.")
    ] = None,
    overrides: Overrides = None,
    with_file: WithOption = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
    ] = "auto",
    parallel: Annotated[
        str,
        typer.Option(
            help="How processes that torchrun or srun started share the model: ddp, fsdp."
        ),
    ] = "ddp",
    track: Annotated[
        list[str] | None,
        typer.Option(help="Tell wandb or mlflow too, where installed. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, tokens per step, memory, time; train nothing."
        ),
    ] = False,
) -> int:
    """Train the preset's stages from cached tokens; run again to continue."""
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.verbs.arguments import check_device, configure, one_of_these
    from train.running.monitor import TRACKERS
    from train.running.parallel import Parallel

    chosen = configure(preset, overrides, with_file)
    one_of_these("--parallel", parallel, get_args(Parallel))
    for name in track or ():
        one_of_these("--track", name, TRACKERS)
    if device != "auto":
        check_device(device)
    records = read_manifest(manifest)
    tokens = TokenStore.open(store)
    if dry_run:
        return _estimate(chosen, records, tokens, device, parallel)
    if out_dir is None:
        raise SchemaError(
            "--out FOLDER is missing: where should the run be kept? (Or give --dry-run.)"
        )
    result = _train(chosen, records, manifest, tokens, out_dir, device, parallel, track or [])
    if int(os.environ.get("RANK", "0")):
        return DONE
    if not result.n_steps:
        out.print(f"nothing to do: {out_dir} has finished all its stages", highlight=False)
        return DONE
    n = sum(result.info.trainable.values())
    done = f"trained {result.n_steps} steps, {n:,} parameters, in {out_dir}"
    out.print(done, highlight=False, soft_wrap=True)
    return DONE


def _train(
    preset: Preset,
    records: Manifest,
    manifest: Path,
    tokens: TokenStore,
    out_dir: Path,
    device: str,
    parallel: Any,
    track: Any,
) -> TrainResult:
    from eval.progress import progress_bar
    from train.loop import train

    total = sum(stage.n_steps for stage in _stages_left(preset, out_dir))
    with progress_bar(err, "training", total, "steps") as bar:
        return train(
            preset,
            records,
            manifest,
            tokens,
            out_dir,
            on_step=step_note(bar),
            device=device,
            parallel=parallel,
            trackers=track,
        )


def _stages_left(preset: Preset, run: Path) -> Sequence[StageConfig]:
    from train.running.run import read_run

    finished: tuple[str, ...] = ()
    if (run / "run.json").is_file():
        finished = read_run(run)[1].finished
    return [stage for stage in preset.stages if stage.name not in finished]


def step_note(bar: Any) -> Callable[[str, int, int, dict[str, float]], None]:
    """Return a callback that moves a bar and says how training goes."""
    done: dict[str, int] = {}

    def on_step(stage: str, step: int, n_steps: int, latest: dict[str, float]) -> None:
        before = done.get(stage, 0)
        done[stage] = step
        note = stage
        if "loss" in latest:
            note += (
                f" · loss {latest['loss']:.3f} · {latest['tokens_per_s']:,.0f} tokens/s · "
                f"waiting for data {latest['data_wait']:.1%}"
            )
        if "val_loss" in latest:
            note += f" · val {latest['val_loss']:.3f}"
        # The first step of a continued run stands for those that were done before.
        bar.advance(step - before, note)

    return on_step


def _estimate(
    preset: Preset, records: Manifest, tokens: TokenStore, device: str, parallel: Any
) -> int:
    from train.estimates.estimate import estimate, lines
    from train.running.parallel import choose_device

    n = int(os.environ.get("WORLD_SIZE", "1"))
    found = estimate(
        preset, records, tokens, n_processes=n, device=choose_device(device), parallel=parallel
    )
    for line in lines(found):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return DONE


@verb
def import_checkpoint_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Published .pth, .pt or .safetensors.")
    ],
    preset: Annotated[str, typer.Option(help="Configuration that the weights are for.")] = "v2",
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder to make; train with init=FOLDER.")
    ] = (Path("imported")),
    overrides: Overrides = None,
    with_file: WithOption = None,
) -> int:
    """Turn a published Emotion-LLaMAv2, Emotion-LLaMA or MiniGPT-v2 checkpoint into trained parts."""
    from eval.verbs.arguments import configure
    from train.published.importing import import_run

    chosen = configure(preset, overrides, with_file)
    report = import_run(file, chosen, out_dir)
    for line in report.lines():
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(f"in {out_dir}: start a training with init={out_dir}", highlight=False)
    return DONE
