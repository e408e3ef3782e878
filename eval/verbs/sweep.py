"""`emocache sweep`: an ablation in one file, from tokens that are missing to the table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import SchemaError, StoppedError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.extract_options import EngineFlags, takes
from eval.verbs.sweep_options import SweepOptions

if TYPE_CHECKING:
    from cache.manifest import Manifest
    from cache.store import TokenStore
    from eval.sweep.planning.plan import SweepPlan
    from eval.sweep.running.run import Start
    from eval.sweep.schema import Scale, SweepFile, Trial
    from eval.sweep.state import Begun, BegunTrial
    from extract.engines.options import EngineOptions

_SCALES = ("full", "demo")
_ENGINES = ("inline", "local", "slurm")


@verb
@takes(SweepOptions, EngineFlags)
def sweep_command(given: SweepOptions, flags: EngineFlags) -> int:
    """Encode, train and score all rows of an ablation, and print their table; run again to continue.

    Each distinct thing is encoded once, rows that share a training share its run, a row that fails stops
    no other. The engine options are for extraction and for --engine slurm.
    """
    if given.status:
        return _status(given)
    if given.file is None:
        return _list()
    wanted = _Wanted.of(given)
    engine = _engine(given, flags)
    if given.dry_run or given.explain or given.print_script:
        return _look(wanted, given, engine)
    return _run(wanted, given, engine)


# ---------------------------------------------------------------------------- what is wanted


@dataclass(frozen=True)
class _Wanted:
    """A sweep as the file and the options say it."""

    sweep: SweepFile
    """With the score columns of its scale."""
    scale: Scale
    trials: tuple[Trial, ...]
    begun: Begun
    """All of it."""
    chosen: tuple[BegunTrial, ...]
    """Those of the rows that are wanted now."""
    out: Path
    manifest: Path | None
    """None at demo scale."""
    store: str

    @classmethod
    def of(cls, given: SweepOptions) -> _Wanted:
        """Read and check the file and the options; write nothing."""
        from cache.clip import file_sha256
        from eval.sweep.file import read_sweep
        from eval.sweep.rows import rows_of, run_key, select, trials_of
        from eval.sweep.scale import scores_at
        from eval.sweep.state import Begun, BegunTrial

        assert given.file is not None
        scale = _scale(given.scale)
        sweep = read_sweep(given.file)
        rows = rows_of(sweep)
        trials = trials_of(sweep, rows, scale)
        patterns = [part.strip() for text in given.rows or () for part in text.split(",")]
        names = {row.name for row in select(rows, patterns)}
        folder = given.out_dir or _default_out(sweep.name, scale)
        manifest, store = _corpus(given, scale, folder)
        at_scale = sweep.model_copy(update={"scores": scores_at(sweep, scale)})
        own = tuple(
            BegunTrial(
                row=trial.row,
                seed=trial.seed,
                stage=trial.stage,
                run_key=run_key(trial),
                preset=trial.preset,
            )
            for trial in trials
        )
        source = sweep.read_from
        begun = Begun(
            file=given.file,
            text="" if source is None else source.text,
            scale=scale,
            manifest=None if manifest is None else str(manifest.resolve()),
            manifest_sha256=None if manifest is None else file_sha256(manifest),
            store=store,
            sweep=at_scale,
            rows=rows,
            trials=own,
        )
        chosen = tuple(trial for trial in own if trial.row in names)
        return cls(at_scale, scale, trials, begun, chosen, folder, manifest, store)


def _scale(name: str) -> Scale:
    from eval.verbs.arguments import one_of_these

    scale: Scale = one_of_these("--scale", name, _SCALES)
    return scale


def _default_out(name: str, scale: Scale) -> Path:
    from eval.sweep.state import DEMO_SUFFIX

    return Path("sweeps") / (name if scale == "full" else name + DEMO_SUFFIX)


def _corpus(given: SweepOptions, scale: Scale, folder: Path) -> tuple[Path | None, str]:
    """Return manifest and store: as given, or those that the sweep began with."""
    from cache.errors import ManifestError
    from cache.place import is_url
    from eval.sweep.state import SWEEP_FILE, read_begun

    if scale == "demo":
        if given.manifest is not None or given.media_root is not None or given.faces is not None:
            raise SchemaError(
                "--manifest, --media-root and --faces are for --scale full; at demo scale a sweep "
                "generates its clips."
            )
        store = given.store or str(folder / "store")
        return None, store if is_url(store) else str(Path(store).resolve())
    known = read_begun(folder) if (folder / SWEEP_FILE).is_file() else None
    if known is not None and known.scale != "full":
        known = None
    manifest = given.manifest
    if manifest is None and known is not None and known.manifest is not None:
        manifest = Path(known.manifest)
    found = given.store or (None if known is None else known.store)
    missing = [name for name, one in (("--manifest", manifest), ("--store", found)) if one is None]
    if missing or manifest is None or found is None:
        raise SchemaError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: the corpus to "
            "train on, and where its tokens are or go. (Or give --scale demo, which needs neither.)"
        )
    if not manifest.is_file():
        raise ManifestError(f"{manifest}: no such manifest. Create one with: emocache index ...")
    return manifest, found if is_url(found) else str(Path(found).resolve())


def _engine(given: SweepOptions, flags: EngineFlags) -> EngineOptions:
    """Return where encoders run, and arrays, refusing what cannot be."""
    from eval.verbs.arguments import check_device, choice
    from eval.verbs.extract_work import engine_options
    from extract.config import PRECISIONS

    choice(flags.engine, _ENGINES, "--engine")
    choice(given.precision, PRECISIONS, "--precision")
    is_here = flags.engine != "slurm"
    if given.device == "auto" and not is_here:
        raise SchemaError(
            "--device auto: what a cluster's machines have cannot be seen from here. Give --device cuda "
            "or --device cpu with --engine slurm."
        )
    if given.device != "auto":
        check_device(given.device, is_here=is_here)
    if given.print_script and is_here:
        raise SchemaError(
            f"--print-script: engine {flags.engine} submits no jobs. Give --engine slurm."
        )
    return engine_options(flags, "cpu" if given.device == "auto" else given.device)


# ---------------------------------------------------------------------------- before it starts


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is encoded."""

    plan: SweepPlan
    start: Start
    manifest: Manifest


