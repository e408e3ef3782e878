"""`emocache store ...`: look into a store, check it, clean it, copy it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from cache.errors import SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb

VERBS = (
    "ls", "show", "plan", "diff", "verify", "doctor", "gc", "compact",
    "card", "stats", "export", "import", "sync",
)  # fmt: skip
"""Looking, checking, cleaning, citing, copying; `emocache store --help` shows them so."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        """Return the verbs in the order of their purpose."""
        return sorted(self.commands, key=VERBS.index)


store_app = typer.Typer(
    cls=_InOrder, no_args_is_help=True, help="Look into a token store, and keep it."
)

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL (s3://...).")]
ManifestLookup = Annotated[
    Path | None, typer.Option("--manifest", help="Manifest, to know clips by their uid.")
]


@store_app.command("ls")
@verb
def store_ls(store: StoreArgument) -> int:
    """List the specs in a store, their clips and sizes."""
    from cache.store import TokenStore
    from eval.tables import store_table

    opened = TokenStore.open(store)
    out.print(store_table(opened))
    if not opened.specs:
        out.print("the store is empty", highlight=False)
    return DONE


@store_app.command("show")
@verb
def store_show(
    store: StoreArgument,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[UID|SPEC]",
            help="A record's uid (with --manifest), a clip's digest, or a spec.",
        ),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="To look up a clip by its uid.")
    ] = None,
) -> int:
    """Show a spec in full, or one clip's tokens, status and provenance."""
    from cache.errors import CacheMissError
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.tables import clip_table

    opened = TokenStore.open(store)
    chosen = [s for s in opened.specs.values() if what in (None, s.spec_id, s.stream)]
    if chosen:
        for spec in chosen:
            out.print_json(spec.model_dump_json())
            made = Counter(
                ", ".join(f"{k} {v}" for k, v in c.provenance.items()) for c in opened.commits(spec)
            )
            for text, n in made.items():
                out.print(f"{n} units by {text}", highlight=False)
        return DONE
    assert what is not None
    keys = {what}
    if manifest is not None:
        found = [r for r in read_manifest(manifest).records if r.uid == what]
        keys |= {r.token_key(s) for r in found for s in opened.specs.values()}
    table, provenance = clip_table(opened, keys)
    if not provenance:
        raise CacheMissError(
            f"{what!r}: neither a stored spec nor a clip of {store}. Give a spec_id from `emocache "
            "store ls`, a clip's SHA-256, or a uid together with --manifest."
        )
    out.print(table)
    for line in provenance:
        out.print(line, highlight=False, soft_wrap=True)
    return DONE


@store_app.command("plan")
@verb
def store_plan(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="v2 or demo")],
    manifest: Annotated[Path, typer.Option("--manifest", help="Manifest from `emocache index`.")],
    store: Annotated[str, typer.Option("--store", help="Folder or URL (s3://...).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. tokens.video.grid=4"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Count clips that failed before as missing.")
    ] = False,
) -> int:
    """Say what a store has of a manifest, what is missing and why, and the bytes to write."""
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.tables import plan_table
    from eval.verbs.arguments import configure
    from extract.failures import KINDS
    from extract.plan import make_plan

    opened = TokenStore.open(store)
    chosen = configure(preset, overrides)
    records = read_manifest(manifest).records
    plan = make_plan(records, chosen.tokens.all(), opened, retry=KINDS if retry_failed else ())
    out.print(plan_table(plan))
    for label, served in plan.served.items():
        for spec_id, n in served.items():
            out.print(f"{label}: {n:,} clips come from the richer spec {spec_id}", highlight=False)
    return DONE


@store_app.command("diff")
@verb
def store_diff(
    first: Annotated[str, typer.Argument(metavar="SPEC_A", help="PRESET/INPUT, spec_id or file")],
    second: Annotated[str, typer.Argument(metavar="SPEC_B")],
    store: Annotated[
        str | None, typer.Option("--store", help="Store in which spec_ids are looked up.")
    ] = None,
) -> int:
    """Print the fields in which two specs differ, and nothing else; exit code 1 if there are any."""
    from cache.spec import differences
    from cache.store import TokenStore
    from eval.verbs.arguments import spec_of

    opened = None if store is None else TokenStore.open(store)
    found = differences(spec_of(first, opened), spec_of(second, opened))
    for path, (a, b) in found.items():
        out.print(f"{path}: {a!r} {b!r}", markup=False, highlight=False, soft_wrap=True)
    return FINDINGS if found else DONE


