"""The card of a stored spec: what its tokens are and how they were made, in Markdown, to be cited."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from cache import layout
from cache.commit import Commit, Entry, Status
from cache.encoders import AUDIO_FRAMES_PER_S, HubertEncoder, SoundEncoder, WhisperEncoder
from cache.spec import FaceCrop, Frames, Pixels, TokenSpec
from cache.store import TokenStore

_REASONS = 10
"""Classes of failures that are listed; the rest is counted together."""

_NORMS = {
    "affine_free": "LayerNorm without learnt scale (eps 1e-5)",
    "checkpoint": "the checkpoint's own LayerNorm",
    "none": "none",
}
_FRAMES = {
    "middle": "the middle frame",
    "first": "the first frame",
    "peak": "the frame that the record names as the peak",
}
_AXES = {
    "audio": "tokens x channels, as many tokens as the clip has, up to",
    "video": "frames x patches x channels:",
    "image": "tokens x channels, the CLS token first:",
}
_DTYPES = {
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16, kept as its 16 bits in uint16",
    "int8": "int8 with one scale per token and one exponent per channel (`token_scale`, "
    "`channel_exponent`)",
}


def card(store: TokenStore, spec: TokenSpec) -> str:
    """Describe a stored spec: encoder, preprocessing, storage, counts, dates, versions, how to read it.

    Args:
        store: The store.
        spec: One of its specs.

    Returns:
        Markdown; equal for equal content, wherever the store stands.

    Raises:
        SchemaError: A commit record is damaged.
    """
    commits = list(store.commits(spec))
    title = f"{spec.stream}-{spec.spec_id}"
    parts = [
        f"# Token card: {title}",
        *_origin(commits),
        *_section("Encoder", _table(_encoder(spec))),
        *_section("Preprocessing", _table(_preprocessing(spec))),
        *_section("Storage", _table(_storage(store, spec))),
        *_section("Contents", _table(_contents(store, spec, commits))),
        *_failures(store.index(spec)),
        *_section("Made with", _made_with(commits)),
        *_section("Identity", _identity(spec)),
        *_section("Reading it", _reading(title)),
    ]
    return "\n\n".join(parts) + "\n"


def reason_class(reason: str) -> str:
    """Return a failure's reason without what differs from clip to clip: paths and numbers."""
    without_first = re.sub(r"^[^:]*?\.[A-Za-z]\w{1,3}(?=[: ])", "FILE", reason)
    without_paths = re.sub(r"[^\s'\"]*[/\\][^\s'\":]*", "FILE", without_first)
    return re.sub(r"\b\d[\d.]*\b", "N", without_paths)


def _section(title: str, *body: str) -> list[str]:
    return [f"## {title}", *body]


def _table(rows: Iterable[tuple[str, object]]) -> str:
    lines = ["| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {_cell(value)} |" for name, value in rows])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _origin(commits: Sequence[Commit]) -> list[str]:
    """Warn if some of the tokens were imported and nothing says what made them."""
    unknown = [commit for commit in commits if "unknown" in commit.provenance.get("origin", "")]
    if not unknown:
        return []
    n_clips = sum(len(commit.clips) for commit in unknown)
    names = sorted({str(c.provenance.get("declared_name", "no name given")) for c in unknown})
    return [
        f"> **Origin unknown.** {len(unknown)} of {len(commits)} units ({n_clips} clips) were imported "
        f"from files ({', '.join(map(_cell, names))}). The encoder and the preprocessing below are what "
        "the importer declared; nothing checked them, and the weights digest is a mark, not that of "
        "any weights."
    ]


def _encoder(spec: TokenSpec) -> list[tuple[str, object]]:
    encoder = spec.encoder
    rows: list[tuple[str, object]] = [("kind", encoder.kind), ("width", encoder.width)]
    if isinstance(encoder, SoundEncoder):
        rows += [("layers", encoder.n_layers), ("heads", encoder.n_heads)]
        if isinstance(encoder, WhisperEncoder):
            rows.append(("mel bins", encoder.n_mels))
        if isinstance(encoder, HubertEncoder):
            scaled = "zero mean, unit variance" if encoder.normalize else "as decoded"
            rows += [("MLP width", encoder.mlp_width), ("waveform", scaled)]
        rows += [
            ("window", f"{encoder.window_s:g} s, {encoder.n_context} frames"),
            ("output", _layer(encoder)),
        ]
    else:
        rows += [
            ("depth", f"{encoder.depth} blocks"),
            ("heads", encoder.n_heads),
            ("MLP width", encoder.mlp_width),
            ("patch", f"{encoder.patch_px} px"),
            ("norm after the last block", _NORMS[encoder.norm]),
        ]
    return [*rows, ("weights SHA-256", f"`{encoder.weights_sha256}`")]


def _layer(encoder: SoundEncoder) -> str:
    if encoder.layer is not None:
        return f"of the encoder, hidden state behind {encoder.layer} of {encoder.n_layers} blocks"
    if isinstance(encoder, HubertEncoder) and not encoder.norm_first:
        return "of the last block"
    return "after the encoder's final LayerNorm"


def _preprocessing(spec: TokenSpec) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if spec.sample_rate_hz is not None:
        rows += [
            ("sound", f"mono, {spec.sample_rate_hz} Hz; {_heard(spec)}"),
            ("token rate", f"{AUDIO_FRAMES_PER_S} per second"),
        ]
    if spec.frames is not None:
        rows.append(("frames", _which_frames(spec.frames)))
    if spec.crop is not None:
        rows.append(("part of a frame", _which_part(spec.crop)))
    if spec.pixels is not None:
        rows += _picture(spec.pixels)
    return [*rows, ("decode policy", spec.decode_policy)]


