"""The public calls with Triton's engines against the torch engine, in the interpreter.

The kernels themselves have their own tests; these hold the wiring.
"""

from __future__ import annotations

import pytest
import torch
from tile_budget import tiles_of

from fastdaa import (
    FusedLinearDPOLoss,
    LmHead,
    Objective,
    TokenSelection,
    objective_kernel,
    pair_loss,
    token_logps,
    token_stats,
    validation,
)
from fastdaa.kernels import score as score_kernel

# What the interpreter's numpy says about masked -inf - -inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.interpreter,
]

LENGTHS = (3, 4, 0, 3, 2, 2)
N, D, V = sum(LENGTHS), 8, 37


def leaves(dtype=torch.float32):
    return [torch.randn(size, D).to(dtype).requires_grad_() for size in (N, V)]


def selection():
    targets = torch.randint(0, V, (N,))
    return TokenSelection(torch.arange(N), targets, torch.tensor(LENGTHS), LENGTHS)


MIXTURES = [
    pytest.param("dpo", True, id="dpo"),
    pytest.param("ipo", True, id="ipo"),
    pytest.param("slic", True, id="slic"),
    pytest.param("apa", True, id="token-level"),
    pytest.param(["dpo", "sft"], True, id="mixture"),
    pytest.param("aot", False, id="coupled"),
]


@pytest.mark.parametrize(("losses", "jitted"), MIXTURES)
def test_the_single_pass_takes_the_objective_kernel_where_it_has_the_formula(
    monkeypatch, losses, jitted
):
    calls = []
    inner = objective_kernel.evaluate_objective
    monkeypatch.setattr(
        objective_kernel, "evaluate_objective", lambda *a, **k: calls.append(a) or inner(*a, **k)
    )
    tensors, chosen, ref = leaves(), selection(), -3 - torch.rand(N)
    objective = Objective.parse(losses)
    assert objective_kernel.has_kernel(objective) == jitted
    results = {}
    for engine in ("torch", "triton"):
        # Several chunks of pairs, one launch each.
        with tiles_of(8, V):
            out = pair_loss(
                tensors[0], LmHead(tensors[1]), chosen, objective, ref_token_logps=ref,
                engine=engine,
            )  # fmt: skip
        results[engine] = (out.losses, *torch.autograd.grad(out.loss, tensors))
    assert bool(calls) == jitted
    for a, b in zip(results["torch"], results["triton"], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_an_objective_with_a_function_of_the_callers_is_left_to_torch():
    g = (lambda x: -torch.nn.functional.logsigmoid(x), lambda x: -torch.sigmoid(-x))
    objective = Objective.parse("daa", g=g)
    assert not objective_kernel.has_kernel(objective)
    tensors, chosen = leaves(), selection()
    values = [
        pair_loss(
            tensors[0],
            LmHead(tensors[1]),
            chosen,
            objective,
            ref_logps=torch.zeros(6),
            engine=engine,
        ).loss
        for engine in ("torch", "triton")
    ]
    assert torch.allclose(*values, atol=1e-5)


def test_strided_references_are_taken():
    tensors, chosen = leaves(), selection()
    ref = -5 - torch.rand(6, 2)
    lengths = torch.tensor(LENGTHS)[:, None].expand(6, 2).contiguous()
    losses = [
        pair_loss(
            tensors[0], LmHead(tensors[1]), chosen, Objective.parse(["dpo", "apa"]), ref_logps=r,
            ref_token_logps=t, completion_lengths=n, engine="triton",
        ).loss
        for r, t, n in (
            (ref[:, 0], -torch.ones(N, 2)[:, 0], lengths[:, 0]),
            (ref[:, 0].clone(), -torch.ones(N), lengths[:, 0].clone()),
        )
    ]  # fmt: skip
    assert torch.equal(*losses)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_equal_models_have_a_margin_of_exactly_zero(engine):
    tensors, chosen = leaves(), selection()
    with torch.no_grad():
        ref = token_logps(*tensors, chosen.targets, engine=engine)
    out = pair_loss(
        tensors[0], LmHead(tensors[1]), chosen, Objective.parse("ipo"), ref_token_logps=ref,
        engine=engine,
    )  # fmt: skip
    # (0 - 1 / (2 beta))^2 to the last bit.
    assert torch.equal(out.losses, torch.full((3,), 25.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.5}], ids=["plain", "all"]
)
def test_fused_scores_and_statistics(dtype, options):
    tensors, targets = [t.detach() for t in leaves(dtype)], torch.randint(0, V, (N,))
    head = LmHead(tensors[1], torch.randn(V), **options)
    want, stats = token_stats(tensors[0], head, targets)
    got, fused = token_stats(tensors[0], head, targets, engine="fused")
    assert got.dtype == torch.float32
    for a, b in zip((want, *stats), (got, *fused), strict=True):
        assert torch.allclose(a, b, atol=2e-3 if dtype == torch.float16 else 1e-5)


