"""What only a CUDA device can show: accuracy in bf16, memory, no host sync, packed attention."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, Objective, TokenSelection, pair_loss, token_kl, token_logps

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def _head(vocab: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(vocab, hidden, device=DEVICE) * hidden**-0.5).to(dtype)


def _case(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, peak: float = 20.0):
    """Hidden states whose largest logit is about ``peak``, and targets among the likely tokens."""
    weight = _head(vocab, hidden, dtype)
    targets = torch.randint(0, vocab, (tokens,), device=DEVICE)
    noise = torch.randn(tokens, hidden, device=DEVICE)
    hidden_states = (weight[targets].float() * peak * 0.8 + noise * peak / 8).to(dtype)
    return hidden_states, weight, targets


@pytest.mark.parametrize("impl", ["score", "frozen", "recompute"])
def test_bf16_sum_of_512_tokens_is_within_a_thousandth_of_a_nat(impl: str) -> None:
    hidden, weight, targets = _case(512, 32001, 1024, torch.bfloat16)
    hidden.requires_grad_(impl != "score")
    weight.requires_grad_(impl == "recompute")
    got = token_logps(hidden, weight, targets, impl=impl).detach().double().sum()
    z = hidden.detach().double() @ weight.detach().double().T
    expected = torch.log_softmax(z, -1).gather(1, targets[:, None]).sum()
    assert abs(float(got - expected)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_are_as_good_as_those_of_materialised_fp32_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(300, 5003, 512, dtype)
    upstream = torch.randn(300, device=DEVICE)

    def gradients(logps_of):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = logps_of(h, w)
        (logps * upstream.to(logps.dtype)).sum().backward()
        return h.grad.double(), w.grad.double()

    def materialised(h, w):
        z = (h @ w.T).float()
        return torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]

    def exact(h, w):
        z = h.double() @ w.double().T
        return torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]

    truth = gradients(exact)
    ours = gradients(lambda h, w: token_logps(h, w, targets))
    theirs = gradients(materialised)
    for name, t, a, b in zip(("hidden", "weight"), truth, ours, theirs, strict=True):
        error, allowed = (a - t).norm() / t.norm(), (b - t).norm() / t.norm()
        assert error <= 1.5 * allowed + 1e-4, (name, float(error), float(allowed))


def _pairs(lengths: tuple[int, ...]) -> TokenSelection:
    total = sum(lengths)
    rows = torch.arange(total, device=DEVICE)
    targets = torch.randint(0, 32001, (total,), device=DEVICE)
    return TokenSelection(rows, targets, torch.tensor(lengths, device=DEVICE), lengths)


def test_single_pass_waits_for_nothing_and_repeats_bitwise() -> None:
    selection = _pairs((200, 310, 90, 120))
    hidden = torch.randn(720, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = _head(32001, 512, torch.bfloat16).requires_grad_()
    ref = torch.randn(4, device=DEVICE) - 500
    objective = Objective.parse("dpo", beta=0.1)

    def once():
        hidden.grad = weight.grad = None
        loss = pair_loss(hidden, LmHead(weight), selection, objective, ref_logps=ref).loss
        loss.backward()
        return loss.detach(), hidden.grad.clone(), weight.grad.clone()

    first = once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


GIB = 2**30


@pytest.mark.parametrize(
    ("impl", "engine", "limit", "max_bytes"),
    [
        pytest.param("score", "fused", 64 * 2**20, None, id="score-fused"),
        pytest.param("score", "triton", 64 * 2**20, None, id="score-triton"),
        *(
            pytest.param(impl, engine, limit * GIB, None, id=f"{impl}-{engine}")
            for impl, limit in (("frozen", 1.1), ("recompute", 1.1), ("single_pass", 2.1))
            for engine in ("torch", "triton")
        ),
        *(
            pytest.param(impl, engine, 300 * 2**20, 300 * 2**20, id=f"{impl}-{engine}-300mib")
            for impl in ("score", "frozen", "recompute", "auto")
            for engine in ("torch", "triton")
        ),
    ],
)
def test_memory_beyond_inputs_and_gradients(
    impl: str, engine: str, limit: float, max_bytes: int | None
) -> None:
    """The limits of tests/test_memory.py, which counts tensors, by the allocator's own count."""
    lengths = (512,) * 16
    selection = _pairs(lengths)
    hidden = torch.randn(8192, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight = _head(128256, 4096, torch.bfloat16)
    hidden.requires_grad_(impl != "score")
    weight.requires_grad_(impl in ("recompute", "single_pass", "auto"))
    call = {"impl": impl, "engine": engine, "max_bytes": max_bytes}
    in_pairs = impl in ("single_pass", "auto")
    ref = torch.zeros(16, device=DEVICE)

    def step() -> None:
        hidden.grad = weight.grad = None
        if in_pairs:
            head, dpo = LmHead(weight), Objective.parse("dpo")
            loss = pair_loss(hidden, head, selection, dpo, ref_logps=ref, **call).loss
        else:
            loss = token_logps(hidden, weight, selection.targets, **call).sum()
        if impl != "score":
            loss.backward()

    step()  # products allocate their workspace, kernels are compiled
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    grads = [t.grad for t in (hidden, weight) if t.grad is not None]
    returned = sum(g.numel() * g.element_size() for g in grads)
    extra = torch.cuda.max_memory_allocated() - before - returned
    # The rows that a pair loss selects are a copy of its input.
    allowed = limit + 2 * hidden.numel() * in_pairs + 8 * 2**20
    assert extra < allowed, f"{extra / GIB:.2f} GiB"


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [50257, 128256, 151936])
def test_log_probs_do_not_depend_on_the_height_of_a_block(engine: str, vocab: int) -> None:
    """Margins of equal models are exactly 0 only if they do not, where blocks are cut elsewhere."""
    hidden, weight, targets = _case(1024, vocab, 1024, torch.bfloat16)
    whole = token_logps(hidden, weight, targets, engine=engine)
    for rows in (1, 16, 100, 128, 256, 512, 832):
        part = token_logps(hidden[:rows], weight, targets[:rows], engine=engine)
        assert torch.equal(part, whole[:rows]), rows


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("impl", ["single_pass", "recompute", "frozen"])
def test_equal_models_have_a_margin_of_exactly_zero(impl: str, engine: str) -> None:
    selection = _pairs((900, 1010, 90, 1200))
    hidden = torch.randn(3200, 512, device=DEVICE, dtype=torch.bfloat16)
    weight = _head(32001, 512, torch.bfloat16)
    ref = token_logps(hidden, weight, selection.targets, engine=engine)
    out = pair_loss(
        hidden.requires_grad_(), LmHead(weight.requires_grad_(impl != "frozen")), selection,
        Objective.parse("dpo"), ref_token_logps=ref, impl=impl, engine=engine,
    )  # fmt: skip
    assert torch.equal(out.losses, torch.full((2,), 2.0, device=DEVICE).log())


