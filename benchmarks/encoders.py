"""The networks that extraction is measured with, in three sizes.

Their weights are made up (`extract.tiny.made_up`): speed does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache.encoders import NAMED_ENCODERS, Encoder, EvaEncoder, WhisperEncoder
from cache.spec import TokenSpec


@dataclass(frozen=True)
class Networks:
    """The networks of the three streams."""

    name: str
    whisper: WhisperEncoder
    eva: EvaEncoder

    def specs(self) -> tuple[TokenSpec, ...]:
        """Return the paper's three streams with these networks."""
        from train.presets import v2

        tokens, by_stream = v2().tokens, self.by_stream()
        return tuple(
            spec.model_copy(update={"encoder": by_stream[spec.stream]}) for spec in tokens.all()
        )

    def settings(self) -> list[str]:
        """Return the same for the command line."""
        return [
            f"tokens.{x}.encoder={net.model_dump_json()}" for x, net in self.by_stream().items()
        ]

    def by_stream(self) -> dict[str, Encoder]:
        """Return the network of each stream."""
        return {"audio": self.whisper, "video": self.eva, "image": self.eva}


TINY = Networks(
    "Whisper 64x2, EVA 96x2",
    WhisperEncoder(width=64, n_layers=2, n_heads=4, n_mels=80),
    EvaEncoder(width=96, depth=2, n_heads=4, mlp_width=384),
)
MIDDLE = Networks(
    "Whisper base (512x6), EVA 384x12",
    WhisperEncoder.model_validate(NAMED_ENCODERS["whisper-base"]),
    EvaEncoder(width=384, depth=12, n_heads=6, mlp_width=1536),
)
FULL = Networks(
    "Whisper-large-v3 (1280x32), EVA ViT-g (1408x39)",
    WhisperEncoder.model_validate(NAMED_ENCODERS["whisper-large-v3"]),
    EvaEncoder.model_validate(NAMED_ENCODERS["eva-g"]),
)
