"""Every pre-fusion against its equations, its masks and its derivative."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from cache.errors import SpecMismatchError
from train.config import FusionConfig, FusionKind, configure
from train.fusion import KINDS, PreFusion, fused_mask, make_fusion, resample
from train.presets import v2

ALL = [kind for kind in get_args(FusionKind) if kind != "none"]
PAIRED = ["attention", "conv", "conv-attention"]
GATED = ["attention", "conv-attention", "affectgpt-attention"]
VARIANTS = [(kind, "linear") for kind in ALL] + [(kind, "softmax") for kind in GATED]
WIDTHS = (3, 4, 2)
"""Channels of audio, image and video; all differ, so that none can stand for another."""


def build(kind: str, **overrides: Any) -> PreFusion:
    """Return a small module in float64 whose every parameter is drawn, biases and norms too."""
    torch.manual_seed(0)
    sizes = {"hidden_width": 6, "width": 4, "n_blocks": 2, "out_width": 3, "dropout": 0.0}
    queries = {"n_queries": 5, "n_layers": 2, "n_heads": 2}
    fusion = make_fusion(FusionConfig(kind=kind, **{**sizes, **queries, **overrides}), *WIDTHS)
    assert fusion is not None
    fusion.double().eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fusion


def draw(n: int, n_audio: int = 6, n_video: int = 6) -> tuple[Tensor, ...]:
    """Return audio, image_cls, video, their masks with holes; sample 0 has every stream."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    audio_mask = torch.rand(n, n_audio, generator=g) > 0.4
    video_mask = torch.rand(n, n_video, generator=g) > 0.4
    audio_mask[0, 0] = video_mask[0, -1] = True
    image_mask = torch.arange(n) % 2 == 0
    return (
        normal(n, n_audio, WIDTHS[0]),
        normal(n, WIDTHS[1]),
        normal(n, n_video, WIDTHS[2]),
        audio_mask,
        image_mask,
        video_mask,
    )


def test_the_table_covers_every_kind() -> None:
    assert set(KINDS) == set(get_args(FusionKind))
    assert len(set(KINDS.values())) == len(KINDS)
    config = FusionConfig(kind="none", hidden_width=1, width=1, n_blocks=1, out_width=1, dropout=0)
    assert make_fusion(config, *WIDTHS) is None


@pytest.mark.parametrize("kind", ALL)
def test_shape_and_mask(kind: str) -> None:
    audio, cls, video, audio_mask, image_mask, video_mask = draw(4)
    audio_mask[1:], video_mask[1:], image_mask[:] = False, False, torch.tensor([0, 1, 0, 0])
    video_mask[2, 4] = True  # sample 1: image only, 2: one video token, 3: nothing at all
    audio_mask[0], video_mask[0] = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]).bool()
    fused, mask = build(kind)(audio, cls, video, audio_mask, image_mask, video_mask)
    by_token = [[1, 1, 0, 0, 0, 1], [1] * 6, [0, 0, 0, 0, 1, 0], [0] * 6]
    n = {"q-former": 5, "affectgpt-attention": 1}.get(kind, 6)
    expected = by_token if kind in PAIRED else [[max(row)] * n for row in by_token]
    assert fused.shape == (4, n, 3)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("kind", get_args(FusionKind))
@pytest.mark.parametrize("n_tokens", [None, 2, 6, 9])
def test_the_mask_alone_is_the_mask_of_the_module(kind: str, n_tokens: int | None) -> None:
    *tokens, audio_mask, image_mask, video_mask = draw(8)
    audio_mask[2:5], video_mask[3:], image_mask[4:6] = False, False, False
    masks = audio_mask, image_mask, video_mask
    sizes = {"hidden_width": 6, "width": 4, "n_blocks": 2, "out_width": 3, "dropout": 0.0}
    config = FusionConfig(kind=kind, n_tokens=n_tokens, n_queries=5, **sizes)
    got = fused_mask(config, *masks)
    expected = torch.zeros(8, 0).bool()
    if kind != "none":
        _, expected = build(kind, n_tokens=n_tokens)(*tokens, *masks)
        assert got.any()
        assert not got.all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ALL)
