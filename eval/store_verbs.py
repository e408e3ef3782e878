"""`emocache store ...`: look into a store, check it, clean it, copy it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from eval.console import DONE, FINDINGS, err, out, verb

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
    from eval.arguments import configure
    from eval.tables import plan_table
    from extract.plan import make_plan

    opened = TokenStore.open(store)
    chosen = configure(preset, overrides)
    records = read_manifest(manifest).records
    plan = make_plan(records, chosen.tokens.all(), opened, retry_failed=retry_failed)
    out.print(plan_table(plan))
    for stream, served in plan.served.items():
        for spec_id, n in served.items():
            out.print(f"{stream}: {n:,} clips come from the richer spec {spec_id}", highlight=False)
    return DONE


@store_app.command("diff")
@verb
def store_diff(
    first: Annotated[str, typer.Argument(metavar="SPEC_A", help="PRESET/STREAM, spec_id or file")],
    second: Annotated[str, typer.Argument(metavar="SPEC_B")],
    store: Annotated[
        str | None, typer.Option("--store", help="Store in which spec_ids are looked up.")
    ] = None,
) -> int:
    """Print the fields in which two specs differ, and nothing else; exit code 1 if there are any."""
    from cache.spec import differences
    from cache.store import TokenStore
    from eval.arguments import spec_of

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
    from eval.arguments import configure
    from eval.tables import garbage_table

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
    from eval.arguments import spec_of
    from eval.progress import progress_bar
    from eval.report import human_size

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
    from eval.arguments import compression_of, spec_of
    from eval.progress import progress_bar
    from eval.report import human_size

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
