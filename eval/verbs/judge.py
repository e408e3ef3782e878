"""`emocache judge ...`: rate reasoning with a judge model behind an endpoint, or without one by words."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.extract_options import takes

if TYPE_CHECKING:
    from rich.table import Table

    from eval.judging.panel import JudgeOptions
    from eval.judging.results import EmerScore, Judge, LexicalScore, MmeScore, Repeated
    from extract.annotate.endpoints.transport import EndpointOptions

_JUDGE = "The judge"
_LIMITS = "Limits"
_STEPS = "The step agent"

judge_app = typer.Typer(
    no_args_is_help=True,
    help="Rate what a model wrote about clips: EMER and MME-Emotion with a judge model, or the plain "
    "overlap of words.",
)


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What is judged."""

    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help="predictions.jsonl, or JSON lines or CSV with id and reply.",
            show_default=False,
        ),
    ]
    name: Annotated[
        str | None, typer.Option(help="Name of the model in tables; default: the run.")
    ] = None
    asked: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Which replies of a predictions file with several tasks: reason, think, ...",
        ),
    ] = None
    split: Annotated[
        str | None, typer.Option(help="Of references in a manifest, the records to take.")
    ] = None
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="Leave out, count and tell what has no prediction; else refuse."
        ),
    ] = False
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the result. Default: `judged` beside PREDICTIONS."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What descriptions are compared with."""

    references: Annotated[
        Path,
        typer.Option(
            help="Reference descriptions: JSON lines or CSV with id and description, or a manifest."
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class JudgeFlags:
    """Who judges, and how."""

    endpoint: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="OpenAI-compatible API with its version, e.g. https://api.openai.com/v1.",
            rich_help_panel=_JUDGE,
        ),
    ]
    model: Annotated[
        str,
        typer.Option(
            help="Name of the judge, best with its version: gpt-4o-2024-11-20.",
            rich_help_panel=_JUDGE,
        ),
    ]
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable with the key; none: the server needs none. Default: OPENAI_API_KEY, "
            "and none for a server on this machine.",
            rich_help_panel=_JUDGE,
        ),
    ] = None
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Judge so often.", rich_help_panel=_JUDGE)
    ] = 1
    temperature: Annotated[
        str,
        typer.Option(
            metavar="NUMBER",
            help="Of the judge's answers; server: leave it out, as some models demand.",
            rich_help_panel=_JUDGE,
        ),
    ] = "0"
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of own prompt files.", rich_help_panel=_JUDGE),
    ] = None
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where answers are kept and found again; may be shared. Default: `answers` in --out.",
            rich_help_panel=_JUDGE,
        ),
    ] = None
    retry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTCOME",
            help="Ask again what was answered so: refused, empty, truncated, all. Repeatable.",
            rich_help_panel=_JUDGE,
        ),
    ] = None
    in_flight: Annotated[
        int, typer.Option(min=1, max=1000, help="Requests at one time.", rich_help_panel=_LIMITS)
    ] = 8
    max_requests: Annotated[
        int | None,
        typer.Option(min=0, help="Stop after so many requests.", rich_help_panel=_LIMITS),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Stop after so many tokens in and out, in all.", rich_help_panel=_LIMITS
        ),
    ] = None
    requests_per_minute: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help="Longest time for one request.", rich_help_panel=_LIMITS),
    ] = "300s"


@dataclass(frozen=True, kw_only=True)
class MmeOptions:
    """What MME-Emotion needs beside the judge."""

    samples: Annotated[
        Path,
        typer.Option(
            help="JSON lines or CSV with id, task, label, and clue and media where known; or a manifest."
        ),
    ]
    task: Annotated[
        str | None,
        typer.Option(
            help="Task of samples that name none: er-lab, er-wild, noise-er, fg-er, ml-er, sa, fg-sa, ir."
        ),
    ] = None
    media_root: Annotated[
        Path | None, typer.Option(help="Folder of the media, if not that of the samples.")
    ] = None
    frames: Annotated[
        int,
        typer.Option(min=0, max=10, help="Most pictures of a clip that the judge sees; 0: none."),
    ] = 10
    alpha: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Weight of recognition in CoT-S.")
    ] = 0.5
    decoders: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode media; default: all cores.")
    ] = None
    step_model: Annotated[
        str, typer.Option(help="Name of the step agent's model.", rich_help_panel=_STEPS)
    ] = "gpt-4.1"
    step_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where it is, if not at --endpoint.", rich_help_panel=_STEPS
        ),
    ] = None
    step_api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its key, if not --api-key-env.", rich_help_panel=_STEPS),
    ] = None


