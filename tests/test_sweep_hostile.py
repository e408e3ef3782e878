"""Sweep files that mean harm or slipped: each is refused at once, in one line, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import emocache
from cache.errors import SchemaError
from cache.schema import decode
from eval.sweep.file import MAX_DEPTH, MAX_VALUES, parse_sweep, read_sweep
from eval.sweep.rows import rows_of, trials_of
from eval.sweep.schema import MAX_NAME, MAX_SEED, MAX_TRIALS, SweepRow, Trial
from train.config import Preset
from train.presets import preset

PLAIN = """\
name: small
title: Small
preset: demo
scores:
  - {name: f1, heading: F1, kind: split}
rows:
  - name: base
"""
"""Its next line is 8."""
HEAD = PLAIN.partition("rows:")[0]
"""The same without rows; its next line is 6."""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines that mean 9**9 values."""


def _all_of(text: str) -> tuple[Trial, ...]:
    sweep = parse_sweep(text, "my.yaml")
    return trials_of(sweep, rows_of(sweep), "demo")


def refused(text: str) -> list[str]:
    """Return what is said of a text, a fault a line."""
    with pytest.raises(SchemaError) as caught:
        _all_of(text)
    return str(caught.value).splitlines()


# What does not survive JSON


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("    published: {f1: .nan}", "'rows.0.published.f1': Input should be a finite number"),
        ("    published: {f1: -.inf}", "finite number (got -inf)"),
        ("    published: {f1: 1.0e+400}", "finite number (got inf)"),
        ("    set: {stages.0.optim.grad_clip: .inf}", "must be finite"),
        ("    set: {stages.0: {optim: {betas: [0.9, .nan]}}}", "must be finite"),
        ("set: {stages.0.optim.grad_clip: .inf}", "must be finite"),
        ("demo: {stages.0.optim.grad_clip: .inf}", "must be finite"),
        ("grid: {stages.0.optim.grad_clip: [1.0, .inf]}", "must be finite"),
        # A text that passes for a number, once the preset is resolved.
        ("set: {stages.0.optim.grad_clip: 'inf'}", "'stages.0.optim.grad_clip' must be finite"),
        ("seeds: [-1]", "'seeds.0': Input should be greater than or equal to 0 (got -1)"),
        ("seeds: [1, 99999999999999999999999]", "'seeds.1': Input should be less than or equal to"),
        (f"seeds: [{MAX_SEED + 1}]", f"less than or equal to {MAX_SEED}"),
        ("    seeds: [-1]", "greater than or equal to 0 (got -1)"),
        ("seeds: [true]", "valid integer (got True)"),
        ("    seeds: [true]", "valid integer (got True)"),
        ("seeds: [1.0]", "valid integer (got 1.0)"),
        ('seeds: ["42"]', "valid integer (got '42')"),
        ("seeds: []", "at least 1 item"),
        (f"seeds: [0x{'f' * 5000}]", "a whole number of 20000 bits"),
        (f"seeds: [{'9' * 5000}]", "not YAML"),
        ("set: {stages.0.name: 2026-01-01}", "a value of kind 'timestamp'"),
        ("set: {stages.0.name: !!set {a, b}}", "a value of kind 'set'"),
        ('about: "\\ud800"', "half a character"),
        ("set: {1: 2}", "the key '1' is no word to YAML"),
    ],
)
def test_what_json_has_not_is_refused(added: str, said: str) -> None:
    told = refused(f"{PLAIN}{added}\n")
    assert len(told) == 1
    assert told[0].startswith("my.yaml:8: ")
    assert said in told[0]


@pytest.mark.parametrize("seed", [0, 2**32, MAX_SEED])
def test_seeds_of_a_sweep_are_seeds_of_its_presets(seed: int) -> None:
    (trial,) = _all_of(f"{PLAIN}seeds: [{seed}]\n")
    assert trial.preset.seed == seed
    assert decode(Preset, {**preset("demo").model_dump(), "seed": seed}, "here").seed == seed


def test_rows_made_in_code_are_held_to_the_same() -> None:
    for field, value in (("seeds", (-1,)), ("published", {"f1": float("nan")})):
        with pytest.raises(ValidationError):
            SweepRow.model_validate({"name": "a", field: value})


# YAML that means more than it says


def test_aliases_of_aliases_are_counted_not_written_out() -> None:
    (told,) = refused(PLAIN + BOMB)
    assert told.startswith("my.yaml:13: ")  # 9**5 of the fifth line, and more than one of them.
    assert f"more than {MAX_VALUES} values" in told


def test_plain_aliases_may_be_used() -> None:
    text = (
        HEAD + "set: {stages.0.tasks: &none {}}\nrows: [{name: a, set: {stages.1.tasks: *none}}]\n"
    )
    sweep = parse_sweep(text, "my.yaml")
    assert sweep.rows[0].set == {"stages.1.tasks": {}}
    assert sweep.where("rows", 0, "set", "stages.1.tasks") == "my.yaml:7"


