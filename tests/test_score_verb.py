"""`emocache score` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import emocache
from eval.benchmarks import benchmarks
from eval.predictions import write_predictions
from eval.scoring.result import BenchmarkScore
from eval.verbs import console
from tests.scoring_rows import own, rows_of, write
from tests.wheel_tables import write_wheels


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMOCACHE_WHEELS", raising=False)
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 200)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = emocache.main(["score", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of a refusal, which leaves nothing on stdout."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("emocache: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = rows_of([("happy", "happy"), ("sad", "<answer>sad</answer>"), ("sad", "glum")])
    rows.append({"video_id": "x", "answer": "sad", "response": "sad", "mode": "train"})
    return write(tmp_path / "predictions.jsonl", rows)


def test_json_is_one_document_with_all_that_was_promised(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, file, "--task", "dfew", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["task"] == "dfew"
    assert found["protocol"] == "paper"
    assert found["metric"] == "accuracy"
    assert found["score"] == pytest.approx(2 / 3)
    assert found["parts"] == {"happy": 1, "sad": 0.5}
    assert found["counts"] == {
        "offered": 4,
        "scored": 3,
        "skipped": 1,
        "reasons": {"mode train": 1},
        "published": 2341,
    }
    assert found["other_protocols"] == {"released": pytest.approx(1 / 3)}
    BenchmarkScore.model_validate(found)
    # What a reader must know stands on the other channel.
    assert "dfew: 3 items are of this set, Table 2 counts 2,341" in err


def test_the_table_says_scored_offered_and_published(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, file, "--task", "dfew")
    assert code == 0
    assert "protocol paper, reading tag: accuracy, in percent" in out
    columns, _, values = (line.split() for line in out.splitlines()[2:5])
    assert columns[-3:] == ["scored", "offered", "published"]
    assert values == ["dfew", "accuracy", "66.67", "0.00-100.00", "3", "4", "2,341"]
    assert "not scored: mode train 1" in out
    assert "other protocols: released 33.33" in out
    assert "off_list  v2  'glum'  (truth sad)" in out


def test_a_protocol_a_reading_and_splits_may_be_chosen(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(*options: str) -> Any:
        code, out, _ = run(capsys, file, "--task", "dfew", "--json", *options)
        assert code == 0
        return json.loads(out)["score"]

    assert scored("--protocol", "released") == pytest.approx(1 / 3)
    assert scored("--protocol", "released", "--reading", "tag") == pytest.approx(2 / 3)
    assert scored("--split", "train") == 1
    assert scored("--split", "train,test") == scored("--split", "all") == 0.75


def test_all_scores_every_set_of_a_file_and_averages_what_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for row in benchmarks().values():
        truths = {"emotion_multi": ("anger", "fear"), "emotion_ov": ("happy", "sad")}.get(row.field)
        truth = None if truths else "positive" if row.field == "sentiment" else "happy"
        # Half of them right, whatever the metric of single labels.
        for number, reply in enumerate((truth or ", ".join(truths or ()), "x")):
            lines.append(
                own(
                    f"{row.corpus}/{row.id}-{number}", reply, task=row.task, benchmark=row.id,
                    truth=truth, truths=truths or (),
                )
            )  # fmt: skip
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, lines)
    tables = write_wheels(tmp_path / "wheels")
    code, out, _ = run(capsys, path, "--task", "all", "--wheels", tables, "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["tasks"]) == list(benchmarks())
    scores = {name: one["score"] for name, one in found["tasks"].items()}
    assert scores["dfew"] == scores["mer2023"] == 0.5
    assert scores["mosi"] == pytest.approx(2 / 3)
    nine = [scores[name] for name, row in benchmarks().items() if row.unibench]
    assert found["averages"] == {
        "avg-9": pytest.approx(sum(nine) / 9),
        "avg-18": pytest.approx(sum(scores.values()) / 18),
    }
    code, out, _ = run(capsys, path, "--task", "all", "--wheels", tables)
    assert [line.split()[0] for line in out.splitlines()[4:24]] == [
        *benchmarks(),
        "avg-9",
        "avg-18",
    ]
    assert "--truths and --allow-missing are for one set" in refused(
        capsys, path, "--task", "all", "--truths", path
    )


def test_the_wheels_may_be_named_by_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "p.jsonl", rows_of([("happy", "joyful, x"), ("sad", "furious")]))
    assert "need the emotion wheel tables" in refused(capsys, path, "--task", "meld-e")
    monkeypatch.setenv("EMOCACHE_WHEELS", str(write_wheels(tmp_path / "wheels")))
    code, out, err = run(capsys, path, "--task", "meld-e", "--json")
    found = json.loads(out)
    assert (code, found["score"]) == (0, 0.5)
    assert found["parts"] == {f"wheel{number}": 0.5 for number in range(1, 6)}
    # They are not the published ones, and the digests are told.
    assert found["wheels"]["published"] is False
    assert f"wheel1.xlsx {found['wheels']['files']['wheel1.xlsx']}" in err


def test_refusals_are_one_line_and_exit_code_2(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown benchmark 'dfe'" in refused(capsys, file, "--task", "dfe", "--json")
    assert "unknown protocol 'upstream'" in refused(
        capsys, file, "--task", "dfew", "--protocol", "upstream"
    )
    assert "unknown reading" in refused(capsys, file, "--task", "dfew", "--reading", "x")
    assert "cannot be read" in refused(capsys, tmp_path / "none.jsonl", "--task", "dfew")
    assert "no such folder" in refused(
        capsys, file, "--task", "meld-e", "--wheels", tmp_path / "nowhere"
    )
    truths = tmp_path / "truths.csv"
    truths.write_text("video_id,answer\nv0,happy\nv1,sad\nv9,sad\n", encoding="utf-8")
    missing = refused(capsys, file, "--task", "dfew", "--truths", truths, "--json")
    assert "no prediction for 1 of the true ids: 1 (v9)" in missing
    code, out, err = run(
        capsys, file, "--task", "dfew", "--truths", truths, "--allow-missing", "--json"
    )
    found = json.loads(out)
    assert (code, found["score"]) == (0, pytest.approx(2 / 3))
    assert "counted as wrong: 1 (v9)" in err
    assert "hence not scored: 1 (v2)" in err
    assert emocache.main(["score", str(file)]) == 2  # without --task


def test_a_report_is_written_beside_the_scores(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, file, "--task", "dfew", "--json", "--report", tmp_path / "report")
    assert code == 0
    assert json.loads(out)["task"] == "dfew"
    pages = [Path(line) for line in err.splitlines() if line.endswith(".html")]
    (page,) = pages
    assert page.parent == tmp_path / "report"
    assert "66.67" in page.read_text(encoding="utf-8")


def test_scoring_loads_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", rows_of([("happy", "happy")]))
    tables = write_wheels(tmp_path / "wheels")
    script = (
        "import sys, emocache\n"
        "code = emocache.main(sys.argv[1:])\n"
        "heavy = ('torch', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'transformers', 'zarr', 'pyarrow')\n"
        "print([name for name in heavy if name in sys.modules], code, file=sys.stderr)\n"
    )
    arguments = ["score", str(path), "--task", "meld-e", "--wheels", str(tables)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(emocache.__file__).parent,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[] 0"
    assert "100.00" in done.stdout
