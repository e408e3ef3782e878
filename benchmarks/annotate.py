"""Annotation: what keeping N requests in flight costs beside a bare async client.

    python benchmarks/annotate.py --work DIR [--json F] [--quick]

A server in a process of its own answers after a fixed time. The bare client is the official library
with a semaphore: it keeps nothing, checks nothing and never tries again. Both ask the same questions,
turn by turn, so that a slow minute of the machine meets both. Then the same run again, with every
answer in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SCHEMA = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}
PROMPT = "Merge the clues of clip {i} into one description. " + "A clue about the clip. " * 60


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for caches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=100, help="requests per request in flight")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="show that it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats = 3, 1
    with server(options.latency_ms / 1000) as base_url:
        found = [measure(base_url, n, options) for n in options.in_flight]
    print(table(found, options))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


def measure(base_url: str, in_flight: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each repetition of each client, and of the run with a full cache."""
    n_questions = in_flight * options.rounds
    folder = options.work / f"answers-{in_flight}"
    clients: dict[str, Any] = {
        "bare": lambda: asyncio.run(ask_bare(base_url, in_flight, n_questions, raw=False)),
        "raw": lambda: asyncio.run(ask_bare(base_url, in_flight, n_questions, raw=True)),
        "ours": lambda: ask_ours(base_url, in_flight, n_questions, folder),
    }
    wall: dict[str, list[float]] = {name: [] for name in clients}
    cpu: dict[str, list[float]] = {name: [] for name in clients}
    again_s, again_requests = [], 0
    for repeat in range(-1, options.repeats):  # the first one warms up
        shutil.rmtree(folder, ignore_errors=True)
        # Turn by turn, each of them first as often as the others.
        names = list(clients)
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            seconds, cpu_s = timed(clients[name])
            if repeat >= 0:
                wall[name].append(seconds)
                cpu[name].append(cpu_s / n_questions * 1000)
        start = time.perf_counter()
        again_requests += ask_ours(base_url, in_flight, n_questions, folder)
        if repeat >= 0:
            again_s.append(time.perf_counter() - start)
    shutil.rmtree(folder)
    return {
        "in_flight": in_flight,
        "questions": n_questions,
        "wall_s": wall,
        "cpu_ms": {name: statistics.median(each) for name, each in cpu.items()},
        "ratios": {
            name: [ours / theirs for ours, theirs in zip(wall["ours"], wall[name], strict=True)]
            for name in ("bare", "raw")
        },
        "again_s": again_s,
        "again_requests": again_requests,
    }


def timed(work: Any) -> tuple[float, float]:
    """Return the wall time and the CPU time of this process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


async def ask_bare(base_url: str, in_flight: int, n_questions: int, *, raw: bool) -> None:
    """Ask with the library alone; `raw` reads the reply as JSON instead of the library's types."""
    import openai

    gate = asyncio.Semaphore(in_flight)
    form = {"type": "json_schema", "json_schema": {"name": "d", "schema": SCHEMA, "strict": True}}
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def ask(i: int) -> str:
            async with gate:
                body: dict[str, Any] = {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": PROMPT.format(i=i)}],
                    "temperature": 0.0,
                    "max_tokens": 512,
                    "seed": 0,
                    "response_format": form,
                }
                if raw:
                    reply = await client.chat.completions.with_raw_response.create(**body)
                    found = json.loads(reply.http_response.content)
                    return str(found["choices"][0]["message"]["content"])
                typed = await client.chat.completions.create(**body)
                return str(typed.choices[0].message.content)

        answers = await asyncio.gather(*(ask(i) for i in range(n_questions)))
    assert all(answers)


def ask_ours(base_url: str, in_flight: int, n_questions: int, folder: Path) -> int:
    """Ask through the client with a cache; return how many requests it made."""
    from extract.annotate.endpoints.answers import AnswerCache
    from extract.annotate.endpoints.endpoint import EndpointClient
    from extract.annotate.endpoints.questions import Question
    from extract.annotate.endpoints.transport import EndpointOptions

    options = EndpointOptions(base_url=base_url, api_key_env="none", in_flight=in_flight)
    questions = (
        Question("consolidate", "tiny", "benchmark@1", PROMPT.format(i=i), answer_schema=SCHEMA)
        for i in range(n_questions)
    )
    with EndpointClient(options, AnswerCache(folder)) as client:
        n_ok = sum(answer.ok for _, answer in client.ask_all(questions))
        assert n_ok == n_questions
        return client.report().requests


@contextmanager
def server(latency_s: float) -> Iterator[str]:
    """Run the tests' server in a process of its own and yield its base URL."""
    command = [sys.executable, "-m", "tests.chat_server", "--latency", str(latency_s)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:  # closes its input on leaving, which ends it
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        f"An answer takes {options.latency_ms:g} ms; {options.repeats} interleaved repetitions; {machine()}.",
        "",
        "| in flight | questions | client | wall, s | CPU per request, ms | emocache / this, median "
        "(least to most) |",
        "|---|---|---|---|---|---|",
    ]
    names = {"bare": "bare", "raw": "bare, untyped replies", "ours": "emocache"}
    for run in found:
        for key, name in names.items():
            ratios = run["ratios"].get(key)
            ratio = "" if ratios is None else spread(ratios)
            lines.append(
                f"| {run['in_flight']} | {run['questions']:,} | {name} "
                f"| {statistics.median(run['wall_s'][key]):.2f} | {run['cpu_ms'][key]:.2f} | {ratio} |"
            )
        lines.append(
            f"| {run['in_flight']} | {run['questions']:,} | emocache again, {run['again_requests']} "
            f"requests | {statistics.median(run['again_s']):.2f} | | |"
        )
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    """Return the median, the least and the greatest."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def machine() -> str:
    """Return what it ran on."""
    import openai

    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, openai {openai.__version__}"
    )


if __name__ == "__main__":
    main()
