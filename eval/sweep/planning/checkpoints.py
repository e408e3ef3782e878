"""Which checkpoints a sweep's encoders have, and which weights that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cache.encoders import NAMED_ENCODERS
from cache.errors import CheckpointError, EmocacheError, SchemaError, near_miss
from cache.spec import STREAMS, TokenSpec
from cache.store import TokenStore
from eval.sweep.schema import Trial
from extract.encoders.bank import EncoderBank, checkpoint_names
from extract.plan import Plan
from train.config import Preset


class Checkpoints:
    """Which checkpoint a spec has, and its digest."""

    def __init__(self, weights: Mapping[str, Path], store: TokenStore | None) -> None:
        self._weights = weights
        self._store = store
        self._known: dict[tuple[str, str | None], TokenSpec] = {}
        self.paths: dict[str, Path] = {}
        """spec_id -> checkpoint."""
        self.problems: list[EmocacheError] = []

    def check_names(self, trials: Sequence[Trial]) -> None:
        """Refuse a checkpoint of something unknown; one of a row that is not selected is none."""
        specs = {s.canonical_json(): s for trial in trials for s in trial.preset.tokens.all()}
        fitting = {name for spec in specs.values() for name in checkpoint_names(spec, None)}
        kinds = {str(fields["kind"]) for fields in NAMED_ENCODERS.values()}
        known = sorted(fitting | NAMED_ENCODERS.keys() | kinds | set(STREAMS))
        for name in self._weights:
            if name in known or name.startswith("{"):
                continue
            raise SchemaError(
                f"--encoder-weights {name}=...: unknown name.{near_miss(name, known)} "
                f"Allowed: {', '.join(known)}"
            )

    def fill(self, trial: Trial) -> Trial:
        """Return a trial with the digests of its weights, where they can be known."""
        preset = trial.preset
        tokens = preset.tokens.model_copy(
            update={
                name: self._resolved(spec, preset)
                for name, spec in preset.tokens.by_input().items()
            }
        )
        filled = preset.model_copy(update={"tokens": tokens})
        return Trial(trial.row, trial.seed, filled, trial.stage)

    def _resolved(self, spec: TokenSpec, preset: Preset) -> TokenSpec:
        path = self._path(spec, preset)
        key = spec.canonical_json(), None if path is None else str(path)
        if key not in self._known:
            self._known[key] = self._look_up(spec, path)
        return self._known[key]

    def _path(self, spec: TokenSpec, preset: Preset) -> Path | None:
        names = [spec.canonical_json(), *checkpoint_names(spec, None)]
        given = next((self._weights[name] for name in names if name in self._weights), None)
        if given is None and spec.encoder.kind in preset.bundled_weights:
            from extract import tiny

            return Path(tiny.__file__).parent / preset.bundled_weights[spec.encoder.kind]
        return given

    def _look_up(self, spec: TokenSpec, path: Path | None) -> TokenSpec:
        if path is not None:
            bank = EncoderBank([spec], {"given": path}, names=["given"])
            found = bank.specs[0]
            self.paths[found.spec_id] = bank.path(found)
            return found
        if spec.is_resolved or self._store is None:
            return spec
        sources = self._store.sources(spec)
        digests = {source.encoder.weights_sha256 for source in sources}
        if len(digests) > 1:
            try:
                self._store.resolve(spec)
            except EmocacheError as error:  # names the digests to choose from
                self.problems.append(error)
            return spec
        return spec.with_weights(str(digests.pop())) if digests else spec


def missing_checkpoints(
    plans: Iterable[tuple[Plan, Mapping[str, Path]]],
) -> list[EmocacheError]:
    """Say which encoders must run and have no checkpoint.

    Args:
        plans: What is left to encode, each with its checkpoints by spec_id.
    """
    left = {}
    for plan, weights in plans:
        for spec, label in zip(plan.specs, plan.labels, strict=True):
            if not spec.is_resolved or spec.spec_id not in weights:
                left[label] = checkpoint_names(spec, None)
    if not left:
        return []
    named = [f"{label} ({' or '.join(dict.fromkeys(names))})" for label, names in left.items()]
    return [
        CheckpointError(
            f"clips must be encoded, and no checkpoint is given for {'; '.join(named)}. Give each with "
            "--encoder-weights NAME=PATH."
        )
    ]
