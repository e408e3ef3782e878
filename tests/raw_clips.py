"""A run on real media: a few small clips, their tokens from the bundled encoders, a moment of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.clip import Record
from cache.manifest import Manifest, write_manifest
from cache.store import TokenStore
from extract.encoders.bank import EncoderBank
from extract.index import index_folder
from extract.plan import make_plan
from extract.run import extract
from tests.media import sine, stamped, write, write_clip, write_wav
from train.config import configure
from train.loop import train
from train.presets import demo


@dataclass(frozen=True)
class Made:
    """A run, and the clips that it was trained on among others, in a store."""

    run: Path
    media: Path
    manifest: Manifest
    store: TokenStore

    def record(self, name: str) -> Record:
        return next(r for r in self.manifest.records if r.uid == f"made/{name}")


def make_run(root: Path, weights: Mapping[str, Path]) -> Made:
    """Train on four clips for a moment; index and extract those that lack something, too."""
    from PIL import Image

    media = root / "media"
    media.mkdir(parents=True)
    rows = ["file,label,split,subtitle,description"]
    for i in range(4):
        write_clip(media / f"c{i}.mp4", seed=i)
        said = ("It is raining.", "")[i // 2]
        rows.append(
            f"c{i}.mp4,{('happy', 'sad')[i % 2]},train,{said},The voice is {('high', 'low')[i % 2]}."
        )
    write(media / "silent.mp4", n=10)
    tone = (20000 * sine(220, 0.6, 16000, 1)[0]).astype(np.int16)
    write_wav(media / "sound.wav", tone, 16000)
    Image.fromarray(stamped(5)).save(media / "still.png")
    rows += [f"{name},,test,," for name in ("silent.mp4", "sound.wav", "still.png")]
    (root / "labels.csv").write_text("\n".join(rows))
    manifest, _ = index_folder(
        media, root / "m.parquet", labels_csv=root / "labels.csv", corpus="made"
    )
    write_manifest(root / "m.parquet", manifest)
    settings = ["stages.0.n_steps=6", "stages.1.n_steps=16", "data.val_split=null"]
    preset = configure(
        demo(), [*settings, "stages.0.optim.batch_size=8", "stages.1.optim.batch_size=8"]
    )
    bank = EncoderBank(preset.tokens.all(), weights)
    store = TokenStore.open_or_create(root / "store")
    plan = make_plan(manifest.records, bank.specs, store)
    extract(plan, manifest.records, bank, store, media, batch_tokens=1)
    train(preset, manifest, root / "m.parquet", store, root / "run")
    return Made(root / "run", media, manifest, store)