def test_v2_sizes_parameters_and_layout(kind: str) -> None:
    h, c, out, widths = 512, 128, 256, (1280, 1408, 1408)

    def linear(d_in: int, d_out: int) -> int:
        return (d_in + 1) * d_out

    def mlp(d_in: int) -> int:
        return linear(d_in, h) + linear(h, c)

    streams = sum(mlp(d) for d in widths) + linear(c, out)
    attention = mlp(3 * c) + linear(c, 3)
    conv = linear(3 * c, c) + 4 * linear(3 * c, c)  # a kernel of 3 has as many as 3 streams
    block = 8 * linear(c, c) + linear(c, h) + linear(h, c) + 3 * 2 * c
    q_former = sum(linear(d, c) for d in widths) + (64 + 3) * c + 2 * block + linear(c, out)
    expected = {
        "q-former": q_former,
        "affectgpt-attention": streams + attention,
        "attention": streams + attention,
        "conv": streams + conv,
        "conv-attention": streams + attention + conv,
    }
    assert expected["conv-attention"] == 2_838_275
    preset = configure(v2(), [f"model.fusion.kind={kind}"])
    with torch.device("meta"):
        fusion = make_fusion(preset.model.fusion, *widths)
        assert fusion is not None
        ones = torch.ones(2, 64, dtype=torch.bool)
        inputs = [torch.empty(2, 64, 1280), torch.empty(2, 1408), torch.empty(2, 64, 1408)]
        fused, mask = fusion(*inputs, ones, ones[:, 0], ones)
    assert sum(p.numel() for p in fusion.parameters()) == expected[kind]
    n_fusion = dict(preset.layout().blocks)["fusion"]
    assert fused.shape == (2, n_fusion, out)
    assert mask.shape == (2, n_fusion)


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_the_configured_one(kind: str) -> None:
    modules = list(build(kind, dropout=0.3).modules())
    assert {m.p for m in modules if isinstance(m, nn.Dropout)} == {0.3}
    assert all(m.dropout == 0.3 for m in modules if isinstance(m, nn.MultiheadAttention))


@pytest.mark.parametrize(("kind", "gate"), VARIANTS)
def test_gradcheck_of_inputs_and_parameters(kind: str, gate: str) -> None:
    fusion = build(kind, gate=gate, n_tokens=2, n_queries=2, n_blocks=1, out_width=2)
    *inputs, audio_mask, image_mask, video_mask = draw(2, n_audio=3, n_video=2)
    names = [name for name, _ in fusion.named_parameters()]

    def fused(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors[3:], strict=True))
        arguments = (*tensors[:3], audio_mask, image_mask, video_mask)
        result: Tensor = torch.func.functional_call(fusion, values, arguments)[0]
        return result

    leaves = [t.detach().requires_grad_() for t in (*inputs, *fusion.parameters())]
    assert torch.autograd.gradcheck(fused, leaves)


@pytest.mark.parametrize(("kind", "gate"), VARIANTS)
def test_every_parameter_learns(kind: str, gate: str) -> None:
    fusion = build(kind, gate=gate).train()
    fused, _ = fusion(*draw(4))
    (fused * torch.linspace(-1, 1, fused.numel()).view_as(fused)).sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize(("kind", "gate"), VARIANTS)
def test_what_is_masked_cannot_speak(kind: str, gate: str) -> None:
    fusion = build(kind, gate=gate)
    batch = draw(4)
    for stream in range(3):
        for whole in (True, False):  # the stream of all samples, or the tokens masked anyway
            tokens, mask = list(batch[:3]), [m.clone() for m in batch[3:]]
            mask[stream] &= not whole
            before, _ = fusion(*tokens, *mask)
            hidden = ~mask[stream].unsqueeze(-1)
            tokens[stream] = torch.where(hidden, 1e3 * tokens[stream] - 7, tokens[stream])
            assert torch.equal(fusion(*tokens, *mask)[0], before)
            heard, _ = fusion(*tokens, *(torch.ones_like(m) for m in mask))
            assert not torch.allclose(heard, before)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "q-former"])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_masked_stream_equals_one_that_says_zero(kind: str, stream: int) -> None:
    fusion = build(kind)
    *tokens, audio, image, video = draw(4)
    masks = [torch.ones_like(m) for m in (audio, image, video)]
    silent = [m & (s != stream) for s, m in enumerate(masks)]
    masked, _ = fusion(*tokens, *silent)
    with torch.no_grad():
        for parameter in fusion.prep[("audio", "image", "video")[stream]].parameters():
            parameter.zero_()
    torch.testing.assert_close(fusion(*tokens, *masks)[0], masked)