@judge_app.command("emer")
@verb
@takes(FileOptions, ReferenceOptions, JudgeFlags)
def judge_emer_command(files: FileOptions, given: ReferenceOptions, flags: JudgeFlags) -> int:
    """Rate clue overlap and label overlap with reference descriptions, 1 to 10 (EMER, Table 5)."""
    from eval.judging.emer import judge_emer, n_questions
    from eval.judging.sources import read_references
    from eval.progress import progress_bar

    options = _options(files, flags)
    n = n_questions(len(read_references(given.references, files.split)), flags.repeats)
    with progress_bar(err, "judging", n, "answers") as bar:
        score = judge_emer(
            files.predictions,
            given.references,
            options,
            name=files.name,
            asked=files.asked,
            split=files.split,
            allow_missing=files.allow_missing,
            on_answers=bar.advance,
        )
    return _finish(score, files, _emer_table(score))


@judge_app.command("mme-emotion")
@verb
@takes(FileOptions, MmeOptions, JudgeFlags)
def judge_mme_command(files: FileOptions, own: MmeOptions, flags: JudgeFlags) -> int:
    """Mark the steps of replies: Rec-S, Rea-S and CoT-S (MME-Emotion, Table 6)."""
    from eval.judging.mme import judge_mme, n_questions
    from eval.judging.sources import read_samples
    from eval.progress import progress_bar
    from extract.config import n_cores

    options = _options(files, flags)
    sources: dict[str, Any] = {
        "task": own.task, "media_root": own.media_root, "split": files.split
    }  # fmt: skip
    n = n_questions(len(read_samples(own.samples, **sources)), flags.repeats)
    elsewhere = None
    if own.step_endpoint is not None or own.step_api_key_env is not None:
        elsewhere = _endpoint(
            flags,
            own.step_endpoint or flags.endpoint,
            own.step_api_key_env or flags.api_key_env,
            "--step-endpoint",
        )
    with progress_bar(err, "judging", n, "answers") as bar:
        score = judge_mme(
            files.predictions,
            own.samples,
            options,
            step_model=own.step_model,
            step_endpoint=elsewhere,
            name=files.name,
            asked=files.asked,
            frames=own.frames,
            alpha=own.alpha,
            allow_missing=files.allow_missing,
            n_decoders=own.decoders or n_cores(),
            on_answers=bar.advance,
            **sources,
        )
    return _finish(score, files, _mme_table(score))


@judge_app.command("lexical")
@verb
@takes(FileOptions, ReferenceOptions)
def judge_lexical_command(files: FileOptions, given: ReferenceOptions) -> int:
    """Compare words with reference descriptions: free, offline, and no judge."""
    from eval.judging.lexical import lexical_overlap

    score = lexical_overlap(
        files.predictions,
        given.references,
        name=files.name,
        asked=files.asked,
        split=files.split,
        allow_missing=files.allow_missing,
    )
    return _finish(score, files, _lexical_table(score))


def _folder(files: FileOptions) -> Path:
    return files.out_dir or files.predictions.parent / "judged"


def _options(files: FileOptions, flags: JudgeFlags) -> JudgeOptions:
    from cache.schema import decode
    from eval.judging.panel import JudgeOptions
    from extract.annotate.endpoints.answers import retried_outcomes

    retry = tuple(flags.retry or ())
    retried_outcomes(retry)  # refuses a misspelt one before anything is asked
    return decode(
        JudgeOptions,
        {
            "endpoint": _endpoint(flags, flags.endpoint, flags.api_key_env, "--endpoint"),
            "model": flags.model,
            "repeats": flags.repeats,
            "temperature": _temperature(flags.temperature),
            "prompts": flags.prompts,
            "answers": flags.answers or _folder(files) / "answers",
            "retry": retry,
        },
        "judge",
    )


