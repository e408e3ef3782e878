"""The command line as a user meets it: the whole path, exit codes, one clear line for bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import emocache
from cache.errors import CheckpointError, MissingDependencyError, SchemaError
from cache.manifest import Header, Manifest, read_manifest
from cache.store import TokenStore
from eval import evaluate
from eval.predictions import read_predictions
from tests.media import write_clip
from train.checkpoint import trained_tensors
from train.model import build
from train.presets import PRESETS, demo

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Call the command line in this process; return its exit code, stdout and stderr."""
    code = emocache.main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep rich from wrapping what the tests look for, and from colouring it."""
    for console in (emocache.out, emocache.err):
        monkeypatch.setattr(console, "_width", 200)


def test_help_shows_the_verbs_in_the_order_of_the_work_and_at_once() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "emocache", "--help"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    places = [shown.stdout.index(f"│ {verb} ") for verb in emocache.VERBS]
    assert places == sorted(places)
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "zarr", "pyarrow", "av", "numpy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media") / "clips"
    root.mkdir()
    for seed in range(6):
        write_clip(root / f"c{seed}.mp4", seed=seed)
    (root / "broken.mp4").write_text("no media")
    rows = [
        {"file": f"c{i}.mp4", "label": ("happy", "sad")[i % 2], "split": "test" if i > 3 else "train",
         "description": "A stamped picture and a tone.", "subtitle": "Hello."}
        for i in range(6)
    ]  # fmt: skip
    rows.append(rows[0] | {"file": "broken.mp4"})
    with (root.parent / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


SHORT = [
    "stages.0.n_steps=2", "stages.1.n_steps=2", "stages.0.optim.batch_size=2",
    "stages.1.optim.batch_size=2", "execution.log_every_steps=1",
]  # fmt: skip


def test_the_five_verbs_by_hand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, store, out = tmp_path / "m.parquet", tmp_path / "tokens", tmp_path / "run"
    labels = folder.parent / "labels.csv"
    code, shown, problems = run(capsys, "index", folder, "--out", manifest, "--labels", labels)
    assert code == 1, "done, with a file that is not readable as media"
    assert "7 records" in shown
    assert "broken.mp4" in problems
    given = ["--manifest", manifest, "--store", store]
    code, shown, problems = run(capsys, "extract", "demo", *given)
    assert code == 1, "done, with a failed clip"
    assert "failed, audio, video, image, 1 clip: undecodable" in problems
    code, shown, _ = run(capsys, "extract", "demo", *given)
    assert "nothing to do: all 7 clips are in" in shown
    code, shown, _ = run(capsys, "store", "ls", store)
    assert code == 0
    for stream in ("audio", "video", "image"):
        assert re.search(rf"{stream} .*6 .*0 .*1 ", shown)
    code, shown, _ = run(capsys, "store", "show", store, "clips/c1", "--manifest", manifest)
    assert code == 0
    assert "16x4x96" in shown
    assert "12 at 0.48 s" in shown
    code, shown, _ = run(capsys, "store", "show", store, "audio")
    assert '"kind": "whisper"' in shown
    assert "whisper_tiny.pt" in shown

    train = ["train", "demo", *given, "--out", out, *SHORT]
    code, _, problems = run(capsys, *train)
    assert code == 2
    assert "clips/broken: audio, video, image is failed, and data.failed is 'refuse'" in problems
    code, shown, _ = run(capsys, *train, "data.failed=drop")
    assert code == 0, "the refusal left nothing behind that would be in the way"
    assert "trained 4 steps" in shown
    code, shown, _ = run(capsys, *train, "data.failed=drop")
    assert "nothing to do" in shown
    code, shown, _ = run(
        capsys,
        "evaluate",
        out,
        *given,
        "--mask",
        "audio",
        "--max-new-tokens",
        4,
        "--task",
        "emotion",
        "--likelihoods",
        "--reasoning",
        "--examples",
        1,
    )
    assert code == 0
    folder_out = out / "eval-test-emotion"
    predictions = read_predictions(folder_out / "predictions.jsonl")
    assert {(p.uid, p.masked) for p in predictions} == {
        (uid, masked) for uid in ("clips/c4", "clips/c5") for masked in ((), ("audio",))
    }
    for prediction in predictions:
        assert set(prediction.likelihoods or ()) == {"happy", "sad"}
    explained = read_predictions(folder_out / "examples.jsonl")
    assert [(p.task, p.masked) for p in explained] == [("think", ()), ("think", ("audio",))]
    assert (folder_out / "report.html").read_text().count("data:image/jpeg") >= 5
    scores = json.loads((folder_out / "scores.json").read_text())
    assert set(scores) == {"all streams", "audio masked"}
    assert scores["all streams"]["n_scored"] == 2
    assert (folder_out / "report.html").stat().st_size > 10_000
    assert str(folder_out / "report.html") in shown


def test_show_prints_what_with_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "show", "v2", "seed=7")
    assert code == 0
    (tmp_path / "v2.json").write_text(shown)
    code, again, _ = run(capsys, "show", "v2", "--with", tmp_path / "v2.json")
    assert json.loads(again) == json.loads(shown)
    assert json.loads(shown)["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "v3"], "unknown preset 'v3'"),
        (["show", "demo", "seeed=1"], "Did you mean 'seed'?"),
        (
            ["extract", "demo", "--manifest", "none.parquet", "--store", "s"],
            "no such manifest file",
        ),
        (["extract", "demo", "--manifets", "m", "--store", "s"], "--manifest"),
        (["store", "ls", "none"], "no such store"),
        (["evaluate", "none", "--manifest", "none", "--store", "s"], "no such manifest file"),
        (
            ["extract", "demo", "--manifest", "m", "--store", "s", "--device", "gpu"],
            "unknown device",
        ),
        (["index", "none", "--out", "m.parquet"], "none: does not exist"),
        (["idnex"], "index"),
        (["evaluate"], "Missing argument 'RUN'"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, problems = run(capsys, *arguments)
    assert code == 2
    assert message in shown + problems
    assert "Traceback" not in problems
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_a_place_that_cannot_be_written_gets_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, problems = run(capsys, "index", folder, "--out", tmp_path / "file" / "m.parquet")
    assert code == 2
    assert "file: File exists. Check the path" in problems
    code, _, problems = run(capsys, "demo", "--out", tmp_path / "file")
    assert code == 2
    assert "Traceback" not in problems


def test_bad_tables_and_weights_get_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "m.parquet"
    wrong = tmp_path / "labels.csv"
    wrong.write_text("file,label\nc0.mp4,hapy\n")
    code, _, problems = run(
        capsys, "index", folder, "--out", manifest, "--labels", wrong, "--label-space", "happy,sad"
    )
    assert code == 2
    assert "line 2: label 'hapy' is not in the label space" in problems
    assert "Did you mean 'happy'?" in problems
    assert not manifest.exists()
    run(capsys, "index", folder, "--out", manifest)
    given = ["extract", "demo", "--manifest", manifest, "--store", tmp_path / "s"]
    for weights, message in (
        ("eva", "is not NAME=PATH"),
        ("eva=missing.pth", "no such checkpoint file"),
        (f"eva={wrong}", "not a readable checkpoint"),
        (f"ears={wrong}", "--encoder-weights ears=...: unknown name"),
    ):
        code, _, problems = run(capsys, *given, "--encoder-weights", weights)
        assert code == 2
        assert message in problems


def test_the_demo_runs_and_a_second_one_encodes_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo at a twentieth of its size; docs/demo.md has the figures of the real one."""
    arguments = ["demo", "--out", tmp_path / "d", "--n-clips", 24, *SHORT]
    code, shown, _ = run(capsys, *arguments)
    assert code == 0
    assert "extracted 24 of 24 clips" in shown
    for name in ("all streams", "audio masked", "picture masked"):
        assert name in shown
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d" / "store").rglob("*") if p.is_file()}
    weights = (tmp_path / "d/run/stage2/final/fusion_adapters.safetensors").stat().st_mtime_ns
    code, shown, _ = run(capsys, *arguments)
    assert code == 0
    assert "extracted 0 of 24 clips; 24 were in the store already" in shown
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "d" / "store").rglob("*") if p.is_file()}
    assert after == before
    assert (
        weights == (tmp_path / "d/run/stage2/final/fusion_adapters.safetensors").stat().st_mtime_ns
    )
    _readme_example(tmp_path)


