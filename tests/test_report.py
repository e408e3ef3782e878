from __future__ import annotations

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from cache.clip import Clip, Record
from cache.errors import MissingDependencyError
from cache.manifest import Manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.evaluate import evaluate
from eval.formats import escape_markdown, excerpt, human_size, number, percent, points
from eval.metrics import score_single_label
from eval.plots import MAX_POINTS, Curve, draw_training
from eval.report.data import (
    Fact,
    OffListReply,
    Parsing,
    ReportData,
    ScoreRow,
    StoreRow,
)
from eval.report.history import HistoryRow, read_history, summarize_stages, training_curves
from eval.report.page import score_table, write_report
from eval.report.plots import draw_confusion
from tests.conftest import key_of, make_clip
from tests.training import described, header_of
from train.config import configure
from train.loop import train
from train.presets import demo

EVIL = '<script>alert("x")</script>'
LABELS = ["angry", "happy", "neutral", EVIL]


def report_data(**changes: object) -> ReportData:
    truths = ["angry"] * 40 + ["happy"] * 30 + ["neutral"] * 27 + [EVIL] * 3
    full = [*["angry"] * 33, *["happy"] * 32, *["neutral"] * 31, EVIL, None, None, None]
    masked = [*["angry"] * 15, *["happy"] * 52, *["neutral"] * 24, *[None] * 9]
    fields: dict[str, object] = {
        "title": "Emotion recognition on the demo corpus",
        "created": "2026-03-01T12:00:00+00:00",
        "preset": "demo",
        "run_path": "runs/demo-seed0",
        "weights": f"final, at the end of stage2 {EVIL}",
        "store_path": "stores/demo.zarr",
        "rows": (
            ScoreRow(name="all streams", scores=score_single_label(truths, full, LABELS)),
            ScoreRow(name="audio masked", scores=score_single_label(truths, masked, LABELS)),
            ScoreRow(name=f"[bold] {EVIL}", scores=score_single_label(truths, full, LABELS)),
        ),
        "history": [
            HistoryRow(
                stage=stage,
                step=step,
                loss=2.5 / (1 + step / 40) + 0.1 * math.sin(step),
                learning_rate=1e-4 * min(step / 50, 1) * math.cos(step / 330),
                clips_per_s=12.5,
                tokens_per_s=6500,
                data_wait=0.01 if step > 20 else 0.5,
                val_loss=None if step % 50 else 2.6 / (1 + step / 40) + max(0, step - 200) / 400,
                val_token_accuracy=None if step % 50 else step / 1000,
            )
            for stage in ("recognition", "recognition and reasoning")
            for step in range(10, 410, 10)
        ],
        "throughput": [
            Fact(name="encoding, all streams", value=3.217, unit="clips/s"),
            Fact(name="training examples", value=129218),
            Fact(name="device", value=f"cpu {EVIL}"),
        ],
        "store": [
            StoreRow(
                stream="audio", spec_id="whisper-3f2a", n_ok=98, n_absent=1, n_failed=1,
                size_bytes=12_582_912,
            ),
            StoreRow(
                stream="image", spec_id="eva-04e6", n_ok=100, n_absent=0, n_failed=0,
                size_bytes=288_358_400,
            ),
        ],
        "parsing": Parsing(
            counts={"tag": 200, "exact": 50, "alias": 35, "off_list": 12, "empty": 3},
            examples=(
                OffListReply(uid="demo/clip_007", truth="angry", reply=EVIL),
                OffListReply(uid="demo/clip_008", truth=None, reply="a | b\n*c* `d`\x00" + "x" * 500),
            ),
        ),
        "provenance": {"seed": "0", "numpy": "2.1.0", EVIL: EVIL},
        "notes": (f"Tiny random encoders: the numbers say nothing. {EVIL}",),
    }  # fmt: skip
    return ReportData.model_validate(fields | changes)