def _endpoint(flags: JudgeFlags, url: str, key_env: str | None, option: str) -> EndpointOptions:
    from cache.schema import decode
    from eval.verbs.arguments import duration_s
    from extract.annotate.endpoints.transport import NO_KEY, EndpointOptions

    return decode(
        EndpointOptions,
        {
            "base_url": url,
            "api_key_env": key_env or (NO_KEY if _is_here(url) else "OPENAI_API_KEY"),
            "in_flight": flags.in_flight,
            "deadline_s": duration_s(flags.deadline, "--deadline"),
            "requests_per_minute": flags.requests_per_minute,
            "tokens_per_minute": flags.tokens_per_minute,
            "caps": {"requests": flags.max_requests, "tokens": flags.max_tokens},
        },
        option,
    )


def _is_here(url: str) -> bool:
    """Whether a server is on this machine: it needs no key, and must not be told one by default."""
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _temperature(text: str) -> float | None:
    if text == "server":
        return None
    try:
        return float(text)
    except ValueError:
        raise SchemaError(
            f"--temperature {text}: neither a number from 0 to 2 nor 'server'."
        ) from None


def _finish(score: EmerScore | MmeScore | LexicalScore, files: FileOptions, table: Table) -> int:
    """Write and print a result; what is not fit for a table as it stands is a finding."""
    from cache.files import write_text_aside
    from eval.judging.results import LexicalScore

    folder = _folder(files)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{score.kind}.json"
    write_text_aside(path, score.model_dump_json(indent=2) + "\n")
    found = dict(score.reasons)
    is_whole = "no prediction" not in found and "no picture for the judge" not in found
    if not isinstance(score, LexicalScore):
        is_whole &= not score.unread and score.judge.problem() is None
    if files.as_json:
        out.file.write(score.model_dump_json(indent=2) + "\n")
    else:
        out.print(table)
        if not isinstance(score, LexicalScore):
            out.print(_who(score.judge), markup=False, highlight=False, soft_wrap=True)
        out.print(str(path), highlight=False, markup=False, soft_wrap=True)
    for reason, n in found.items():
        err.print(f"{n:,} x {reason}", markup=False, highlight=False, soft_wrap=True)
    for note in score.notes:
        err.print(note, markup=False, highlight=False, soft_wrap=True)
    return DONE if is_whole else FINDINGS


def _who(judge: Judge) -> str:
    text = f"judge: {judge.model} ({judge.version}); prompts: {', '.join(judge.prompts)}"
    if judge.step_model is not None:
        versions = " + ".join(judge.step_versions) or "version not told"
        text += f"; step agent: {judge.step_model} ({versions}); pictures: {judge.frames}"
    return text


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _emer_table(score: EmerScore) -> Table:
    table = _table(
        f"EMER: {score.name}", "overlap", "mean", "spread over repeats", "error over clips",
        "rated / offered",
    )  # fmt: skip
    for name, found in (("clue", score.clue), ("label", score.label)):
        table.add_row(name, *_numbers(found, 1.0), f"{found.n:,} / {score.offered:,}")
    return table


def _mme_table(score: MmeScore) -> Table:
    table = _table(
        f"MME-Emotion: {score.name}", "%", "Rec-S", "Rea-S", "CoT-S", "steps", "length",
        "scored / offered",
    )  # fmt: skip
    parts = (score.rec, score.rea, score.cot)
    table.add_row(
        "all samples",
        *(_number(part.mean, 100.0) for part in parts),
        _number(score.steps, 1.0),
        _number(score.tokens, 1.0),
        f"{score.rec.n:,} / {score.offered:,}",
    )
    if score.repeats > 1:
        table.add_row("  spread over repeats", *(_number(part.spread, 100.0) for part in parts))
    table.add_row("  error over samples", *(_number(part.clip_error, 100.0) for part in parts))
    for task, found in score.tasks.items():
        table.add_row(
            task,
            *(_number(value, 100.0) for value in (found.rec, found.rea, found.cot)),
            _number(found.steps, 1.0),
            "",
            f"{found.scored:,} / {found.offered:,}",
        )
    return table


def _lexical_table(score: LexicalScore) -> Table:
    table = _table(
        f"Lexical overlap, no judge: {score.name}", "words, %", "mean", "scored / offered"
    )
    for name, value in (
        ("precision", score.precision),
        ("recall", score.recall),
        ("F1", score.f1),
        ("F1 of the longest common subsequence", score.lcs_f1),
    ):
        table.add_row(name, _number(value, 100.0), f"{score.scored:,} / {score.offered:,}")
    return table


def _numbers(found: Repeated, unit: float) -> tuple[str, ...]:
    return tuple(_number(v, unit) for v in (found.mean, found.spread, found.clip_error))


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{unit * value:.2f}"
