"""Every real clip, asked without a store: answered as from one, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache.errors import MediaError
from cache.store import TokenStore
from eval.generate import generate
from eval.live.answer import LiveModel
from eval.live.files import find_clips
from extract.encoders.bank import EncoderBank
from extract.index import index_folder
from extract.plan import make_plan
from extract.run import extract
from tests.raw_clips import make_run
from train.batches.reading import ViewReader
from train.presets import demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


def test_every_real_clip_is_answered_as_from_a_store(
    shared_clips: Path, tmp_path: Path, tiny_weights: dict[str, Path]
) -> None:
    made = make_run(tmp_path / "made", tiny_weights)
    manifest, _ = index_folder(shared_clips, tmp_path / "m.parquet", corpus="made")
    bank = EncoderBank(demo().tokens.all(), tiny_weights)
    store = TokenStore.open_or_create(tmp_path / "store")
    plan = make_plan(manifest.records, bank.specs, store)
    extract(plan, manifest.records, bank, store, shared_clips, batch_tokens=1)
    records = {record.media: record for record in manifest.records}
    files, remarks = find_clips([shared_clips])
    assert len(files) == len(records) == 26
    assert len(remarks) == 1  # the two descriptions of the files are no media
    with LiveModel.load(made.run) as live:
        reader = ViewReader(store, live.trained.preset)
        for path, name in files:
            record = records[path.name]
            seen = live.look(path, name=name)
            assert seen.record == record
            stored = reader.read([record])
            for stream, tokens in stored.tokens.items():
                assert torch.equal(seen.views.tokens[stream], tokens), (name, stream)
            for stream, mask in stored.masks.items():
                assert torch.equal(seen.views.masks[stream], mask), (name, stream)
            [expected] = generate(live.trained, store, [record], task="think", max_new_tokens=60)
            found = live.ask(seen, "think", max_new_tokens=60).prediction
            assert found.reply == expected.reply, name
            about = {"about": None}  # a raw file tells its length where its header does not
            assert found.model_copy(update=about) == expected.model_copy(update=about)
        for text in ("PROVENANCE.md", "clips.jsonl"):
            with pytest.raises(MediaError, match="cannot be opened as media"):
                live.look(shared_clips / text)
