"""`emocache benchmark`: a run on the sets of MMEVerse-Bench, from cached tokens to a report."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import ManifestError, SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.run_options import (
    JudgedOption,
    ProtocolOption,
    StageOption,
    WeightsOption,
    WheelsOption,
)
from eval.verbs.train import ManifestOption, Overrides, StoreOption

SCORES_FILE = "scores.json"
"""What `emocache score --task all --json` prints, beside the predictions."""

if TYPE_CHECKING:
    from cache.manifest import Manifest
    from eval.benchmarks import Benchmark
    from eval.judging.results import EmerScore, LexicalScore, MmeScore
    from eval.scoring.wheels import Wheels


@verb
def benchmark_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    manifest: ManifestOption,
    store: StoreOption,
    overrides: Overrides = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Id of a set, such as dfew; repeatable. Default: all in the manifest."),
    ] = None,
    protocol: ProtocolOption = "paper",
    wheels: WheelsOption = None,
    reasoning: Annotated[
        bool,
        typer.Option("--reasoning", help="Ask for reasoning and label, where a task has both."),
    ] = False,
    likelihoods: Annotated[
        bool,
        typer.Option("--likelihoods", help="Score every offered label too, beside the free reply."),
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Ask about so many items of each set only.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips per batch.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 200,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Ask the I-th of N parts, from 0; default: torchrun's or srun's rank.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Default: RUN/benchmark; the same one continues.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
    ] = "auto",
    weights: WeightsOption = "final",
    stage: StageOption = None,
    judged: JudgedOption = None,
) -> int:
    """Ask a run about MMEVerse-Bench, score it and lay it out; run again to continue."""
    from cache.manifest import media_root, read_manifest
    from cache.store import TokenStore
    from eval.asking.ask import ask_benchmarks
    from eval.benchmarks import check_protocol
    from eval.generate import load_run
    from eval.judging.results import read_judged
    from eval.progress import progress_bar
    from eval.verbs.arguments import check_device, one_of_these
    from train.running.parallel import choose_device

    checked = check_protocol(protocol)
    which = one_of_these("--weights", weights, ("final", "best"))
    if device != "auto":
        check_device(device)
    part = _shard(shard)
    reasoned = tuple(read_judged(path) for path in judged or ())
    records = read_manifest(manifest)
    rows = _chosen(task or [], [name for r in records.records for name in r.benchmarks])
    tables = _wheels_for(rows, wheels)
    tokens = TokenStore.open(store)
    trained = load_run(
        run_dir, str(choose_device(device)), overrides or [], which, records.header, stage
    )
    folder = out_dir or run_dir / ("benchmark" if stage is None else f"benchmark-{stage}")
    n = sum(
        min(sample or row.n, sum(row.id in r.benchmarks for r in records.records)) for row in rows
    )
    with progress_bar(err, "asking", n, "replies") as bar:
        asked = ask_benchmarks(
            trained,
            tokens,
            records,
            [row.id for row in rows],
            folder,
            reasoning=reasoning,
            likelihoods=likelihoods,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            shard=part,
            sample=sample,
            on_replies=bar.advance,
        )
    if asked is None:
        out.print(
            f"shard {part[0]} of {part[1]} is done; when all are, the last one scores {folder}",
            highlight=False,
            soft_wrap=True,
        )
        return DONE
    media = media_root(records, manifest)
    return _score(asked, checked, tables, folder, records, media, reasoned)


def _shard(given: str | None) -> tuple[int, int]:
    """Return which part of how many this process asks: as given, or its rank."""
    if given is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, slash, total = given.partition("/")
    if not slash or not number.isdigit() or not total.isdigit() or int(number) >= int(total):
        raise SchemaError(
            f"--shard {given}: not I/N with I from 0 to N-1, such as 0/4 for the first of four parts."
        )
    return int(number), int(total)


def _chosen(given: Sequence[str], there: Sequence[str]) -> tuple[Benchmark, ...]:
    """Return the sets to ask about: those given, or all that the manifest has records of."""
    from eval.benchmarks import benchmark, benchmarks

    known = set(there)
    for name in given:
        row = benchmark(name)
        if name not in known:
            here = ", ".join(n for n in benchmarks() if n in known) or "none"
            raise ManifestError(
                f"--task {name}: no record of the manifest counts for it (there are: {here}). Index corpus "
                f"'{row.corpus}' with its labels, and merge: emocache index {row.corpus} ...; emocache "
                "corpus merge"
            )
    if not known:
        raise ManifestError(
            "no record of the manifest counts for a set of MMEVerse-Bench. Records of known corpora are "
            "marked when they are indexed: emocache index meld DIR ... (emocache corpus ls lists them)."
        )
    wanted = set(given) or known
    return tuple(row for row in benchmarks().values() if row.id in wanted)


def _wheels_for(rows: Sequence[Benchmark], folder: Path | None) -> Wheels | None:
    """Read the wheel tables before anything is asked, if a set needs them."""
    from eval.benchmarks import WHEEL_METRICS
    from eval.scoring.wheels import Wheels, wheels_folder

    if not any(row.metric in WHEEL_METRICS for row in rows):
        return None
    return Wheels.load(wheels_folder(folder))


def _score(
    asked: Path,
    protocol: str,
    tables: Wheels | None,
    folder: Path,
    records: Manifest,
    media: Path,
    judged: tuple[EmerScore | MmeScore | LexicalScore, ...],
) -> int:
    """Score what was asked, and write scores and report beside it."""
    from datetime import UTC, datetime

    from cache.files import write_text_aside
    from eval.asking.ask import SKIPPED_FILE
    from eval.results.data import ResultsData
    from eval.results.page import browse_examples, run_scores, write_results
    from eval.results.pictures import ClipFile
    from eval.scoring.score import score_all
    from eval.verbs.score import as_json, print_notes, print_tables

    unscored: dict[str, str] = {}
    scored = score_all(asked, protocol=protocol, wheels=tables, unscored=unscored)
    write_text_aside(folder / SCORES_FILE, as_json(scored, is_all=True, unscored=unscored))
    run = run_scores(next(iter(scored.values())).result.run or folder.name, scored)
    files = {
        r.uid: ClipFile(media / r.media, r.media, r.sha256)
        for r in records.records
        if r.benchmarks and (media / r.media).is_file()
    }
    left_out = [*_skipped(folder / SKIPPED_FILE), *unscored.values()]
    written = write_results(
        ResultsData(
            title="Results on MMEVerse-Bench",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            runs=(run,),
            examples=browse_examples([run], files=files),
            judged=judged,
            notes=tuple(left_out),
        ),
        folder,
    )
    print_tables(scored)
    print_notes(scored)
    for note in left_out:
        err.print(note, markup=False, highlight=False, soft_wrap=True)
    for path in (asked, folder / SCORES_FILE, *written):
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return FINDINGS if left_out else DONE


def _skipped(path: Path) -> list[str]:
    """Say per set and reason how many items were not asked about."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = Counter((row["benchmark"], row["reason"]) for row in rows)
    return [
        f"{name}: {n} items were not asked about ({reason}); {path.name} lists them"
        for (name, reason), n in counts.items()
    ]