@store_app.command("gc")
@verb
def store_gc(
    store: StoreArgument,
    keep_presets: Annotated[
        str | None,
        typer.Option(help="Remove specs that none of these use, e.g. v2,demo. Default: keep all."),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove; without it, only say what would be.")
    ] = False,
    abandoned_after_h: Annotated[
        float, typer.Option(min=0, help="Age at which an uncommitted shard counts as abandoned.")
    ] = 24.0,
) -> int:
    """Remove what nobody can reach: unused specs, shards of dead or lost writers, replaced units."""
    from cache.lifecycle import collect_garbage
    from cache.store import TokenStore
    from eval.tables import garbage_table
    from eval.verbs.arguments import configure

    keep = None
    if keep_presets is not None:
        names = [name.strip() for name in keep_presets.split(",") if name.strip()]
        keep = [spec for name in names for spec in configure(name, None).tokens.all()]
    found = collect_garbage(
        TokenStore.open(store), keep, delete=delete, abandon_after_s=abandoned_after_h * 3600
    )
    if found.files:
        out.print(garbage_table(found))
    verdict = "removed" if delete else "would be removed; nothing was. Remove with --delete"
    text = f"{found.n_files} files {verdict}" if found.files else "nothing to remove"
    if found.n_spared:
        text += (
            f"; {found.n_spared} uncommitted shards younger than {abandoned_after_h:g} h were left"
        )
    out.print(text, highlight=False, soft_wrap=True)
    return DONE


@store_app.command("compact")
@verb
def store_compact(
    store: StoreArgument,
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="Default: all.")] = None,
) -> int:
    """Join small and superseded units to full shards; `gc` removes the old ones."""
    from cache.lifecycle import compact
    from cache.store import TokenStore
    from eval.formats import human_size
    from eval.progress import progress_bar
    from eval.verbs.arguments import spec_of

    opened = TokenStore.open(store)
    chosen = list(opened.specs.values()) if spec is None else [spec_of(spec, opened)]
    for one in chosen:
        with progress_bar(err, f"compacting {one.stream}", 0, "units") as bar:
            done = compact(opened, one, on_unit=bar.advance)
        out.print(
            f"{one.stream} {one.spec_id}: {done.n_units_before} units became {done.n_units_after}; "
            f"`emocache store gc --delete` frees {human_size(max(0, done.n_bytes_freed))}",
            highlight=False,
            soft_wrap=True,
        )
    return DONE


@store_app.command("sync")
@verb
def store_sync(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Store to copy from.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Store to copy to; may be new.")],
    spec: Annotated[
        list[str] | None, typer.Option("--spec", help="Copy these only. Repeatable.")
    ] = None,
    compression: Annotated[str, typer.Option(help="Of a new DST: none or zstd.")] = "none",
    single_committer: Annotated[
        bool, typer.Option("--single-committer", help="As in `emocache extract`.")
    ] = False,
) -> int:
    """Copy what DST lacks, folder or bucket, checked on both sides; run again to continue."""
    from cache.lifecycle import sync
    from cache.store import TokenStore
    from eval.formats import human_size
    from eval.progress import progress_bar
    from eval.verbs.arguments import compression_of, spec_of

    opened = TokenStore.open(source)
    chosen = [spec_of(text, opened) for text in spec or []] or list(opened.specs.values())
    other = TokenStore.open_or_create(
        target, compression=compression_of(compression), single_committer=single_committer
    )
    total = sum(len(opened.index(one)) for one in chosen)
    with progress_bar(err, "copying", total, "clips") as bar:
        done = sync(opened, other, chosen, on_clip=bar.advance)
    out.print(
        f"{done.n_clips:,} clips copied ({human_size(done.n_bytes)}), {done.n_known:,} were there",
        highlight=False,
    )
    return DONE