def _prepare(
    wanted: _Wanted, trials: tuple[BegunTrial, ...], given: SweepOptions, engine: EngineOptions
) -> _Prepared:
    """Compare what some trials need with what is there; raise what stands in their way."""
    from cache.manifest import media_root, read_manifest
    from cache.place import is_url
    from eval.sweep.planning.plan import plan_sweep
    from eval.sweep.running.run import Start
    from eval.verbs.arguments import named_weights

    weights: Mapping[str, Path] = named_weights(given.encoder_weights or ())
    faces = given.faces
    if wanted.manifest is None:
        from eval.progress import progress_bar
        from eval.sweep.scale import N_CLIPS, demo_material

        with progress_bar(err, "generating clips", N_CLIPS, "clips") as bar:
            material = demo_material(wanted.out, wanted.sweep, wanted.trials, on_clip=bar.advance)
        weights = {**material.weights, **weights}
        path, root, faces = material.manifest, str(material.media), str(material.faces)
        manifest = read_manifest(path)
    else:
        path = wanted.manifest
        manifest = read_manifest(path)
        root = given.media_root or str(media_root(manifest, path))
    if not is_url(root):
        root = str(Path(root).resolve())
    names = {trial.name for trial in trials}
    plan = plan_sweep(
        [trial for trial in wanted.trials if trial.name in names],
        manifest,
        _open_store(wanted.store),
        scores=wanted.sweep.scores,
        weights=weights,
        where=wanted.store,
        faces=faces,
    )
    start = Start(
        out=wanted.out,
        manifest=path,
        media_root=root,
        store=wanted.store,
        scale=wanted.scale,
        scores=wanted.sweep.scores,
        device=given.device,
        jobs=_jobs(wanted.scale, given.jobs, engine),
        engine=engine,
        precision=given.precision,
        n_decoders=given.decoders,
        faces=faces,
        wheels=_wheels(wanted.sweep, given.wheels),
    )
    return _Prepared(plan, start, manifest)