@pytest.mark.parametrize("n", [MAX_DEPTH, 3000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ("{a: ", "}")])
def test_deep_nesting_is_refused(n: int, start: str, end: str) -> None:
    (told,) = refused(f"{PLAIN}set: {{a: {start * n}1{end * n}}}\n")
    assert told.startswith(f"my.yaml:8: nested more than {MAX_DEPTH} deep")


def test_aliases_that_nest_deeply_are_refused() -> None:
    chain = "x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}]\n" for n in range(1, 200))
    (told,) = refused(PLAIN + chain)
    assert f"nested more than {MAX_DEPTH} deep" in told


@pytest.mark.parametrize(
    ("added", "line", "said"),
    [
        ("about: &a [*a]", 8, "an alias of something that it is a part of"),
        (
            "about: !!python/object/apply:os.getcwd []",
            8,
            "a value of kind 'tag:yaml.org,2002:python",
        ),
        ("about: !!int ''", 8, "not YAML (a wrong tag)"),
        ("about: !!bool perhaps", 8, "not YAML (a wrong tag)"),
        ("about: !!float many", 8, "not YAML (could not convert string to float"),
        ("about: a\x01b", 8, "not YAML (unacceptable character"),
    ],
)
def test_yaml_stays_safe(added: str, line: int, said: str) -> None:
    (told,) = refused(f"{PLAIN}{added}\n")
    assert told.startswith(f"my.yaml:{line}: ")
    assert said.replace("tag:yaml.org,2002:", "") in told


def test_sets_that_are_no_names_are_refused() -> None:
    told = refused(PLAIN.replace("kind: split", "kind: benchmark, sets: [[mosi]]"))
    assert told[0].startswith("my.yaml:5: 'scores.0.sets.0'")


# More rows than anybody trains


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            HEAD
            + f"grid: {{{', '.join(f'a{n}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' for n in range(7))}}}",
            "rows (1) times points of the grid (10000000) times seeds make 10000000 trials",
        ),
        (HEAD + f"seeds: {list(range(MAX_TRIALS + 1))}\nrows: [{{name: a}}]", "make 1001 trials"),
        (HEAD + f"rows: {[{'name': f'r{n}'} for n in range(MAX_TRIALS + 1)]}", "make 1001 trials"),
        (
            HEAD + f"grid: {{seed: {list(range(501))}}}\nrows: [{{name: a, seeds: [1, 2]}}]",
            "make 1002 trials",
        ),
        (HEAD + "grid: {stages.0.n_steps: []}", "an axis without values makes no rows"),
        (HEAD + f"rows: [{{name: {'a' * (MAX_NAME + 1)}}}]", f"at most {MAX_NAME} characters"),
        (
            HEAD + f"grid: {{stages.0.name: [{'b' * MAX_NAME}]}}",
            f"the grid gives a row a name of {MAX_NAME + 5} bytes",
        ),
    ],
    ids=["grid", "seeds", "rows", "grid-and-seeds", "empty-axis", "long-name", "long-grid-name"],
)
def test_too_many_rows_none_and_too_long_names_are_refused(text: str, said: str) -> None:
    (told,) = refused(text + "\n")
    assert told.startswith("my.yaml:6: ")
    assert said in told


def test_as_many_trials_and_as_long_names_as_may_be() -> None:
    text = HEAD + f"seeds: {list(range(MAX_TRIALS))}\nrows: [{{name: {'a' * MAX_NAME}}}]\n"
    assert len(rows_of(parse_sweep(text, "my.yaml"))[0].seeds) == MAX_TRIALS


def test_a_sweep_of_nothing_is_refused() -> None:
    (told,) = refused(HEAD + "rows: []\ngrid: {}\n")
    assert "nothing to train" in told


# On the command line


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("    published: {f1: .nan}\n", "finite number"),
        ("seeds: [-1]\n", "greater than or equal to 0"),
        ("set: {stages.0.optim.grad_clip: .inf}\n", "must be finite"),
        (BOMB, "aliases"),
        (f"about: {'[' * 3000}\n", "deep"),
    ],
)
def test_the_command_says_it_in_one_line(
    added: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "my.yaml", tmp_path / "out"
    file.write_text(PLAIN + added, encoding="utf-8")
    assert emocache.main(["sweep", str(file), "--scale", "demo", "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert f"{file}:" in told.err.replace("\n", "")
    assert said in " ".join(told.err.split())
    assert "Traceback" not in told.out + told.err
    assert not out.exists()
    with pytest.raises(SchemaError, match=r"my\.yaml:\d+: [^\n]+$"):
        rows_of(read_sweep(file))