@store_app.command("verify")
@verb
def store_verify(
    store: StoreArgument,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Compare with its records, too.")
    ] = None,
    deep: Annotated[
        int,
        typer.Option(
            "--deep",
            min=0,
            metavar="N",
            help="Encode N clips again and compare (--manifest, --preset).",
        ),
    ] = 0,
    preset: Annotated[str, typer.Option(help="Of --deep: whose encoders made the tokens.")] = "v2",
    encoder_weights: Annotated[
        list[str] | None, typer.Option(help="Of --deep: NAME=PATH, as in `emocache extract`.")
    ] = None,
    media_root: Annotated[
        Path | None, typer.Option(help="Of --deep: where the media are now.")
    ] = None,
    faces: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|MODULE:NAME", help="Of --deep: where faces are, as in `emocache extract`."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Of --deep: cpu, cuda or cuda:N")] = "cpu",
) -> int:
    """Read everything back and compare it with its checksums, its spec and its manifest."""
    from cache.audit import doctor_open, verify
    from cache.manifest import read_manifest
    from eval.formats import human_size
    from eval.progress import progress_bar
    from eval.tables import finding_table

    if deep and manifest is None:
        raise SchemaError("--deep N encodes clips of a manifest again; give it with --manifest.")
    opened = doctor_open(store)
    found = None if manifest is None else read_manifest(manifest)
    with progress_bar(err, "verifying", 0, "clips") as bar:
        report = verify(opened, None if found is None else found.records, on_clip=bar.advance)
    if report.findings:
        out.print(finding_table(report.findings))
    is_fine = report.is_whole
    if deep and found is not None and manifest is not None:
        from cache.manifest import media_root as root_of
        from eval.tables import recheck_table
        from eval.verbs.arguments import check_device, configure, weights_of
        from extract.encoders.bank import EncoderBank
        from extract.faces import face_source
        from extract.recheck import recheck

        chosen = configure(preset, None)
        check_device(device)
        bank = EncoderBank(chosen.tokens.all(), weights_of(chosen, encoder_weights or []), device)
        again = recheck(
            opened, found.records, bank, media_root or root_of(found, manifest), deep,
            faces=face_source(bank.specs, faces),
        )  # fmt: skip
        out.print(recheck_table(again))
        is_fine = is_fine and all(one.passed for one in again)
    out.print(
        f"{report.n_clips:,} clips in {report.n_units:,} units of {report.n_specs} specs read "
        f"({human_size(report.n_bytes)}): {'whole' if is_fine else 'see above'}",
        highlight=False,
        soft_wrap=True,
    )
    return DONE if is_fine else FINDINGS


@store_app.command("doctor")
@verb
def store_doctor(
    store: StoreArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be repaired.")
    ] = False,
    presets: Annotated[
        str, typer.Option(help="Their specs may restore lost group metadata, e.g. v2,demo.")
    ] = "",
) -> int:
    """Build again what follows from the committed data: metadata, small arrays, snapshots."""
    from cache.audit import doctor, doctor_open
    from eval.tables import finding_table
    from eval.verbs.arguments import configure

    names = [name.strip() for name in presets.split(",") if name.strip()]
    candidates = [spec for name in names for spec in configure(name, None).tokens.all()]
    report = doctor(doctor_open(store), dry_run=dry_run, specs=candidates)
    if report.repaired:
        out.print(finding_table(report.repaired, "would be repaired" if dry_run else "repaired"))
    if report.remaining:
        out.print(finding_table(report.remaining, "needs another cure"))
    if not report.repaired and not report.remaining:
        out.print("nothing to repair", highlight=False)
    return FINDINGS if report.remaining else DONE


@store_app.command("card")
@verb
def store_card(
    store: StoreArgument,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="Stream, or digits of a spec_id.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="Markdown file to write.")] = None,
) -> int:
    """Print the recipe of a spec, to cite: encoder, weights, preprocessing, versions, dates, counts."""
    from cache.card import card
    from cache.files import write_text_aside
    from cache.store import TokenStore
    from eval.verbs.arguments import spec_of

    opened = TokenStore.open(store)
    text = card(opened, spec_of(spec, opened))
    if out_file is None:
        out.file.write(text)
    else:
        write_text_aside(out_file, text)
        out.print(str(out_file), highlight=False, soft_wrap=True)
    return DONE


@store_app.command("stats")
@verb
def store_stats(
    store: StoreArgument,
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="Default: all.")] = None,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder of the plots and their numbers as JSON.")
    ] = Path("stats"),
    n_clips: Annotated[
        int, typer.Option(min=1, help="Clips of each spec, chosen at random.")
    ] = 2000,
) -> int:
    """Measure and plot token norms, outlier channels and durations of each spec."""
    import numpy as np

    from cache.commit import Status
    from cache.files import write_text_aside
    from cache.statistics import StatisticsCollector
    from cache.store import TokenStore
    from eval.plots import plot_statistics
    from eval.progress import progress_bar
    from eval.tables import statistics_table
    from eval.verbs.arguments import spec_of

    opened = TokenStore.open(store)
    out_dir.mkdir(parents=True, exist_ok=True)
    found = []
    for one in [spec_of(spec, opened)] if spec else list(opened.specs.values()):
        keys = [entry.key for entry in opened.index(one) if entry.status is Status.OK]
        places = sorted(np.random.default_rng(0).permutation(len(keys))[:n_clips].tolist())
        if not places:
            continue
        measured = StatisticsCollector(one)
        with progress_bar(err, f"reading {one.stream}", len(places), "clips") as bar:
            for place in places:
                measured.add(opened.read(one, keys[place]).tokens)
                bar.advance()
        found.append(measured.result())
        name = f"{one.stream}-{one.spec_id}"
        write_text_aside(out_dir / f"{name}.json", found[-1].model_dump_json(indent=2))
        plot_statistics(found[-1], out_dir / f"{name}.png")
    out.print(statistics_table(found))
    out.print(str(out_dir), highlight=False, soft_wrap=True)
    return DONE