def _jobs(scale: Scale, given: int | None, engine: EngineOptions) -> int:
    """Return how many runs are trained side by side; of an array 0: all."""
    from extract.config import n_cores

    if given is not None:
        return given
    if engine.kind == "slurm":
        return 0
    # A tiny model gains nothing from a second thread.
    return min(4, n_cores()) if scale == "demo" else 1


def _open_store(where: str) -> TokenStore | None:
    from eval.verbs.extract_work import store_if_any

    return store_if_any(where)


def _wheels(sweep: SweepFile, given: Path | None) -> Path | None:
    """Return the folder of the wheel tables, and read them once, if a score needs them."""
    from eval.benchmarks import WHEEL_METRICS, benchmark

    sets = [name for column in sweep.scores for name in column.sets]
    if not any(benchmark(name).metric in WHEEL_METRICS for name in sets):
        return given
    from eval.scoring.wheels import Wheels, wheels_folder

    folder = wheels_folder(given)
    Wheels.load(folder)
    return folder


def _look(wanted: _Wanted, given: SweepOptions, engine: EngineOptions) -> int:
    """Say what would be done."""
    from eval.sweep.state import check_begun, check_weights

    check_begun(wanted.out, wanted.begun, extend=given.extend)
    prepared = _prepare(wanted, wanted.chosen, given, engine)
    if given.dry_run:
        _print_plan(prepared)
    if given.explain:
        from eval.sweep.planning.explain import explain_lines

        for text in explain_lines(prepared.plan, width=min(out.width, 100)):
            out.print(text, markup=False, highlight=False, soft_wrap=True)
    prepared.plan.check()
    check_weights(wanted.out, wanted.begun.trials, prepared.plan.trials)
    if given.print_script:
        _print_scripts(prepared, wanted)
    return DONE


def _print_plan(prepared: _Prepared) -> None:
    from eval.sweep.planning.costs import reckoned_speed, reuse_costs, training_costs
    from eval.sweep.planning.explain import plan_lines, plan_table

    plan = prepared.plan
    out.print(plan_table(plan))
    # What stands in the way is said by `check`; a cost may not be known then.
    training = () if plan.problems else training_costs(plan, prepared.manifest)
    speed = reckoned_speed(prepared.start.device)
    for text in plan_lines(
        plan, reuse_costs(plan), training, flops_per_s=speed, width=min(out.width, 100)
    ):
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_scripts(prepared: _Prepared, wanted: _Wanted) -> None:
    from eval.sweep.running.run import open_trials, orders_of
    from eval.sweep.running.slurm import array_script, worker_script

    start = prepared.start
    if prepared.plan.extractions:
        out.print(
            f"to encode, up to {start.engine.workers} jobs would be submitted with this script:",
            highlight=False,
        )
        out.file.write(worker_script(start, prepared.plan).rstrip("\n") + "\n")
    orders = orders_of(start, prepared.plan, open_trials(start, wanted.chosen))
    if orders:
        out.print("to train and score, this job array would be submitted:", highlight=False)
        out.file.write(array_script(start, orders))


# ---------------------------------------------------------------------------- the work


