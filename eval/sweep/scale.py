"""What a sweep at demo scale runs on: generated clips, dealt out to the corpora of its rows, and weights.

::

    OUT/demo/corpus/            the demo corpus: media, labels.csv, and OpenFace's tables of its faces
    OUT/demo/manifest.parquet   its clips as records of the corpora that the rows name
    OUT/demo/weights/           made-up checkpoints of encoders that no bundled one stands for

Everything follows from the sweep, so a second call makes nothing and two folders are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.clip import Description, Peak, Record, Subtitle
from cache.encoders import Encoder
from cache.errors import SchemaError
from cache.labels import LabelField, LabelSpace
from cache.manifest import CorpusNote, Header, Manifest, read_manifest, write_manifest
from eval.benchmarks import benchmarks
from eval.sweep.schema import Scale, ScoreColumn, SweepFile, Trial
from extract import tiny
from extract.corpora.demo import (
    EMOTIONS,
    LOOK_SENTENCES,
    SOUND_SENTENCES,
    SUBTITLES,
    write_demo_corpus,
    write_demo_faces,
)
from extract.index import index_folder
from extract.tiny.made_up import checkpoint_path, write_checkpoint
from train.config import Preset
from train.scaling import bundled_file

N_CLIPS = 108
"""Of the demo corpus: 72 to train on and 36 to score on."""

_CHINESE = (
    "火车从四号站台开出。", "我把钥匙放在厨房的桌子上。", "他们把会议改到了星期二。", "走廊里有你的一封信。",
    "街角的商店九点开门。", "她说包裹今天会到。", "我们车里还有两个箱子。", "走廊的灯开着。",
    "他在办公室外面等着。", "那是左边的第二扇门。", "这份报告有十一页。", "你把外套忘在椅子上了。",
    "公共汽车停在图书馆后面。", "大约需要十分钟。", "他们上周把墙刷成了白色。", "你不在的时候有人打来电话。",
    "窗户对着花园。", "我中午之前到那里。", "号码写在背面。", "我们现在去车站。",
)  # fmt: skip
_TRANSLATED = dict(zip(SUBTITLES, _CHINESE, strict=True))
_SENTIMENTS = {
    "happy": "positive", "surprised": "positive", "sad": "negative", "neutral": "neutral",
    "angry": "negative", "fearful": "negative",
}  # fmt: skip
_INTENTS = {
    "happy": "encouraging", "surprised": "questioning", "sad": "wishing", "neutral": "neutral",
    "angry": "suggesting", "fearful": "consoling",
}  # fmt: skip
_FIELDS: Mapping[str, tuple[LabelField, ...]] = {
    "mer-caption-plus": ("emotion_ov",),
    **{
        corpus: tuple(row.field for row in benchmarks().values() if row.corpus == corpus)
        for corpus in {row.corpus for row in benchmarks().values()}
    },
}
"""Corpus -> labels that its own records have; those that are not named have an emotion."""


@dataclass(frozen=True)
class Material:
    """Where everything is that a sweep at demo scale needs."""

    manifest: Path
    media: Path
    """Folder of the clips."""
    faces: Path
    """Folder of the tables of faces, as `--faces` takes it."""
    weights: Mapping[str, Path]
    """Canonical JSON of a spec with an open weights digest -> checkpoint."""


def scores_at(sweep: SweepFile, scale: Scale) -> tuple[ScoreColumn, ...]:
    """Return a sweep's score columns; at demo scale benchmarks become the demo corpus's test split."""
    if scale == "full":
        return sweep.scores
    return tuple(
        score
        if score.kind == "split"
        else ScoreColumn(name=score.name, heading=score.heading, kind="split")
        for score in sweep.scores
    )


def demo_material(
    out: Path,
    sweep: SweepFile,
    trials: Sequence[Trial],
    *,
    on_clip: Callable[[], None] | None = None,
) -> Material:
    """Make what a sweep at demo scale runs on, or find what an earlier call made.

    Each emotion's clips are dealt out evenly to the corpora that the trials name (`data.corpora`, and
    the corpora of their stages), so that every row finds clips of its own; without names there is one
    corpus, `demo`.

    Args:
        out: Folder of the sweep; everything goes below `out/demo`.
        sweep: For messages.
        trials: All of the sweep at demo scale, whichever of them are wanted: other corpora would be
            dealt other clips.
        on_clip: Called once per generated clip.

    Raises:
        SchemaError: More corpora than clips, or the folder's clips were dealt to other corpora.
    """
    folder = out / "demo"
    labels = write_demo_corpus(folder / "corpus", n_clips=N_CLIPS, on_clip=on_clip)
    media = labels.parent / "media"
    path = folder / "manifest.parquet"
    plain, _ = index_folder(
        media, path, labels_csv=labels, label_space=tuple(EMOTIONS), corpus="demo"
    )
    manifest = deal(plain, _shares(trials))
    if not path.exists():
        write_manifest(path, manifest)
    elif read_manifest(path) != manifest:
        raise SchemaError(
            f"{path}: its clips are dealt out to other corpora than the rows of sweep '{sweep.name}' now "
            "name. Give another --out, or remove this one."
        )
    faces = write_demo_faces(folder / "corpus")
    return Material(path, media, faces, _weights(trials, folder / "weights"))


def deal(manifest: Manifest, shares: Mapping[str, float]) -> Manifest:
    """Return a demo corpus as records of several corpora, with whatever their tasks need.

    Of each split and emotion every corpus gets its share, as evenly as whole clips allow. A record
    keeps its emotion and gets the other labels that its corpus is known for, subtitles in English and
    Chinese, a peak frame, and descriptions of its look and its sound.

    Args:
        manifest: The demo corpus.
        shares: Corpus -> its share of the clips.

    Raises:
        SchemaError: A corpus would get no clip to train on.
    """
    total = sum(shares.values())
    dealt: list[Record] = []
    owed = dict.fromkeys(shares, 0.0)

    for record in sorted(manifest.records, key=lambda r: (r.split or "", r.emotion or "", r.uid)):
        for name, share in shares.items():
            owed[name] += share / total
        corpus = max(owed, key=lambda name: owed[name])
        owed[corpus] -= 1
        dealt.append(_record(record, corpus))
    empty = sorted(shares.keys() - {r.corpus for r in dealt if r.split == "train"})
    if empty:
        raise SchemaError(
            f"{len(manifest)} clips are too few for {len(shares)} corpora: {', '.join(empty)} would get "
            "none to train on"
        )
    return Manifest(
        header=Header(
            media_root=manifest.header.media_root,
            label_spaces=_spaces(shares),
            corpora={name: CorpusNote(title=f"{name} (demo clips)") for name in shares},
        ),
        records=tuple(sorted(dealt, key=lambda record: record.media)),
    )


def _shares(trials: Iterable[Trial]) -> dict[str, float]:
    """Return each corpus's share: what a set of corpora gets is split among its members."""
    sets = {names for trial in trials for names in _corpora(trial.preset)}
    shares: dict[str, float] = {}
    for names in sorted(sets):
        for name in names:
            shares[name] = shares.get(name, 0.0) + 1 / len(names)
    return shares or {"demo": 1.0}