@store_app.command("export")
@verb
def store_export(
    store: StoreArgument,
    hdf5: Annotated[Path | None, typer.Option("--hdf5", help="One file of everything.")] = None,
    npy: Annotated[
        Path | None, typer.Option("--npy", help="Folder of one .npy a clip; needs --spec.")
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option("--spec", help="Stream, or digits of a spec_id. Repeatable. Default: all."),
    ] = None,
    manifest: ManifestLookup = None,
) -> int:
    """Write tokens as one HDF5 file, or as the old one-file-per-clip layout; run again to continue."""
    from cache.hdf5 import export_hdf5
    from cache.manifest import read_manifest
    from cache.npy import export_npy
    from cache.store import TokenStore
    from eval.formats import human_size
    from eval.progress import progress_bar
    from eval.verbs.arguments import one_of, spec_of

    one_of("--hdf5 FILE", hdf5, "--npy FOLDER", npy)
    opened = TokenStore.open(store)
    chosen = [spec_of(text, opened) for text in spec or []]
    total = sum(len(opened.index(one)) for one in chosen or opened.specs.values())
    with progress_bar(err, "exporting", total, "clips") as bar:
        if hdf5 is not None:
            report = export_hdf5(opened, hdf5, chosen or None, on_clip=bar.advance)
            text = f"{report.n_clips:,} clips in {hdf5} ({human_size(report.n_bytes)})"
            if report.nothing_to_do:
                text = f"nothing to do: {text}"
            if report.restarted:
                text += f". It was started again: {report.restarted}"
        else:
            assert npy is not None
            if len(chosen) != 1:
                raise SchemaError("--npy writes one spec; name it with --spec, e.g. --spec audio.")
            records = None if manifest is None else read_manifest(manifest).records
            export_npy(opened, chosen[0], npy, records, on_clip=bar.advance)
            text = f"{total:,} clips in {npy}; those without tokens stand in emocache.json"
    out.print(text, highlight=False, soft_wrap=True)
    return DONE


@store_app.command("import")
@verb
def store_import(
    store: StoreArgument,
    hdf5: Annotated[
        Path | None, typer.Option("--hdf5", help="File from `store export --hdf5`.")
    ] = None,
    npy: Annotated[
        Path | None,
        typer.Option(
            "--npy",
            help="Folder of one .npy a clip, of unknown origin; needs --spec,"
            " --manifest and --name.",
        ),
    ] = None,
    spec: Annotated[
        str | None, typer.Option("--spec", help="What the .npy files are said to be: v2/audio")
    ] = None,
    manifest: ManifestLookup = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the .npy files' unknown encoder run.")
    ] = None,
) -> int:
    """Take in an exported HDF5 file, or .npy files whose origin stays marked as unknown."""
    from cache.hdf5 import import_hdf5, inspect_hdf5
    from cache.manifest import read_manifest
    from cache.npy import import_npy
    from cache.store import TokenStore
    from eval.progress import progress_bar
    from eval.verbs.arguments import one_of, spec_of

    one_of("--hdf5 FILE", hdf5, "--npy FOLDER", npy)
    if hdf5 is not None:
        contents = inspect_hdf5(hdf5)  # before a store is created for a file that is none of ours
        total = sum(counts.total() for _, counts in contents)
        with progress_bar(err, "importing", total, "clips") as bar:
            report = import_hdf5(hdf5, TokenStore.open_or_create(store), on_clip=bar.advance)
        for line in report.damaged:
            err.print(f"damaged, left out: {line}", markup=False, soft_wrap=True)
        new = sum(report.imported.values())
        out.print(
            f"{new:,} clips imported, {report.n_known:,} were there, {report.n_different:,} of them with "
            "other tokens than in the file",
            highlight=False,
            soft_wrap=True,
        )
        return FINDINGS if report.damaged or report.n_different else DONE
    assert npy is not None
    if spec is None or manifest is None or name is None:
        raise SchemaError(
            "--npy needs --spec PRESET/INPUT (what the files are said to be), --manifest and --name."
        )
    declared, records = spec_of(spec), read_manifest(manifest).records
    with progress_bar(err, "importing", 0, "files") as bar:
        done = import_npy(
            npy, TokenStore.open_or_create(store), declared, records, {}, name=name,
            on_clip=bar.advance,
        )  # fmt: skip
    for file, reason in done.failures.items():
        err.print(f"recorded as failed, {file}: {reason}", markup=False, soft_wrap=True)
    out.print(
        f"{done.imported.total():,} clips imported under {done.spec.stream} spec {done.spec.spec_id} "
        f"(origin unknown), {done.n_known:,} were there, {done.n_without_file:,} records have no file",
        highlight=False,
        soft_wrap=True,
    )
    return FINDINGS if done.failures else DONE