def _run(wanted: _Wanted, given: SweepOptions, engine: EngineOptions) -> int:
    """Do what is left, and print the table."""
    from eval.sweep.running.at_work import leading
    from eval.sweep.running.run import lead
    from eval.sweep.running.watch import sweep_view
    from eval.sweep.state import (
        begin,
        check_begun,
        check_weights,
        forget_failures,
        has_all,
        is_settled,
        results_of,
    )

    folder, scores = wanted.out, wanted.sweep.scores
    with leading(folder):
        check_begun(folder, wanted.begun, extend=given.extend)
        known = results_of(folder, wanted.begun.trials)
        # One that failed at a score which is now taken out of the file lacks nothing any more.
        whole = [
            t for t in wanted.begun.trials if t.name in known and has_all(known[t.name], scores)
        ]
        todo = tuple(
            trial
            for trial in wanted.chosen
            if not is_settled(known.get(trial.name), scores)
            or (
                given.retry_failed
                and known[trial.name].status == "failed"
                and not has_all(known[trial.name], scores)
            )
        )
        prepared = None
        if todo:
            prepared = _prepare(wanted, todo, given, engine)
            prepared.plan.check()
            check_weights(folder, wanted.begun.trials, prepared.plan.trials)
            for remark in prepared.plan.remarks:
                err.print(remark, markup=False, highlight=False, soft_wrap=True)
        begun = begin(folder, wanted.begun, extend=given.extend)
        forget_failures(folder, [*todo, *whole])
        stopped: StoppedError | None = None
        if prepared is not None:
            if engine.kind == "slurm":
                from eval.sweep.running.slurm import lead_array as lead_all
            else:
                lead_all = lead
            names = {trial.name for trial in wanted.chosen}
            try:
                with sweep_view(err, folder, begun, names) as tick:
                    lead_all(prepared.start, prepared.plan, todo, tick)
            except StoppedError as stop:
                stopped = stop
        code = _finish(wanted, given)
        if stopped is not None:
            raise stopped
    return code


def _finish(wanted: _Wanted, given: SweepOptions) -> int:
    """Write and print the table; return the exit code."""
    from eval.sweep.state import results_of
    from eval.sweep.tables.results import write_results
    from eval.sweep.tables.terminal import terminal_table

    written = write_results(wanted.out, wheels=given.wheels)
    out.print(terminal_table(written.table, out.width))
    for path in written.files:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    failed = [r for r in results_of(wanted.out, wanted.chosen).values() if r.status == "failed"]
    if failed:
        err.print(
            f"{len(failed)} of {len(wanted.chosen)} trials failed; --retry-failed tries them again",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return FINDINGS if failed else DONE


# ---------------------------------------------------------------------------- looking


def _status(given: SweepOptions) -> int:
    """Say how far a sweep is; from any process that reaches its folder."""
    from eval.sweep.file import read_sweep
    from eval.sweep.running.watch import look_at, panel
    from eval.sweep.state import read_begun

    folder = given.out_dir
    if folder is None:
        if given.file is None:
            raise SchemaError("--status: of which sweep? Give its name, its file, or --out FOLDER.")
        folder = _default_out(read_sweep(given.file).name, _scale(given.scale))
    begun = read_begun(folder)
    found = look_at(folder, begun)
    counts = found.count()
    if found.leader is not None:
        said = f"running: {found.leader}"
    elif counts["open"] or counts["at work"]:
        said = "not running; the command that began it continues it"
    else:
        said = "done"
    out.print(f"{folder}: {said}", markup=False, highlight=False, soft_wrap=True)
    out.print(panel(begun, found))
    return DONE


def _list() -> int:
    """List the shipped sweeps."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eval.sweep.file import FOLDER, read_sweep, shipped
    from eval.sweep.rows import rows_of

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sweep", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("what it compares")
    for name in shipped():
        sweep = read_sweep(name)
        table.add_row(name, str(len(rows_of(sweep))), sweep.title)
    out.print(table)
    out.print(
        "emocache sweep NAME --scale demo goes through one in minutes; a copy of a file is the start of "
        f"your own: {os.path.relpath(FOLDER)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return DONE