def test_fused_takes_heads_in_another_dtype_and_strided_rows():
    hidden, weight = torch.randn(N, 2 * D)[:, ::2], torch.randn(V, D).half()
    targets = torch.randint(0, V, (N,))
    want = token_logps(hidden, weight, targets)
    assert torch.allclose(token_logps(hidden, weight, targets, engine="fused"), want, atol=1e-5)


@pytest.mark.parametrize("stats", [False, True])
def test_the_first_fused_call_of_a_kind_is_held_to_plain_torch(fused_variants, monkeypatch, stats):
    tensors, targets = [t.detach() for t in leaves()], torch.randint(0, V, (N,))

    def call(**options):
        head = LmHead(tensors[1], **options)
        if stats:
            return token_stats(tensors[0], head, targets, engine="fused")
        return token_logps(tensors[0], tensors[1], targets, engine="fused", **options)

    call()
    call()
    assert len(fused_variants) == 1
    call(softcap=3.0)
    assert len(fused_variants) == 2
    monkeypatch.setattr(validation, "_readable", lambda _: False)  # as on a GPU
    targets[3] = -100  # NaN from the kernel, which is right
    call(temperature=0.5)
    assert len(fused_variants) == 3
    right = score_kernel.score_tokens

    def wrong(*args, **options):
        rows = right(*args, **options)
        name = "entropy" if stats else "logps"
        values = getattr(rows, name).clone()
        values[-1] += 0.1
        return rows._replace(**{name: values})

    monkeypatch.setattr(score_kernel, "score_tokens", wrong)
    call()
    with pytest.raises(
        RuntimeError, match=r"engine='fused': expected .* off by up to 0\.1 on a GPU"
    ):
        call(bias=torch.zeros(V))


def test_a_target_far_below_the_largest_logit_is_compared_by_its_own_size(
    fused_variants, monkeypatch
):
    hidden, weight = (t.detach() for t in leaves())
    bias, targets = torch.zeros(V), torch.full((N,), 5)
    bias[5] = -1e6
    right = score_kernel.score_tokens

    def in_another_order(*args, **options):
        rows = right(*args, **options)
        return rows._replace(logps=rows.logps.nextafter(torch.zeros(())))

    monkeypatch.setattr(score_kernel, "score_tokens", in_another_order)
    token_logps(hidden, weight, targets, bias=bias, engine="fused")
    assert len(fused_variants) == 1


def test_fused_says_what_it_cannot_do():
    tensors, targets = leaves(), torch.randint(0, V, (N,))
    with pytest.raises(ValueError, match="expected a call without gradient"):
        token_logps(*tensors, targets, engine="fused")
    wide = [t.detach().double() for t in tensors]
    with pytest.raises(ValueError, match=r"expected fp16, bf16 or fp32 .* got torch.float64"):
        token_logps(*wide, targets, engine="fused")


def test_modules_hand_the_engine_on():
    labels = torch.randint(0, V, (4, 5))
    hidden, weight = torch.randn(4, 5, D), torch.randn(V, D)
    losses = [
        FusedLinearDPOLoss(engine=engine)(
            hidden, weight, labels, ref_hidden_states=hidden + 0.1
        ).loss
        for engine in ("torch", "triton", "fused")
    ]
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    assert torch.allclose(losses[0], losses[2], atol=1e-5)
    with pytest.raises(ValueError, match="engine: expected one of"):
        FusedLinearDPOLoss(engine="cuda")(hidden, weight, labels, ref_logps=torch.zeros(4))
