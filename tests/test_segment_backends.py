"""Which backend attends over segments; and the CUDA kernels, by functions that stand in."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastdaa.data.collate import PairCollator
from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.train import segment_backends
from fastdaa.train.segment_backends import BACKENDS, choose_backend
from fastdaa.train.segments import segment_attention

LOOPS = ("cpu_blocks", "sdpa_loop", "eager_loop")
RAGGED = ((30, 70, 150), (1, 1, 1), (0, 3, 4), (5, 0, 2), (5, 2, 0), (63, 1, 64), (2, 130, 5))


def segments_of(lengths):
    """Segments of a prefix-shared row of pairs with these prompt, chosen, rejected lengths."""
    rows = [
        {"row_id": 0, **{f: [5] * n for f, n in zip(TOKEN_FIELDS, pair, strict=True)}}
        for pair in lengths
    ]
    return PairCollator("prefix_shared")(rows)["packs"][0]["segments"]


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Lets the CUDA backends accept CPU tensors, for functions that stand in for kernels."""
    monkeypatch.setattr(segment_backends, "_DEVICES", {})
    monkeypatch.setattr(segment_backends, "flash_attn_version", lambda: (2, 8))
    choose_backend.cache_clear()
    yield monkeypatch
    choose_backend.cache_clear()


def documented_varlen(q, k, v, cu_q, cu_k, scale, left, softcap=None):
    """What flash-attn documents: each slice alone, causal from the bottom right, left window."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    pieces = []
    for i in range(len(cu_q) - 1):
        a, b, c, d = cu_q[i], cu_q[i + 1], cu_k[i], cu_k[i + 1]
        queries, keys = int(b - a), int(d - c)
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[c:d].float()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
        seen = (j <= i) if left < 0 else (j <= i) & (j >= i - left)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[c:d].float()))
    return torch.cat(pieces).to(q.dtype)


def check_varlen(backend, window, softcap=None, lengths=RAGGED):
    segments = segments_of(lengths)
    torch.manual_seed(0)
    size = sum(segments["q_lens"])
    inputs = [
        torch.randn(1, size, heads, 8).bfloat16().transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]
    wide = [t.detach().float() for t in inputs]
    expected = segment_attention(*wide, segments, window=window, softcap=softcap)
    segments["backend"] = backend
    found = segment_attention(*inputs, segments, window=window, softcap=softcap)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(found.sum(), inputs))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (7, 2.0)])
def test_flash_attn_call(pretend_cuda, window, softcap):
    def kernel(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, deterministic, softcap=0.0,
    ):  # fmt: skip
        assert causal and dropout_p == 0.0 and not deterministic
        assert (max_seqlen_q, max_seqlen_k) == (150, 180)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        return documented_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap
        )

    pretend_cuda.setattr(segment_backends, "flash_attn_varlen", lambda: kernel)
    check_varlen("flash_attn", window, softcap)


@pytest.mark.parametrize("lengths", [RAGGED, ((3, 4, 0), (60, 1, 0))], ids=["shared", "packed"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "repeated"])
def test_torch_varlen_call(pretend_cuda, window, lengths, grouped):
    """PyTorch 2.11 has no ``enable_gqa``: the heads of the keys are repeated."""
    real = segment_backends.torch_varlen()
    if real is None:
        pytest.skip("this PyTorch has no varlen_attn with a scale and windows")
    if grouped and not segment_backends.varlen_groups_heads(real):
        pytest.skip("this PyTorch's varlen_attn has no enable_gqa")

    def kernel(*args, **kwargs):
        given = inspect.signature(real).bind(*args, **kwargs).arguments
        assert given["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
        assert given.get("enable_gqa", False) == grouped
        heads = {given[name].shape[1] for name in ("query", "key", "value")}
        assert len(heads) == (2 if grouped else 1)
        q, k, v = given["query"], given["key"], given["value"]
        cu_q, cu_k = given["cu_seq_q"], given["cu_seq_k"]
        return documented_varlen(q, k, v, cu_q, cu_k, given["scale"], given["window_size"][0])

    pretend_cuda.setattr(segment_backends, "torch_varlen", lambda: kernel)
    pretend_cuda.setattr(segment_backends, "varlen_groups_heads", lambda _: grouped)
    check_varlen("torch_varlen", window, lengths=lengths)


CHOICES = {
    "cpu": (("cpu", torch.float32), {}, "cpu_blocks"),
    "cpu, softcap": (("cpu", torch.float32), {"softcap": 50.0}, "eager_loop"),
    "cpu, dropout": (("cpu", torch.bfloat16), {"dropout": 0.1}, "sdpa_loop"),
    "cuda, fp32": (("cuda", torch.float32), {}, "sdpa_loop"),
    "cuda, softcap": (("cuda", torch.bfloat16), {"softcap": 50.0}, "eager_loop"),
    "cuda, odd head": (("cuda", torch.bfloat16), {"head_dim": 20}, "sdpa_loop"),
    "mps": (("mps", torch.float16), {}, "sdpa_loop"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case, monkeypatch):
    where, options, expected = CHOICES[case]
    monkeypatch.setattr(segment_backends, "flash_attn_varlen", lambda: None)
    choose_backend.cache_clear()
    choice = choose_backend(*where, **{"head_dim": 64, **options})
    assert choice.name == expected
    assert choice.reason
    choose_backend.cache_clear()


def test_explicit_choice_works_or_raises():
    for name in LOOPS:
        assert choose_backend("cpu", torch.float32, head_dim=8, requested=name).name == name
    with pytest.raises(ValueError, match=r"'flash_attn' .* needs a cuda device, not cpu"):
        choose_backend("cpu", torch.float32, head_dim=8, requested="flash_attn")
    with pytest.raises(ValueError, match=r"has no softcap"):
        choose_backend("cpu", torch.float32, head_dim=8, softcap=5.0, requested="cpu_blocks")
    with pytest.raises(ValueError, match=r"out of .*, got 'fast'"):
        choose_backend("cpu", torch.float32, head_dim=8, requested="fast")
    assert set(LOOPS) < set(BACKENDS)
