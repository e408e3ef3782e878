from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache.errors import PredictionError
from eval.parse import parse_reply
from eval.predictions import Prediction, read_predictions, write_predictions

DOCUMENT = Path(__file__).parent.parent / "docs" / "predictions.md"


def prediction(**changes: object) -> Prediction:
    fields: dict[str, object] = {
        "uid": "meld/dia1_utt3",
        "task": "emotion",
        "masked": ("audio",),
        "reply": "Joy.",
        "label": "joy",
        "parse": "exact",
        "truth": "joy",
        "run": "demo-seed0",
        "spec_ids": {"audio": "whisper-3f2a"},
    }
    return Prediction.model_validate(fields | changes)


def example_lines() -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.split("```jsonl\n")[1].split("```")[0].splitlines()


def test_the_documented_example_reads_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(example_lines()) + "\n", encoding="utf-8")
    full, masked = read_predictions(path)
    assert (full.uid, full.task, full.masked) == ("meld/dia1_utt3", "think", ())
    assert (full.label, full.parse, full.truth, full.run) == ("joy", "tag", "joy", "demo-seed0")
    assert full.spec_ids["image"] == "eva-g-04e6aa51"
    assert (masked.masked, masked.label, masked.parse) == (("audio",), None, "off_list")
    for row in (full, masked):
        parsed = parse_reply(row.reply, ["joy", "sad"])
        assert (parsed.label, parsed.how) == (row.label, row.parse)


def test_the_document_names_every_field() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in Prediction.model_fields if f"| `{name}` |" not in text] == []


@given(
    reply=st.text(),
    uid=st.text(min_size=1),
    masked=st.lists(st.sampled_from(["audio", "video", "image"]), unique=True),
    truth=st.none() | st.text(min_size=1),
    spec_ids=st.dictionaries(st.text(min_size=1), st.text(min_size=1)),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    reply: str,
    uid: str,
    masked: list[str],
    truth: str | None,
    spec_ids: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("rows") / "predictions.jsonl"
    rows = [
        prediction(
            reply=reply, uid=uid, masked=masked, truth=truth, spec_ids=spec_ids, task=f"task{i}"
        )
        for i in range(2)
    ]
    assert write_predictions(path, rows) == 2
    assert read_predictions(path) == rows


def test_the_order_of_masked_streams_has_no_meaning() -> None:
    assert prediction(masked=["video", "audio"]) == prediction(masked=["audio", "video"])
    with pytest.raises(ValidationError, match="listed twice"):
        prediction(masked=["audio", "audio"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uid": None}, r"'uid': .*got None"),
        ({"uid": ""}, r"'uid': .*got ''"),
        ({"schema_version": 5}, r"'schema_version': Input should be 1, 2, 3 or 4 \(got 5\)"),
        ({"labels": ["joy"]}, r"label is 'joy' and labels are \['joy'\]"),
        (
            {"label": None, "labels": ["joy"], "parse": "empty"},
            r"label is None but parse is 'empty'",
        ),
        ({"parse": "fuzzy"}, r"'parse': .*'off_list'.*got 'fuzzy'"),
        ({"label": None}, r"label is None but parse is 'exact'"),
        ({"parse": "empty"}, r"label is 'joy' but parse is 'empty'"),
        ({"lable": "joy"}, r"unknown field 'lable'. Did you mean 'label'\?"),
        ({"masked": "audio"}, r"'masked': .*got 'audio'"),
        ({"spec_ids": {"audio": 3}}, r"'spec_ids.audio': .*got 3"),
        ({"reply": ["x" * 500]}, r"'reply': .*got \['x+…\)"),
    ],
)
def test_a_bad_line_names_file_line_and_field(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "predictions.jsonl"
    good = prediction().model_dump(mode="json")
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | changes)}\n", encoding="utf-8")
    with pytest.raises(PredictionError, match=rf"predictions\.jsonl, line 3: .*{message}"):
        read_predictions(path)


@pytest.mark.parametrize(
    "field", [name for name, field in Prediction.model_fields.items() if field.is_required()]
)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = tmp_path / "predictions.jsonl"
    row = prediction().model_dump(mode="json")
    del row[field]
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(PredictionError, match=f"line 1: missing field '{field}'"):
        read_predictions(path)


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff\xfe", b"null", b'{"uid": "a"} {}'])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(prediction().model_dump_json().encode() + b"\n" + line)
    with pytest.raises(PredictionError, match=r"predictions\.jsonl, line 2: "):
        read_predictions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"none\.jsonl: cannot read predictions"):
        read_predictions(tmp_path / "none.jsonl")


def test_duplicates_are_refused_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    line = prediction(masked=["audio", "video"]).model_dump_json()
    other = prediction(masked=["audio"]).model_dump_json()
    twin = line.replace('["audio","video"]', '["video","audio"]')
    path.write_text(f"{line}\n{other}\n{twin}\n", encoding="utf-8")
    with pytest.raises(
        PredictionError,
        match=r"line 3: uid 'meld/dia1_utt3', task 'emotion'.*"
        r"masked audio, video: already on line 1",
    ):
        read_predictions(path)
    with pytest.raises(PredictionError, match=r"line 2: .*already on line 1"):
        write_predictions(tmp_path / "new.jsonl", [prediction(), prediction()])


def test_a_failing_producer_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [prediction()])

    def failing() -> Iterator[Prediction]:
        yield prediction(uid="a/b")
        raise RuntimeError("model lost")

    with pytest.raises(RuntimeError, match="model lost"):
        write_predictions(path, failing())
    assert read_predictions(path) == [prediction()]
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]