def test_autocast_with_an_fp32_head() -> None:
    """fp32 master weights: factors in bf16, gradients in fp32."""
    hidden, weight, targets = _case(300, 50257, 512, torch.float32)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logps = token_logps(*leaves, targets)
    logps.sum().backward()
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    exact = token_logps(*wide, targets, impl="reference")
    exact.sum().backward()
    for got, want in zip(leaves, wide, strict=True):
        assert got.grad.dtype == torch.float32
        assert (got.grad - want.grad).norm() < 2e-2 * want.grad.norm()


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_satisfied_pairs_leave_the_products(engine: str) -> None:
    selection = _pairs((200, 310, 90, 120))
    hidden = torch.randn(720, 512, device=DEVICE, dtype=torch.bfloat16)
    weight, grads = _head(32001, 512, torch.bfloat16), {}
    ref = torch.tensor([-9e3, 0.0, 0.0, -9e3], device=DEVICE)  # satisfied, and not
    for impl in ("single_pass", "recompute"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = pair_loss(
            leaves[0], LmHead(leaves[1]), selection, Objective.parse("slic"), ref_logps=ref,
            impl=impl, engine=engine,
        ).loss  # fmt: skip
        grads[impl] = torch.autograd.grad(loss, leaves)
        assert (grads[impl][0][:510] == 0).all() and grads[impl][0][510:].any(1).all()
    for a, b in zip(*grads.values(), strict=True):
        assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()


def test_kl_of_identical_heads_is_zero() -> None:
    hidden, weight, _ = _case(100, 32001, 256, torch.bfloat16)
    head = LmHead(weight)
    assert float(token_kl(hidden, head, hidden, head).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
def test_packed_attention_agrees_with_padded_rows(layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    from fastdaa.data import PairCollator, selection_from
    from fastdaa.train.attention import enable_segments
    from fastdaa.train.backbone import install_head_task, run_head_task

    config = transformers.LlamaConfig(
        vocab_size=997, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = [
        {
            "row_id": i,
            "prompt_ids": torch.randint(0, 997, (30 + 11 * i,)).tolist(),
            "chosen_ids": torch.randint(0, 997, (50 - 9 * i,)).tolist(),
            "rejected_ids": torch.randint(0, 997, (17 + 5 * i,)).tolist(),
        }
        for i in range(4)
    ]
    results = {}
    for name in ("padded", layout):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
        install_head_task(model)
        if name != "padded":
            enable_segments(model)
        pack = PairCollator(name, pad_token_id=0)(rows)["packs"][0]
        pack = _to_device(pack)
        selection = selection_from(pack)

        def task(hidden, model=model, selection=selection):
            flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, selection.rows)
            return token_logps(flat, LmHead.from_model(model).weight, selection.targets)

        logps = run_head_task(model, pack, task).result
        logps.sum().backward()
        results[name] = logps.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    for a, b in zip(results["padded"], results[layout], strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05 * float(b.abs().max()))


def _to_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {k: _to_device(v) for k, v in value.items()}
    return value
