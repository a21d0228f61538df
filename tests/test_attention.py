"""Segment attention against a dense mask, for every backend; and its door in transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastdaa.data.collate import PairCollator
from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.data.packs import dense_mask
from fastdaa.train.attention import ATTENTION_NAME, attention_forward, enable_segments
from fastdaa.train.cpu_attention import Span
from fastdaa.train.segments import segment_attention, segment_spans

LOOPS = ("cpu_blocks", "sdpa_loop", "eager_loop")
# (prompt, chosen, rejected) tokens; 64 queries is the block of the CPU kernel.
RAGGED = ((30, 70, 150), (1, 1, 1), (0, 3, 4), (5, 0, 2), (5, 2, 0), (63, 1, 64), (2, 130, 5))


def segments_of(lengths, backend="auto"):
    """Segments of a prefix-shared row of pairs with these prompt, chosen, rejected lengths."""
    rows = [
        {"row_id": 0, **{f: [5] * n for f, n in zip(TOKEN_FIELDS, pair, strict=True)}}
        for pair in lengths
    ]
    return {**PairCollator("prefix_shared")(rows)["packs"][0]["segments"], "backend": backend}


def tensors(segments, heads=4, groups=4, dim=8, dtype=torch.float64, value_dim=None):
    torch.manual_seed(0)
    length = sum(segments["q_lens"])
    shapes = ((heads, dim), (groups, dim), (groups, value_dim or dim))
    made = [torch.randn(1, length, h, d, dtype=dtype).transpose(1, 2) for h, d in shapes]
    return [t.requires_grad_() for t in made]


def dense_attention(q, k, v, segments, window=None, softcap=None, scale=None):
    """The specification: all scores of the row, and the mask of the segments."""
    mask = dense_mask(segments, q.shape[2], window)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def with_grads(out, inputs):
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights, retain_graph=True)]


# (window, key heads) for four query heads
CASES = [(None, 4), (None, 1), (1, 2), (7, 2), (64, 4), (100, 2)]


@pytest.mark.parametrize(("window", "groups"), CASES)
@pytest.mark.parametrize("backend", LOOPS)
def test_equals_dense_attention(backend, window, groups):
    segments = segments_of(RAGGED, backend)
    inputs = tensors(segments, groups=groups)
    found = with_grads(segment_attention(*inputs, segments, window=window, scale=0.7), inputs)
    expected = with_grads(dense_attention(*inputs, segments, window=window, scale=0.7), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_softcap_equals_dense_attention():
    segments = segments_of(RAGGED)
    inputs = tensors(segments, groups=2)
    found = with_grads(segment_attention(*inputs, segments, window=9, softcap=1.5), inputs)
    expected = with_grads(dense_attention(*inputs, segments, window=9, softcap=1.5), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_value_heads_of_another_size():
    segments = segments_of(RAGGED)
    inputs = tensors(segments, value_dim=5)
    found = with_grads(segment_attention(*inputs, segments), inputs)
    torch.testing.assert_close(found, with_grads(dense_attention(*inputs, segments), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_blocks_in_narrow_types(dtype):
    segments = segments_of(RAGGED, "cpu_blocks")
    inputs = tensors(segments, groups=2, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found = with_grads(segment_attention(*inputs, segments), inputs)
    expected = with_grads(dense_attention(*wide, segments), wide)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).norm() / b.norm()
        assert error < tolerance


def test_backward_twice_is_bitwise_equal():
    segments = segments_of(RAGGED)
    inputs = tensors(segments, groups=2, dtype=torch.float32)
    out = segment_attention(*inputs, segments)
    assert out.is_contiguous()
    for a, b in zip(with_grads(out, inputs), with_grads(out, inputs), strict=True):
        assert torch.equal(a, b)


def test_segments_do_not_see_each_other():
    segments = segments_of(((4, 5, 6), (3, 2, 1)))
    q, k, v = tensors(segments)
    before = segment_attention(q, k, v, segments)
    changed = v.detach().clone()
    changed[:, :, 4:9] += 1  # the first chosen completion
    moved = (segment_attention(q, k, changed, segments) != before).flatten(2).any(-1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 5 + [False] * 12


def test_rows_after_the_last_segment_are_zero():
    segments = segments_of(((4, 5, 6),))
    for backend in LOOPS:
        segments["backend"] = backend
        torch.manual_seed(0)
        q = torch.randn(1, 2, 18, 8)
        out = segment_attention(q, q, q, segments)
        assert torch.equal(out[:, 15:], torch.zeros(1, 3, 2, 8))
        assert out[:, :15].abs().sum(-1).min() > 0


def test_dropout_drops_and_keeps_the_mean():
    segments = segments_of(((100, 100, 100),))
    q, k, v = tensors(segments, dtype=torch.float32)
    torch.manual_seed(0)
    kept = segment_attention(q, k, torch.ones_like(v), segments, dropout=0.3)
    assert kept.std() > 0.01
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


def test_autocast_reaches_the_kernel():
    segments = segments_of(((4, 5, 6),))
    q, k, v = tensors(segments, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = segment_attention(q, k.bfloat16(), v.bfloat16(), segments)
    assert out.dtype == torch.bfloat16


def test_spans():
    assert segment_spans([9, 6, 4], [9, 10, 4]) == [
        Span(0, 0, 0, 9),
        Span(0, 4, 9, 15),
        Span(15, 15, 15, 19),
    ]
    with pytest.raises(ValueError, match="expected segment 1 to have between 2 and 5 keys"):
        segment_spans([3, 2], [3, 6])


def test_rejects_rows_that_do_not_fit():
    segments = segments_of(((4, 5, 6),))
    q = torch.randn(1, 2, 15, 8)
    with pytest.raises(ValueError, match="no key-value cache"):
        segment_attention(q, torch.randn(1, 2, 16, 8), q, segments)
    with pytest.raises(ValueError, match="row of 14, got 15"):
        segment_attention(*[q[:, :, :14]] * 3, segments)


def tiny(name, implementation):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation=implementation
    )
    return model.eval()


@pytest.mark.parametrize(("name", "implementation"), [("Mistral", "sdpa"), ("Gemma2", "eager")])
def test_without_segments_nothing_changes(name, implementation):
    model = tiny(name, implementation)
    ids = torch.randint(3, 97, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 8:] = 0
    options = {"max_new_tokens": 6, "do_sample": False}

    def behaviour():
        written = model.generate(ids[:2], attention_mask=mask[:2], **options)
        return model(ids, attention_mask=mask).logits, model(ids).logits, written

    with torch.no_grad():
        before = behaviour()
        assert enable_segments(model) == implementation
        assert model.config._attn_implementation == ATTENTION_NAME
        after = behaviour()
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_layers_that_ask_for_more_are_refused():
    segments = segments_of(((4, 5, 6),))
    q, k, v = tensors(segments, dtype=torch.float32)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="got s_aux from Identity"):
        attention_forward(module, q, k, v, None, segments=segments, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="is_causal=False"):
        attention_forward(module, q, k, v, None, segments=segments, is_causal=False)
    with pytest.raises(ValueError, match="a mask of its own"):
        attention_forward(module, q, k, v, torch.zeros(1, 1, 15, 15), segments=segments)
    with pytest.raises(ValueError, match="to receive the segments"):
        attention_forward(module, q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_nothing_quadratic_is_built(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a mask was built")

    model = tiny("Mistral", "sdpa")
    enable_segments(model)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, ATTENTION_NAME, refuse)
    segments = segments_of(((4, 5, 6),))
    positions = torch.tensor([[*range(9), *range(4, 10)]])
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    inputs = {"input_ids": torch.arange(3, 18)[None], "position_ids": positions}
    model(**inputs, segments=segments, attention_mask=placeholder)
    with pytest.raises(AssertionError, match="a mask was built"):
        model(**inputs)