class Page(HTMLParser):
    """Collects what a page loads, its tags and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    folder = tmp_path_factory.mktemp("report") / "new"
    html, markdown = write_report(report_data(), folder)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8"), folder


def test_the_page_loads_nothing(written: tuple[str, str, Path]) -> None:
    page = Page(written[0])
    assert [r for r in page.references if not r.startswith("#")] == []
    assert {r[1:] for r in page.references} <= set(page.ids)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", written[0])
    assert not re.search(r"@import|url\((?!#)", written[0])
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 3


def test_text_from_outside_is_escaped(written: tuple[str, str, Path]) -> None:
    html, markdown, _ = written
    assert "<script" not in html.lower()
    assert "<script" not in markdown.lower()
    # label (class table; the plot cuts it short), condition, weights, reply, fact, note, provenance
    assert Page(html).text.count(EVIL) >= 8
    assert r"a \| b \*c\* \`d\`xxx" in markdown


def test_the_numbers_are_there_and_equal_in_both(written: tuple[str, str, Path]) -> None:
    html, markdown, _ = written
    rows = Page(html).rows
    scores = report_data().rows[0].scores
    assert scores.confusion[0] == [33, 7, 0, 0, 0]
    assert scores.confusion[1] == [0, 25, 5, 0, 0]
    assert scores.confusion[2] == [0, 0, 26, 1, 0]
    assert scores.confusion[3] == [0, 0, 0, 0, 3]
    # Accuracy (33 + 25 + 26) / 100; UAR (33/40 + 25/30 + 26/27 + 0/3) / 4; weighted F1
    # 0.40 x 66/(33 + 40) + 0.30 x 50/(32 + 30) + 0.27 x 52/(31 + 27) + 0.03 x 0
    full = ["all streams", "84.00", "\N{EN DASH}", "84.56", "65.53", "100", "3", "\N{EN DASH}"]
    assert full in rows
    assert "| " + " | ".join(full) + " |" in markdown
    for row in rows:
        cells = [re.escape(escape_markdown(cell)) for cell in row if cell]
        assert re.search(r"[*| ]+".join(cells), markdown), row
    for text in (
        "40.00 % accuracy",
        "287.00 MiB",
        "12.00 MiB",
        "2.75 MiB",
        "129,218",
        "3.217 clips/s",
        "Weights",
        "final, at the end of stage2",
    ):
        assert text in Page(html).text, text
        assert text in markdown, text


def test_the_stages_are_summed_up(written: tuple[str, str, Path]) -> None:
    html, markdown, _ = written
    # Validation is lowest behind step 200 of a stage: 2.6 / (1 + 200 / 40) = 0.4333; 0.2 are right.
    first, second = (["400", "0.4333", "200"], ["800", "0.4333", "600"])
    rows = [row for row in Page(html).rows if row and row[0].startswith("recognition")]
    assert [[row[1], row[4], row[5]] for row in rows] == [first, second]
    for row in rows:
        assert row[6:] == ["20.00", "12.5", "6,500", "1.00"]  # the median of 2 x 50 % and 38 x 1 %
        assert "| " + " | ".join(row) + " |" in markdown


def test_older_histories_have_fewer_columns_and_panels(tmp_path: Path) -> None:
    old = [HistoryRow(stage="one", step=i, loss=1 / i, learning_rate=1e-5) for i in (1, 2)]
    html, markdown = write_report(report_data(history=old, weights=None), tmp_path)
    page = Page(html.read_text(encoding="utf-8"))
    dash = "\N{EN DASH}"
    assert ["one", "2", "1", "0.5", dash, dash] in page.rows
    for word in ("alidation", "aiting", "Weights"):
        assert word not in page.text
        assert word not in markdown.read_text(encoding="utf-8")


def test_a_stage_may_have_been_validated_only(tmp_path: Path) -> None:
    rows = [
        HistoryRow(stage="one", step=5, loss=2.0, learning_rate=1e-5, data_wait=0.25),
        HistoryRow(stage="one", step=7, val_loss=math.nan),
        HistoryRow(stage="two", step=3, val_loss=1.5),
    ]
    one, two = summarize_stages(rows, training_curves(rows))
    assert (one.last_step, one.best_val_loss, one.data_wait, one.n_bad) == (7, None, 0.25, 1)
    assert (two.last_step, two.first_loss, two.best_val_loss, two.best_step) == (10, None, 1.5, 10)
    html, _ = write_report(report_data(history=rows), tmp_path)
    assert ["two", "10", *"\N{EN DASH}" * 2, "1.5", "10", *"\N{EN DASH}" * 4] in Page(
        html.read_text(encoding="utf-8")
    ).rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "needs loss or val_loss"), ({"loss": 1.0, "val_loss": 1.0}, "give both or neither")],
)
def test_half_a_row_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HistoryRow(stage="one", step=1, **fields)  # type: ignore[arg-type]


def test_both_lines_of_a_step_are_read_as_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_history(path) == ()
    step = {"stage": "one", "step": 5}
    speed = {"samples_per_s": 3.0, "tokens_per_s": 90.0}
    lines = [
        {**step, "loss": 2.0, "learning_rate": 0.1, **speed, "data_wait": 0.2},
        {**step, "val_loss": 1.5, "val_token_accuracy": 0.5, "val_loss_emotion": 1.5},
        {"stage": "one", "step": 6, "val_loss": 1.25, "val_token_accuracy": 0.75},
        {"stage": "two", "step": 5, "loss": 1.0, "learning_rate": 0.1, "samples_per_s": 3.0},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    path.write_text(text + '\n{"stage": "tw', encoding="utf-8")  # killed while it wrote
    assert read_history(path) == (
        HistoryRow(
            stage="one", step=5, loss=2.0, learning_rate=0.1, clips_per_s=3.0, tokens_per_s=90.0,
            data_wait=0.2, val_loss=1.5, val_token_accuracy=0.5,
        ),
        HistoryRow(stage="one", step=6, val_loss=1.25, val_token_accuracy=0.75),
        HistoryRow(stage="two", step=5, loss=1.0, learning_rate=0.1, clips_per_s=3.0),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_report_says_which_weights_were_scored(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    names = [f"clip{i}" for i in range(4)]
    store = TokenStore.open_or_create(tmp_path / "store")
    for spec in specs.values():
        store.commit(spec, [make_clip(spec, name) for name in names], {"torch": "0"})
    splits = ("train", "train", "val", "test")
    manifest = Manifest(
        header=header_of(("happy", "sad")),
        records=tuple(
            Record(
                uid=f"made/{name}", media=name, clip=Clip(sha256=key_of(name), n_bytes=1),
                split=split, emotion=label, descriptions=described("Low."),
            )
            for name, split, label in zip(names, splits, ("happy", "sad") * 2, strict=True)
        ),
    )  # fmt: skip
    steps = ("stages.0.n_steps=1", "stages.1.n_steps=2", "execution.log_every_steps=1")
    preset = configure(demo(), [*steps, "execution.validate_every_steps=1"])
    run = tmp_path / "run"
    train(preset, manifest, tmp_path / "m.parquet", store, run)
    for weights, said in (("final", "final, at the end of stage2"), ("best", "stage2/best-")):
        found = evaluate(run, manifest, store, split="test", weights=weights, max_new_tokens=1)
        assert found.report_html.parent.name == "eval-test-emotion" + "-best" * (weights == "best")
        page = Page(found.report_html.read_text(encoding="utf-8"))
        assert said in page.text
        assert "Best validation loss" in page.text


def test_the_markdown_links_to_its_figures(written: tuple[str, str, Path]) -> None:
    _, markdown, folder = written
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert linked == ["report-confusion.png", "report-labels.png", "report-training.png"]
    for name in linked:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*linked, "report.html", "report.md"])


def test_markdown_tables_keep_their_width(written: tuple[str, str, Path]) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", written[1], flags=re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        assert len(set(bars)) == 1, block


def test_equal_data_give_equal_files(written: tuple[str, str, Path], tmp_path: Path) -> None:
    html, markdown = write_report(report_data(), tmp_path)
    assert html.read_text(encoding="utf-8") == written[0]
    assert markdown.read_text(encoding="utf-8") == written[1]


def test_a_report_of_scores_alone(tmp_path: Path) -> None:
    scores = score_single_label(["sad"], [None], ["sad"], ["empty"])
    data = ReportData(
        title="t", created="c", preset="p", run_path="r", store_path="s",
        rows=(ScoreRow(name="all streams", scores=scores),),
    )  # fmt: skip
    html, markdown = write_report(data, tmp_path)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2
    assert "Training" not in page.text
    assert "report-training.png" not in markdown.read_text(encoding="utf-8")
    assert ["all streams", "0.00", "0.00", "0.00", "1", "0", "1"] in page.rows


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    history = [
        HistoryRow(stage="one", step=i, loss=loss, learning_rate=1e-5)
        for i, loss in enumerate([2.0, math.nan, math.inf], start=1)
    ]
    html, _ = write_report(report_data(history=history), tmp_path)
    assert "2 logged losses are not finite" in Page(html.read_text(encoding="utf-8")).text


def test_steps_that_start_again_are_put_in_line() -> None:
    def curves(*steps: tuple[str, int]) -> list[list[int]]:
        rows = [HistoryRow(stage=s, step=n, loss=1, learning_rate=0) for s, n in steps]
        return [list(curve.steps) for curve in training_curves(rows)]

    assert curves(("a", 5), ("a", 10), ("b", 5), ("b", 10)) == [[5, 10], [15, 20]]
    assert curves(("a", 5), ("a", 10), ("b", 15), ("b", 20)) == [[5, 10], [15, 20]]
    assert curves() == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("a", 2), ("a", 1)], "steps must rise within a stage"),
        ([("a", 1), ("b", 1), ("a", 2)], "stage 'a' comes back"),
    ],
)
def test_a_mixed_history_is_refused(steps: list[tuple[str, int]], message: str) -> None:
    history = [HistoryRow(stage=s, step=n, loss=1, learning_rate=0) for s, n in steps]
    with pytest.raises(ValidationError, match=message):
        report_data(history=history)


def test_at_most_five_examples() -> None:
    with pytest.raises(ValidationError, match="at most 5"):
        Parsing(counts={}, examples=(OffListReply(uid="a/b", truth=None, reply="x"),) * 6)


def test_the_terminal_table() -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(score_table(report_data().rows))
    text = stream.getvalue()
    assert re.search(r"all streams\W+84\.00\W+84\.56\W+65\.53\W+100\W+3", text)
    assert "[bold]" in text


@pytest.mark.parametrize(
    ("label", "history"),
    [
        ("$x$ $\\frac", [1]),
        ("开心\nline\x00two", [1, 2]),
        ("a" * 80, range(1, 3 * MAX_POINTS)),
        ('id="x" #010101 & <b>', [7]),
    ],
    ids=["mathtext", "foreign", "long", "markup"],
)
def test_odd_names_and_lengths_can_be_drawn(label: str, history: list[int]) -> None:
    plot = draw_confusion(score_single_label([label, "b"], [label, None], [label, "b"]))
    assert plot.png.startswith(b"\x89PNG")
    assert "<b>" not in plot.svg
    curve = Curve(label, list(history), [1.0] * len(history), [0.0] * len(history))
    assert len(draw_training([curve]).svg) < 400_000
    curve = Curve(label, *[[1]] * 5, waits=[math.nan])
    assert "validation" in draw_training([curve]).svg


def test_the_svg_takes_its_colours_from_the_page() -> None:
    svg = draw_confusion(score_single_label(["a", "b"], ["a", None], ["a", "b"])).svg
    assert {"var(--accent)", "var(--warn)", "var(--rule)", "currentColor"} <= set(
        re.findall(r"var\(--\w+\)|currentColor", svg)
    )
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) <= {"#ffffff"}


def test_formats() -> None:
    assert [percent(0.5), percent(2 / 3), percent(1)] == ["50.00", "66.67", "100.00"]
    assert [points(0.5, 0.25), points(0.25, 0.5)] == ["+25.00", "\N{MINUS SIGN}25.00"]
    assert points(0.1 + 0.2, 0.3) == "±0.00"
    sizes = [0, 1023, 1536, 1024**2 - 1, 3 * 1024**3, 5000 * 1024**4]
    assert [human_size(n) for n in sizes] == [
        "0 B", "1023 B", "1.50 KiB", "1.00 MiB", "3.00 GiB", "5000.00 TiB",
    ]  # fmt: skip
    values = [3.14159, 0.00012345, 129218, 12.0, math.nan, "n/a", None]
    assert [number(v) for v in values] == [
        "3.142", "0.0001234", "129,218", "12", "not finite", "n/a", "\N{EN DASH}",
    ]  # fmt: skip
    assert excerpt("y" * 300) == "y" * 280 + " … (300 characters)"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_library_names_the_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emocache\[eval\]'"):
        write_report(report_data(), tmp_path)