@pytest.mark.parametrize(("kind", "n_left"), [("q-former", 0), ("q-former", 4), (ALL[1], 4)])
def test_a_masked_end_equals_a_shorter_stream(kind: str, n_left: int) -> None:
    fusion = build(kind)
    audio, cls, video, audio_mask, image_mask, video_mask = draw(4, n_audio=6, n_video=8)
    audio_mask[:, n_left:] = False
    long, _ = fusion(audio, cls, video, audio_mask, image_mask, video_mask)
    cut = audio[:, :n_left], cls, video, audio_mask[:, :n_left], image_mask, video_mask
    torch.testing.assert_close(fusion(*cut)[0], long)


@pytest.mark.parametrize(("kind", "gate"), VARIANTS)
def test_a_sample_without_any_stream_stays_finite(kind: str, gate: str) -> None:
    fusion = build(kind, gate=gate)
    *tokens, audio_mask, image_mask, video_mask = draw(2)
    tokens = [t.requires_grad_() for t in tokens]
    for mask in (audio_mask, image_mask, video_mask):
        mask[1] = False
    fused, valid = fusion(*tokens, audio_mask, image_mask, video_mask)
    assert fused.isfinite().all()
    assert valid[0].any()
    assert not valid[1].any()
    fused.square().sum().backward()
    for leaf in (*fusion.parameters(), *tokens):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert all(not t.grad[1].any() for t in tokens)
    alone, _ = fusion(*(x[:1] for x in (*tokens, audio_mask, image_mask, video_mask)))
    torch.testing.assert_close(alone, fused[:1])


class ByHand:
    """One sample at a time, token by token, from a state_dict and the equations."""

    def __init__(self, fusion: nn.Module) -> None:
        self.state = fusion.state_dict()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.3", self.linear(f"{name}.0", x).clamp(min=0)).clamp(min=0)

    def parts(self, values: list[Tensor], there: list[bool]) -> list[Tensor]:
        names = ("prep.audio", "prep.image", "prep.video")
        return [self.mlp(s, x) * int(m) for s, x, m in zip(names, values, there, strict=True)]

    def attention(self, parts: list[Tensor], there: list[bool], gate: str) -> Tensor:
        weights = self.linear("attn_gate", self.mlp("attn_mlp", torch.cat(parts))).tolist()
        if gate == "softmax":
            exps = [math.exp(w) * m for w, m in zip(weights, there, strict=True)]
            weights = [e / (sum(exps) or 1.0) for e in exps]
        return sum((w * x for w, x in zip(weights, parts, strict=True)), torch.zeros(4))

    def conv(self, parts: list[list[Tensor]]) -> list[Tensor]:
        x = [
            self.state["conv_in.weight"][:, :, 0] @ torch.cat(p) + self.state["conv_in.bias"]
            for p in parts
        ]
        for k in range(2):
            w, bias = (self.state[f"conv_blocks.{k}.conv.{p}"] for p in ("weight", "bias"))
            padded = [torch.zeros_like(bias), *x, torch.zeros_like(bias)]
            for t in range(len(x)):
                y = sum((w[:, :, j] @ padded[t + j] for j in range(3)), bias)
                x[t] = x[t] + y / (1 + torch.exp(-y))
        return x

    def norm(self, name: str, x: Tensor) -> Tensor:
        unit = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return self.state[f"{name}.weight"] * unit + self.state[f"{name}.bias"]

    def read(self, name: str, queries: list[Tensor], memory: list[Tensor]) -> list[Tensor]:
        """Two heads of two channels: softmax(q k / sqrt 2) v, then the output projection."""
        w, b = self.state[f"{name}.in_proj_weight"], self.state[f"{name}.in_proj_bias"]
        keys = [w[4:8] @ m + b[4:8] for m in memory]
        values = [w[8:] @ m + b[8:] for m in memory]
        read = []
        for query in queries:
            q, heads = w[:4] @ query + b[:4], []
            for head in (slice(0, 2), slice(2, 4)):
                exps = [math.exp(float(q[head] @ k[head]) / math.sqrt(2)) for k in keys]
                heads.append(
                    sum(e / sum(exps) * v[head] for e, v in zip(exps, values, strict=True))
                )
            read.append(self.linear(f"{name}.out_proj", torch.cat(heads)))
        return read