def _heard(spec: TokenSpec) -> str:
    if isinstance(spec.encoder, WhisperEncoder) and spec.encoder.padded:
        return "all frames of the zero-padded window are kept"
    return "only frames that hear the clip are kept"


def _which_frames(frames: Frames) -> str:
    if frames.kind == "uniform":
        return f"{frames.n_frames}, the centres of as many equal segments"
    if frames.kind == "window":
        return (
            f"{frames.n_frames} consecutive ones at an offset by the clip's digest and seed {frames.seed}; "
            "of a shorter clip as many at equal distances"
        )
    return _FRAMES[frames.kind]


def _which_part(crop: FaceCrop) -> str:
    return (
        f"the square around the face as {crop.by} found it, with {crop.margin:g} of its longer edge added "
        "on each side, moved to lie within the picture"
    )


def _picture(pixels: Pixels) -> list[tuple[str, object]]:
    return [
        ("picture", f"{pixels.size_px} x {pixels.size_px} px, aspect ratio ignored"),
        ("interpolation", pixels.interpolation),
        ("mean", ", ".join(map(repr, pixels.mean))),
        ("std", ", ".join(map(repr, pixels.std))),
    ]


def _storage(store: TokenStore, spec: TokenSpec) -> list[tuple[str, object]]:
    shape = " x ".join(map(str, spec.max_shape))
    rows: list[tuple[str, object]] = [
        ("shape of a clip", f"{_AXES[spec.stream]} {shape}"),
        ("dtype", _DTYPES[spec.dtype]),
    ]
    rows += _pooling(spec)
    version = json.loads(store.storage.read(layout.MARKER))["version"]
    plan = store.plan(spec)
    return [
        *rows,
        ("compression", store.compression if plan is None else plan.compression),
        ("store format version", version),
    ]


def _pooling(spec: TokenSpec) -> list[tuple[str, object]]:
    if spec.utterance:
        what = "the CLS tokens" if spec.cls_only else "all tokens"
        return [("pooling", f"mean of {what} of the clip (utterance)")]
    if spec.cls_only:
        return [("pooling", "CLS tokens alone")]
    if spec.stream == "audio":
        return []
    side = spec.patches_per_side
    pooled = f"{side} x {side} patches averaged to {spec.grid} x {spec.grid}"
    return [("pooling", "none" if spec.grid is None else pooled)]


def _contents(
    store: TokenStore, spec: TokenSpec, commits: Sequence[Commit]
) -> list[tuple[str, object]]:
    index = store.index(spec)
    counts = index.counts()
    dates = sorted(commit.created for commit in commits)
    return [
        *((f"clips {status.value}", counts[status]) for status in Status),
        ("clips truncated to the window", sum(entry.truncated for entry in index)),
        ("units", index.n_units),
        ("size", f"{index.n_bytes} bytes"),
        ("first commit", dates[0] if dates else "none"),
        ("last commit", dates[-1] if dates else "none"),
    ]


def _failures(entries: Iterable[Entry]) -> list[str]:
    classes = Counter(
        reason_class(entry.reason or "no reason recorded")
        for entry in entries
        if entry.status is Status.FAILED
    )
    if not classes:
        return []
    shown = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in shown[_REASONS:])
    lines = [f"- {n} x {_cell(reason)}" for reason, n in shown[:_REASONS]]
    lines += [f"- {rest} x {len(shown) - _REASONS} other reasons"] if rest else []
    return ["Failed, by reason (paths and numbers left out):", "\n".join(lines)]


def _made_with(commits: Sequence[Commit]) -> str:
    """List every distinct provenance, with how many units and clips have it."""
    units: Counter[str] = Counter()
    clips: Counter[str] = Counter()
    for commit in commits:
        line = ", ".join(f"{name} {value}" for name, value in sorted(commit.provenance.items()))
        units[line] += 1
        clips[line] += len(commit.clips)
    lines = [
        f"| {units[line]} | {clips[line]} | {_cell(line) or 'not recorded'} |"
        for line in sorted(units, key=lambda line: (-units[line], line))
    ]
    return "\n".join(["| units | clips | versions and device |", "|---|---|---|", *lines])


def _identity(spec: TokenSpec) -> str:
    text = spec.canonical_json()
    return (
        f"Cite these tokens as `{spec.stream}-{spec.spec_id}`. The id is the first 16 hexadecimal digits "
        "of the SHA-256 of the spec, as JSON with sorted keys and no white space:\n\n"
        f"```json\n{text}\n```\n\n"
        "```python\n"
        "import hashlib\n"
        f"print(hashlib.sha256({text.encode()!r}).hexdigest()[:16])\n"
        "```"
    )


def _reading(title: str) -> str:
    return (
        "With `zarr` 3 alone, from the store's folder; each row is a clip, `clip` holds the SHA-256 that "
        "names it:\n\n"
        "```python\n"
        "import zarr\n\n"
        f'tokens = zarr.open_group("{layout.ZARR}/{title}", mode="r")\n'
        'row = (tokens["status"][:] == 0).nonzero()[0][0]\n'
        'print(bytes(tokens["clip"][row]).hex())\n'
        'print(tokens["tokens"][row, : tokens["valid_len"][row]].shape)\n'
        "```"
    )