def _readme_example(folder: Path) -> None:
    """The README's `python -c` line, as it is written, on the demo's store, without this project."""
    (folder / "demo").symlink_to(folder / "d")
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r'python -c "\n(import zarr.*?)"\n', text, flags=re.DOTALL)
    store_text = (ROOT / "docs" / "store.md").read_text()
    (example,) = re.findall(r"```python\n(import zarr.*?)```", store_text, flags=re.DOTALL)
    digests = {r.clip.sha256 for r in read_manifest(folder / "d" / "corpus.parquet").records}
    (reading,) = re.findall(r"```python\n(from cache.reader.*?)```", text, flags=re.DOTALL)
    batches = subprocess.run(
        [sys.executable, "-W", "error", "-c", reading],
        capture_output=True, text=True, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout.splitlines()  # fmt: skip
    assert len(batches) == 2
    assert batches[0].startswith("torch.Size([8, 16, 4, 96]) [")
    for code in (command, example):
        shown = subprocess.run(
            [sys.executable, "-W", "error", "-I", "-c", code],
            capture_output=True, text=True, cwd=folder, check=True,
        ).stdout.strip()  # fmt: skip
        if code is command:
            digest, _, shape = shown.partition(" ")
            assert digest in digests
            assert shape == "(16, 4, 96)"
        else:
            found = re.fullmatch(r"\((\d+), 64\)", shown)
            assert found, shown
            assert 100 <= int(found[1]) <= 205, "2 to 4 s at 50 tokens a second, and AAC's padding"


def test_real_clips_travel_the_whole_path(
    shared_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The labels are made up: the files are test input, and nobody's emotion is judged."""
    manifest, store, out = tmp_path / "m.parquet", tmp_path / "tokens", tmp_path / "run"
    facts = [json.loads(x) for x in (shared_clips / "clips.jsonl").read_text().splitlines()]
    labels = tmp_path / "labels.csv"
    lines = [
        f"{f['file']},{('up', 'down')[i % 2]},{'test' if i % 3 == 0 else 'train'},Clip {i}."
        for i, f in enumerate(facts)
    ]
    labels.write_text("\n".join(["file,label,split,description", *lines]) + "\n")
    given = ["--manifest", manifest, "--store", store]
    for arguments in (
        ["index", shared_clips, "--out", manifest, "--labels", labels],
        ["extract", "demo", *given],
        ["train", "demo", *given, "--out", out, *SHORT],
        ["evaluate", out, *given, "--max-new-tokens", 4, "--mask", "picture"],
        ["evaluate", out, *given, "--max-new-tokens", 4, "--task", "think"],
    ):
        code, shown, problems = run(capsys, *arguments)
        assert code == 0, problems
    assert "accuracy" in shown
    masked = read_predictions(out / "eval-test-emotion" / "predictions.jsonl")
    assert len(masked) == 2 * 9
    assert len(read_predictions(out / "eval-test-think" / "predictions.jsonl")) == 9


def test_evaluation_refuses_before_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest(header=Header(media_root="."), records=())
    store = TokenStore.open_or_create(tmp_path / "s")
    with pytest.raises(SchemaError, match=r"unknown mask 'odio'. Did you mean 'audio'\?"):
        evaluate.evaluate(tmp_path, manifest, store, split="test", masks=["odio"])
    with pytest.raises(SchemaError, match=r"unknown task 'emotoin'"):
        evaluate.evaluate(tmp_path, manifest, store, split="test", task="emotoin")
    with pytest.raises(CheckpointError, match="not a run"):
        evaluate.evaluate(tmp_path, manifest, store, split="test")
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"sklearn, matplotlib, jinja2: pip install"):
        evaluate.evaluate(tmp_path, manifest, store, split="test")


def test_a_published_checkpoint_is_imported_trained_on_and_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in Emotion-LLaMAv2's own layout, at the demo's sizes: import, evaluate, start from it."""
    torch.manual_seed(5)
    model, _ = build(demo())
    parts, lora = trained_tensors(model)
    prep = {"audio": 0, "image": 1, "video": 2}
    upstream = {}
    for name, tensor in parts.items():
        where, _, rest = name.partition(".")
        if where == "adapters":
            _, block, kind = rest.split(".")
            key = f"llama_proj{'' if block == 'image' else '_' + block}.{kind}"
        else:
            key = "conv_pro_module." + rest.replace("conv_in", "conv_entry").replace(
                "attn_mlp", "attention_mlp"
            ).replace("attn_gate", "fc_att").replace("merge", "fc_final")
            key = re.sub(r"prep\.(\w+)", lambda m: f"feats_prep.{prep[m[1]]}", key)
            key = re.sub(
                r"conv_blocks\.(\d)\.conv", r"conv_module.conv_blocks.\1.conv_block.0", key
            )
        upstream[key] = torch.randn_like(tensor) * 0.02
    for name, tensor in lora.items():
        upstream[f"llama_model.{name}"] = torch.randn_like(tensor) * 0.02
    torch.save({"model": upstream, "epoch": 9}, tmp_path / "checkpoint_9.pth")

    run_dir = tmp_path / "imported"
    command = ["import-checkpoint", tmp_path / "checkpoint_9.pth", "--preset", "demo"]
    code, shown, problems = run(capsys, *command, "--out", run_dir)
    assert code == 0, problems
    assert "227,011" in shown, "every trained parameter came from the file"
    assert f"init={run_dir}" in shown
    code, _, problems = run(capsys, *command, "--out", run_dir)
    assert code == 2
    assert "is not empty" in problems

    manifest, store = tmp_path / "m.parquet", tmp_path / "tokens"
    given = ["--manifest", manifest, "--store", store]
    labels = folder.parent / "labels.csv"
    run(capsys, "index", folder, "--out", manifest, "--labels", labels)
    run(capsys, "extract", "demo", *given)
    code, shown, problems = run(
        capsys, "evaluate", run_dir, *given, "--max-new-tokens", 2, "data.failed=drop"
    )
    assert code == 0, problems
    code, _, problems = run(
        capsys, "train", "demo", *given, "--out", tmp_path / "run", *SHORT, "data.failed=drop",
        f"init={run_dir}", "stages.0.optim.lr=1e-12", "stages.0.optim.lr_min=0",
        "stages.1.optim.lr=1e-12", "stages.1.optim.lr_min=0",
    )  # fmt: skip
    assert code == 0, problems
    trained = load_file(tmp_path / "run/stage1/final/fusion_adapters.safetensors")
    torch.testing.assert_close(
        trained["adapters.maps.image.weight"], upstream["llama_proj.weight"], atol=1e-6, rtol=0
    )


def test_a_dry_run_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, store = tmp_path / "m.parquet", tmp_path / "tokens"
    given = ["--manifest", manifest, "--store", store]
    run(capsys, "index", folder, "--out", manifest, "--labels", folder.parent / "labels.csv")
    run(capsys, "extract", "demo", *given)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, shown, problems = run(capsys, "train", "demo", *given, "--dry-run", "data.failed=drop")
    assert code == 0, problems
    assert "trained        227,011 parameters" in shown
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    code, _, problems = run(capsys, "train", "demo", *given, "data.failed=drop")
    assert (code, "--out FOLDER is missing" in problems) == (2, True)
    for option, message in (
        (["--parallel", "fdsp"], "Did you mean 'fsdp'"),
        (["--track", "wandbb"], "Did you mean 'wandb'"),
        (["--device", "cuda:x"], "unknown device"),
        (["model.llm.dtype=float16"], "float16 cannot be trained"),
        (["stages.0.corpora={meld: {weight: 1}}"], "no training record is of corpus 'meld'"),
        (["stages.0.tasks={}"], "an empty mixture trains nothing"),
        (["stages.0.optim.max_tokens=50"], "more than a forward pass"),
        (["model.lora.targets=[q_prj]"], "Did you mean 'q_proj'"),
        (["prompt.instructions=/nowhere.json"], "cannot read the instructions"),
        (["init=/nowhere"], "not a run"),
    ):
        where = ["--out", tmp_path / "run"]
        code, _, problems = run(
            capsys, "train", "demo", *given, *where, "data.failed=drop", *option
        )
        assert code == 2, option
        assert message in problems, (option, problems)
        assert not (tmp_path / "run" / "stage1" / "final").exists()


def test_show_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "show")
    assert code == 0
    for name in PRESETS:
        assert name in shown