@pytest.mark.parametrize("kind", PAIRED)
@pytest.mark.parametrize("gate", ["linear", "softmax"])
@pytest.mark.parametrize("n_tokens", [None, 3])
def test_paired_kinds_equal_a_loop_from_the_equations(
    kind: str, gate: str, n_tokens: int | None
) -> None:
    fusion = build(kind, gate=gate, n_tokens=n_tokens)
    hand = ByHand(fusion)
    n_video = 6 if n_tokens is None else 3
    audio, cls, video, audio_mask, image_mask, video_mask = draw(3, 6, n_video)
    got, _ = fusion(audio, cls, video, audio_mask, image_mask, video_mask)
    if n_tokens is not None:  # audio by twos
        audio = (audio * audio_mask.unsqueeze(-1)).unflatten(1, (3, 2)).sum(2)
        n_valid = audio_mask.unflatten(1, (3, 2)).sum(2)
        audio, audio_mask = audio / n_valid.clamp(min=1).unsqueeze(-1), n_valid > 0
    for b in range(3):
        there = [
            [bool(audio_mask[b, t]), bool(image_mask[b]), bool(video_mask[b, t])]
            for t in range(n_video)
        ]
        parts = [hand.parts([audio[b, t], cls[b], video[b, t]], m) for t, m in enumerate(there)]
        branches = []
        if kind != "conv":
            pairs = zip(parts, there, strict=True)
            branches.append([hand.attention(p, m, gate) for p, m in pairs])
        if kind != "attention":
            branches.append(hand.conv(parts))
        expected = [hand.linear("merge", sum(mixed)) for mixed in zip(*branches, strict=True)]
        torch.testing.assert_close(got[b], torch.stack(expected))


def test_conv_attention_merges_the_sum_of_its_branches() -> None:
    both, batch = build("conv-attention"), draw(3)
    fused = []
    for kind in ("attention", "conv"):
        branch = build(kind)
        missing, unexpected = branch.load_state_dict(both.state_dict(), strict=False)
        assert not missing
        assert unexpected
        fused.append(branch(*batch)[0])
    torch.testing.assert_close(both(*batch)[0] + both.merge.bias, fused[0] + fused[1])


@pytest.mark.parametrize("gate", ["linear", "softmax"])
def test_affectgpt_attention_weighs_the_means_of_valid_tokens(gate: str) -> None:
    fusion = build("affectgpt-attention", gate=gate, n_tokens=5)  # of the paired kinds only
    hand = ByHand(fusion)
    audio, cls, video, *_ = draw(2, n_audio=4, n_video=3)
    audio_mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    video_mask = torch.tensor([[0, 1, 0], [1, 1, 1]]).bool()
    image_mask = torch.tensor([True, False])
    got, _ = fusion(audio, cls, video, audio_mask, image_mask, video_mask)
    means = [
        [(audio[0, 0] + audio[0, 2] + audio[0, 3]) / 3, cls[0], video[0, 1]],
        [-audio[1, 0], cls[1], (video[1, 0] + video[1, 1] + video[1, 2]) / 3],
    ]
    for b, there in enumerate(([True, True, True], [False, False, True])):
        parts = hand.parts(means[b], there)
        expected = hand.linear("merge", hand.attention(parts, there, gate))
        torch.testing.assert_close(got[b, 0], expected)


