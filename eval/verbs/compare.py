"""`emocache compare`: runs against one another on the same items."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cache.errors import SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.run_options import ProtocolOption, WheelsOption


@verb
def compare_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_A RUN_B [RUN_C]...",
            help="Predictions files, folders of evaluations, benchmarks or runs, or results of "
            "`emocache judge`. The first is the reference.",
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Id of the benchmark, for files that do not name it; default: every set in them."
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help="What to call the runs, comma-separated; default: their paths."),
    ] = None,
    protocol: ProtocolOption = "paper",
    reading: Annotated[
        str | None, typer.Option(help="What of a reply is compared: raw, tag, label, last-word.")
    ] = None,
    truths: Annotated[
        Path | None, typer.Option(help="True labels: csv, jsonl or npz; needs --task.")
    ] = None,
    wheels: WheelsOption = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Which splits or modes count. Repeatable.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Truths without a reply count as wrong.")
    ] = False,
    n_samples: Annotated[
        int, typer.Option("--samples", min=100, help="Bootstrap samples of the intervals.")
    ] = 1000,
    n_swaps: Annotated[
        int, typer.Option("--swaps", min=100, help="Random swaps of the permutation tests.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and swaps.")] = 0,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for compare.html, compare.md and compare.json."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of the table.")
    ] = False,
) -> int:
    """Compare runs on the same clips: differences with intervals, paired tests, what changed."""
    from eval.benchmarks import check_protocol
    from eval.progress import progress_bar
    from eval.results.compare import compare
    from eval.results.judged_sides import is_judged, read_judged_run
    from eval.results.sides import read_run, unique_names

    called = [name.strip() for name in names.split(",")] if names else unique_names(paths)
    if len(called) != len(paths) or len(set(called)) != len(called) or not all(called):
        raise SchemaError(
            f"--names {names}: {len(paths)} runs need {len(paths)} different names. For example --names "
            "full,silent"
        )
    checked = check_protocol(protocol)
    with progress_bar(err, "reading", len(paths), "runs") as bar:
        runs = []
        for path, name in zip(paths, called, strict=True):
            if is_judged(path):
                runs.append(read_judged_run(path, name))
                bar.advance(1)
                continue
            runs.append(
                read_run(
                    path, name=name, task=task, protocol=checked, reading=reading, truths=truths,
                    wheels=wheels, splits=split, allow_missing=allow_missing,
                )
            )  # fmt: skip
            bar.advance(1)
    with progress_bar(err, "comparing", len(runs[0].sides), "sets") as bar:
        found = compare(
            runs,
            n_samples=n_samples,
            n_swaps=n_swaps,
            seed=seed,
            on_set=lambda _name: bar.advance(1),
        )
    if as_json:
        out.file.write(found.model_dump_json(indent=2) + "\n")
    else:
        from eval.results.compare_page import caption, comparison_table

        out.print(comparison_table(found))
        out.print(caption(found), markup=False, highlight=False)
    for finding in found.findings:
        err.print(finding, markup=False, highlight=False, soft_wrap=True)
    if out_dir is not None:
        from eval.results.compare_page import write_comparison

        created = datetime.now(UTC).isoformat(timespec="seconds")
        for path in write_comparison(found, out_dir, created):
            (err if as_json else out).print(str(path), highlight=False, soft_wrap=True)
    return FINDINGS if found.findings else DONE