def _corpora(preset: Preset) -> Iterable[tuple[str, ...]]:
    """Yield the sets of corpora that a preset trains on, as far as it names them."""
    if preset.data.corpora is not None:
        yield tuple(sorted(preset.data.corpora))
    for stage in preset.stages:
        if stage.corpora:
            yield tuple(sorted(name for name, c in stage.corpora.items() if c.weight > 0))


def _record(plain: Record, corpus: str) -> Record:
    """Return a demo record as one of a corpus."""
    emotion = plain.emotion
    assert emotion is not None
    assert plain.clip is not None
    assert plain.clip.n_frames is not None
    cue = EMOTIONS[emotion]
    sounding_alike = tuple(name for name, other in EMOTIONS.items() if other.sound == cue.sound)
    labels: dict[LabelField, object] = {
        "emotion_multi": sounding_alike,
        "emotion_ov": (emotion,),
        "sentiment": _SENTIMENTS[emotion],
        "intent": _INTENTS[emotion],
    }
    english = plain.subtitles[0].text
    look, sound = LOOK_SENTENCES[cue.look], SOUND_SENTENCES[cue.sound]
    fields: dict[str, object] = {
        **plain.model_dump(),
        **{field: labels[field] for field in _FIELDS.get(corpus, ()) if field in labels},
        "uid": f"{corpus}/{plain.uid.partition('/')[2]}",
        "subtitles": (
            Subtitle(text=english, language="en"),
            Subtitle(text=_TRANSLATED[english], language="zh", origin="translation"),
        ),
        "peak": Peak(index=plain.clip.n_frames // 3, method="demo"),
        "descriptions": (
            *_reasons(plain, corpus),
            Description(kind="visual_expression", text=look),
            Description(kind="visual_objective", text=look),
            Description(kind="audio_tone", text=sound),
        ),
    }
    return Record.model_validate(fields)


def _reasons(plain: Record, corpus: str) -> tuple[Description, ...]:
    """Return the multimodal descriptions, with versions where the corpus has two of them."""
    if corpus != "merr-fine":
        return plain.descriptions
    versions = ("fine", "coarse")
    return tuple(
        text.model_copy(update={"version": version})
        for version in versions
        for text in plain.descriptions
    )


def _spaces(corpora: Iterable[str]) -> dict[str, LabelSpace]:
    """Return the label spaces of dealt corpora."""
    names: dict[LabelField, tuple[str, ...]] = {
        "emotion": tuple(EMOTIONS),
        "emotion_multi": tuple(EMOTIONS),
        "emotion_ov": tuple(EMOTIONS),
        "sentiment": ("positive", "negative", "neutral"),
        "intent": tuple(dict.fromkeys(_INTENTS.values())),
    }
    return {
        key: LabelSpace(name=key, labels=names[field], open=field == "emotion_ov")
        for corpus in corpora
        for field in ("emotion", *_FIELDS.get(corpus, ()))
        for key in (f"{corpus}/{field}",)
    }


def _weights(trials: Iterable[Trial], folder: Path) -> dict[str, Path]:
    """Return the checkpoint of every spec that trials read; make those that are not bundled."""
    specs = {spec.canonical_json(): spec for trial in trials for spec in trial.preset.tokens.all()}
    return {key: _checkpoint(spec.encoder, folder) for key, spec in specs.items()}


def _checkpoint(encoder: Encoder, folder: Path) -> Path:
    name = bundled_file(encoder)
    if name is not None:
        return Path(tiny.__file__).with_name(name)
    path = checkpoint_path(encoder, folder)
    return path if path.exists() else write_checkpoint(encoder, folder)