def test_q_former_equals_explicit_softmax_attention() -> None:
    fusion = build("q-former")
    hand = ByHand(fusion)
    batch = audio, cls, video, audio_mask, image_mask, video_mask = draw(4, n_audio=5, n_video=4)
    audio_mask[3] = image_mask[3] = video_mask[3] = False
    got, _ = fusion(*batch)
    for b in range(4):
        memory = []
        for s, (x, mask) in enumerate(
            [
                (audio[b], audio_mask[b]),
                (cls[b : b + 1], image_mask[b : b + 1]),
                (video[b], video_mask[b]),
            ]
        ):
            name = ("audio", "image", "video")[s]
            for t in range(len(x)):
                # Channels 0 and 1 turn by one radian a token, 2 and 3 by 10,000 ** -0.5 of it.
                place = [math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)]
                token = hand.linear(f"prep.{name}", x[t]) + hand.state["stream_embeddings"][s]
                memory += [token + torch.tensor(place).double()] if mask[t] else []
        memory = memory or [torch.zeros(4).double()]  # nothing is there: zeros are read
        x = list(hand.state["queries"])
        for k in range(2):
            own = hand.read(f"blocks.{k}.self_attn", x, x)
            x = [hand.norm(f"blocks.{k}.norm1", q + o) for q, o in zip(x, own, strict=True)]
            found = hand.read(f"blocks.{k}.multihead_attn", x, memory)
            x = [hand.norm(f"blocks.{k}.norm2", q + o) for q, o in zip(x, found, strict=True)]
            for i, q in enumerate(x):
                inner = hand.linear(f"blocks.{k}.linear1", q)
                inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
                x[i] = hand.norm(f"blocks.{k}.norm3", q + hand.linear(f"blocks.{k}.linear2", inner))
        expected = torch.stack([hand.linear("merge", q) for q in x])
        torch.testing.assert_close(got[b], expected)


@pytest.mark.parametrize("kind", PAIRED)
def test_unequal_numbers_need_n_tokens(kind: str) -> None:
    batch = draw(2, n_audio=6, n_video=4)
    with pytest.raises(SpecMismatchError, match=r"6 tokens and video 4.*model\.fusion\.n_tokens"):
        build(kind)(*batch)
    assert build(kind, n_tokens=5)(*batch)[0].shape == (2, 5, 3)


def test_resample_to_the_same_number_is_free() -> None:
    tokens, mask = torch.randn(2, 5, 3), torch.rand(2, 5) > 0.5
    same, same_mask = resample(tokens, mask, 5)
    assert same is tokens
    assert same_mask is mask


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_fewer_tokens_are_means_of_the_valid_ones_in_each_bin(n: int) -> None:
    tokens, _, _, mask, *_ = draw(5, n_audio=7)
    all_valid, full = resample(tokens, torch.ones_like(mask), n)
    pooled = nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), n).transpose(1, 2)
    assert torch.equal(all_valid, pooled)
    assert full.all()
    mask[0], mask[1] = False, torch.tensor([1, 0, 0, 0, 0, 0, 0]).bool()
    got, got_mask = resample(tokens, mask, n)
    assert got.isfinite().all()
    for b in range(5):
        for i in range(n):
            inside = [t for t in range(i * 7 // n, -(-(i + 1) * 7 // n)) if mask[b, t]]
            assert bool(got_mask[b, i]) == bool(inside)
            if inside:
                expected = sum(tokens[b, t] for t in inside) / len(inside)
                torch.testing.assert_close(got[b, i], expected)


def test_more_tokens_are_repeats() -> None:
    tokens = torch.arange(6.0).view(2, 3, 1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    got, got_mask = resample(tokens, mask, 7)
    which = [0, 0, 0, 1, 1, 2, 2]  # floor(3 i / 7)
    assert got.squeeze(-1).tolist() == [[float(t) for t in which], [3.0 + t for t in which]]
    assert got_mask.tolist() == [[row[t] for t in which] for row in mask.tolist()]
