"""What only a CUDA device can show: accuracy in bf16, memory, no host sync, packed attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kept_calls import OneSign

from fastdaa import (
    LmHead,
    Objective,
    TokenSelection,
    pair_loss,
    token_entropy,
    token_kl,
    token_logps,
    token_logps_and_entropy,
)
from fastdaa.engine_check import LEAST_CAPABILITY, triton_obstacle

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


@pytest.fixture(scope="module", autouse=True)
def kernels_that_run() -> None:
    """Whether ``auto`` is Triton, asked before tests that forbid to wait."""
    torch.zeros(1, device=DEVICE)
    triton_obstacle(DEVICE)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY,
    reason="the kernels are for newer GPUs",
)
def test_the_kernels_serve_this_gpu() -> None:
    assert triton_obstacle(DEVICE) == ""


# Tensor cores drop digits instead of rounding them (docs/experiments.md): at D = 1024 a logit of 16
# is some 2e-5 low. Targets that the model draws lie to both sides of what it expects, and hardly
# change a sum of 512; those that lie far above it change each log-prob by some 2e-6, to one side.
@pytest.mark.parametrize(("drawn", "limit"), [(True, 1e-3), (False, 4e-3)], ids=["drawn", "likely"])
@pytest.mark.parametrize("impl", ["score", "frozen", "recompute"])
def test_bf16_sum_of_512_tokens_is_close_to_fp64(impl: str, drawn: bool, limit: float) -> None:
    hidden, weight, targets = _case(512, 32001, 1024, torch.bfloat16)
    logps = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    if drawn:
        targets = torch.multinomial(logps.exp(), 1)[:, 0]
    hidden.requires_grad_(impl != "score")
    weight.requires_grad_(impl == "recompute")
    got = token_logps(hidden, weight, targets, impl=impl).detach().double().sum()
    assert abs(float(got - logps.gather(1, targets[:, None]).sum())) < limit


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


@pytest.mark.parametrize("impl", ["single_pass", "recompute"])
@pytest.mark.parametrize("mean", [0, 1, 3])
def test_targets_that_cancel_the_others(mean: int, impl: str) -> None:
    problem = OneSign(mean)

    def logps(*call: torch.Tensor) -> torch.Tensor:
        return token_logps(*(t.to(DEVICE) for t in call), impl=impl).cpu()

    problem.check(problem.gradients(logps))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_gradient_of_log_probs_and_entropies(dtype: torch.dtype, trained: bool) -> None:
    *leaves, targets = _case(300, 5003, 512, dtype)
    wanted = [t.requires_grad_() for t in leaves[: 1 + trained]]
    logps, entropy = token_logps_and_entropy(*leaves, targets)
    got = torch.autograd.grad(logps.sum() - 0.1 * entropy.sum(), wanted)
    total = token_logps(*leaves, targets).sum() - 0.1 * token_entropy(*leaves).sum()
    for a, b in zip(got, torch.autograd.grad(total, wanted), strict=True):
        assert (a.double() - b.double()).norm() <= 0.01 * b.double().norm()


def _pairs(lengths: tuple[int, ...]) -> TokenSelection:
    total = sum(lengths)
    rows = torch.arange(total, device=DEVICE)
    targets = torch.randint(0, 32001, (total,), device=DEVICE)
    return TokenSelection(rows, targets, torch.tensor(lengths, device=DEVICE), lengths)


@pytest.mark.parametrize("max_bytes", [None, 60 << 20], ids=["whole", "part"])
def test_single_pass_waits_for_nothing_and_repeats_bitwise(max_bytes: int | None) -> None:
    selection = _pairs((200, 310, 90, 120))
    hidden = torch.randn(720, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = _head(32001, 512, torch.bfloat16).requires_grad_()
    ref = torch.randn(4, device=DEVICE) - 500
    objective = Objective.parse("dpo", beta=0.1)

    def once():
        hidden.grad = weight.grad = None
        loss = pair_loss(
            hidden, LmHead(weight), selection, objective, ref_logps=ref, max_bytes=max_bytes
        ).loss
        loss.backward()
        return loss.detach(), hidden.grad.clone(), weight.grad.clone()

    first = once()
    with _nothing_waits():
        second = once()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@contextmanager
def _nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _step(impl: str, engine: str) -> list[torch.Tensor]:
    """Log-probs and gradients of a small batch."""
    hidden, weight, targets = _case(300, 5003, 256, torch.bfloat16)
    leaves = [hidden.requires_grad_(impl != "score")]
    leaves += [weight.requires_grad_()] if impl in ("recompute", "single_pass") else []
    bias = torch.randn(5003, device=DEVICE)
    logps = token_logps(hidden, weight, targets, bias=bias, impl=impl, engine=engine)
    if impl == "score":
        return [logps]
    return [
        logps.detach(),
        *torch.autograd.grad(logps, leaves, torch.linspace(-1, 1, 300).to(DEVICE)),
    ]


PATHS = pytest.mark.parametrize("impl", ["score", "frozen", "recompute", "single_pass"])
ENGINES = pytest.mark.parametrize("engine", ["torch", "triton"])


@PATHS
@ENGINES
def test_deterministic_algorithms_serve_and_repeat(impl: str, engine: str) -> None:
    torch.use_deterministic_algorithms(True)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(_step(impl, engine))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@PATHS
@ENGINES
def test_a_stream_of_the_caller(impl: str, engine: str) -> None:
    torch.manual_seed(0)
    want = _step(impl, engine)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream is early
        torch.manual_seed(0)
        got = _step(impl, engine)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("engine", ["torch", "triton", "fused"])
def test_another_device_than_the_current_one(engine: str) -> None:
    hidden, weight, targets = _case(100, 5003, 256, torch.bfloat16)
    want = token_logps(hidden, weight, targets, engine=engine)
    there = [t.to("cuda:1") for t in (hidden, weight, targets)]
    assert torch.equal(token_logps(*there, engine=engine).to(DEVICE), want)


@PATHS
@ENGINES
def test_a_step_in_a_cuda_graph(impl: str, engine: str) -> None:
    hidden, weight, targets = _case(300, 5003, 256, torch.bfloat16)
    leaves = [hidden.requires_grad_()] if impl != "score" else []
    leaves += [weight.requires_grad_()] if impl in ("recompute", "single_pass") else []
    upstream = torch.linspace(-1, 1, 300, device=DEVICE)

    def step() -> list[torch.Tensor]:
        logps = token_logps(hidden, weight, targets, impl=impl, engine=engine)
        return [logps.detach(), *(torch.autograd.grad(logps, leaves, upstream) if leaves else [])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        targets.copy_(targets.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


def test_offsets_beyond_32_bits() -> None:
    """The last of 16800 rows of 128256 logits, 8.6 GB of them."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of memory")
    from fastdaa.kernels.row_gradient import write_row_gradient
    from fastdaa.kernels.row_statistics import take_row_statistics

    z = torch.empty(16800, 128256, device=DEVICE).normal_()
    targets = torch.randint(0, 128256, (16800,), device=DEVICE)
    last, last_targets = z[-4:].clone(), targets[-4:]
    whole = take_row_statistics(z, targets)
    some = take_row_statistics(last, last_targets)
    assert all(torch.equal(a[-4:], b) for a, b in zip(whole[:3], some[:3], strict=True))
    ones = torch.ones_like(whole.m)
    got = write_row_gradient(z, targets, *whole[:3], ones, dtype=torch.bfloat16)[-4:]
    want = write_row_gradient(last, last_targets, *some[:3], ones[:4], dtype=torch.bfloat16)
    assert torch.equal(got, want)


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
            for impl in ("score", "frozen", "recompute", "single_pass")
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
    weight.requires_grad_(impl in ("recompute", "single_pass"))
    call = {"impl": impl, "engine": engine, "max_bytes": max_bytes}
    in_pairs = impl == "single_pass"
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
def test_a_single_pass_that_keeps_a_part(engine: str) -> None:
    """The log-probs of one that keeps all, and gradients that round no more than bf16 does."""
    lengths, vocab, size = (256,) * 8, 50257, 1024
    selection = _pairs(lengths)
    leaves = [torch.randn(2048, size, device=DEVICE), torch.randn(vocab, size, device=DEVICE) / 32]
    leaves = [t.bfloat16().requires_grad_() for t in leaves]
    ref = torch.zeros(8, device=DEVICE)
    found = []
    for max_mib in (None, 160):
        out = pair_loss(
            leaves[0], LmHead(leaves[1]), selection, Objective.parse("dpo"), ref_logps=ref,
            impl="single_pass", engine=engine, max_bytes=max_mib and max_mib << 20,
        )  # fmt: skip
        found.append((out.token_logps, *torch.autograd.grad(out.loss, leaves)))
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=1e-4)
    for whole, part in zip(found[0][1:], found[1][1:], strict=True):
        assert (part.double() - whole.double()).norm() < 4e-3 * whole.double().norm()


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [50257, 128256, 151936])
def test_log_probs_do_not_depend_on_the_height_of_a_block(engine: str, vocab: int) -> None:
    """Margins of equal models are exactly 0 only if they do not, where blocks are cut elsewhere."""
    hidden, weight, targets = _case(1024, vocab, 1024, torch.bfloat16)
    whole = token_logps(hidden, weight, targets, engine=engine)
    differences = {}
    for rows in (1, 16, 100, 128, 256, 512, 832):
        part = token_logps(hidden[:rows], weight, targets[:rows], engine=engine)
        differences[rows] = float((part - whole[:rows]).abs().max())
    assert not any(differences.values()), differences


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
