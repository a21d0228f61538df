"""Known failures of fused heads, continued: launches, compilers, models and packing.

The numbers are those of ``test_catalogue.py``, which has the others.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from unittest.mock import patch

import pytest
import torch
from device_memory import META, counted
from torch._subclasses import FakeTensorMode

from fastdaa import LmHead, Objective, TokenSelection, pair_loss, token_divergence, token_logps

triton = pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from fastdaa import kernels  # noqa: E402
from fastdaa.kernels.column_sums import sum_columns  # noqa: E402
from fastdaa.kernels.operands import on_device  # noqa: E402
from fastdaa.kernels.row_gradient import write_row_gradient  # noqa: E402
from fastdaa.kernels.row_statistics import take_row_statistics  # noqa: E402
from fastdaa.kernels.score import score_tokens  # noqa: E402

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

V, D = 37, 8


@pytest.fixture
def launches(monkeypatch):
    """Grids of the launches that a test makes, which do not happen."""
    grids = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda *_, grid, **__: grids.append(tuple(grid))
    )
    return grids


def test_13_rows_that_lie_beyond_an_int32_offset():
    """The last row begins beyond 2^31 entries, though row number and stride are int32 both; only
    the pages that are touched exist."""
    far = 2**30 + 3
    z = torch.empty(2 * far + V, dtype=torch.float32).as_strided((3, V), (far, 1))
    near = torch.randn(3, V)
    z.copy_(near)
    targets = torch.tensor([3, 30, 7])
    found, want = take_row_statistics(z, targets), take_row_statistics(near, targets)
    assert torch.equal(found.logps, want.logps) and torch.equal(found.m, want.m)
    call = (targets, found.m, found.log_s, found.logps, torch.ones(3))
    write_row_gradient(z, *call, dtype=torch.float32)
    assert torch.equal(z, write_row_gradient(near, *call, dtype=torch.float32))


def test_13_grids_have_one_dimension(launches):
    """The others end at 65535."""
    n = 70_000
    z, targets = torch.zeros(n, 5), torch.zeros(n, dtype=torch.int64)
    rows = take_row_statistics(z, targets)
    write_row_gradient(
        z, targets, rows.m, rows.log_s, rows.logps, torch.ones(n), dtype=torch.float32
    )
    sum_columns(z)
    score_tokens(torch.zeros(n, D), torch.zeros(V, D), targets)
    assert len(launches) >= 5 and (n,) in launches
    assert all(len(grid) == 1 for grid in launches)


def test_14_scalars_stay_what_they_are_under_a_compiler():
    """A compiler hands scalars over as it likes; results stay fp32 and keep their bits."""
    hidden, weight = torch.randn(5, D), torch.randn(V, D)
    targets = torch.randint(V, (5,))

    def call(temperature, engine):
        options = {"softcap": 3.0, "logit_scale": 0.7, "temperature": temperature}
        return token_logps(hidden, weight, targets, engine=engine, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for engine in ("torch", "triton"):
        for temperature in (0.3, 1.7):
            got = compiled(temperature, engine)
            assert got.dtype == torch.float32
            assert torch.equal(got, call(temperature, engine))


def test_15_every_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """Without a second GPU: inside the guard that makes their device the current one."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"fastdaa.kernels.{name}") for name in names]
    inside, launched = [], {}

    @contextlib.contextmanager
    def guard(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    def launch(kernel, *args, **_):
        tensors = [getattr(arg, "base", arg) for arg in args]  # of descriptors
        devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
        launched.setdefault(kernel.fn.__name__, []).append((list(inside), devices))

    for module in modules:
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", guard)
    with counted(), patch.object(InterpretedFunction, "run", launch):
        hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16, device=META) for n in (6, V))
        bias, ref = torch.empty(V, device=META), torch.empty(6, device=META)
        targets = torch.empty(6, dtype=torch.int64, device=META)
        token_logps(hidden, weight, targets, engine="fused")
        head = LmHead(weight)
        for kind in ("kl", "js"):
            token_divergence(hidden, head, hidden, head, kind=kind, engine="fused")
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        lengths = torch.empty(4, dtype=torch.int64, device=META)
        selection = TokenSelection(targets, targets, lengths, (1, 2, 2, 1))
        for loss in ("dpo", "apa"):
            for impl in ("single_pass", "recompute"):
                pair_loss(
                    leaves[0], LmHead(*leaves[1:]), selection, Objective.parse(loss),
                    ref_token_logps=ref, engine="triton", impl=impl,
                ).loss.backward()  # fmt: skip
    all_kernels = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }  # fmt: skip
    assert set(launched) == all_kernels - {"_probe_kernel"}
    for found in launched.values():
        assert all(guards == [META] and devices == {META} for guards, devices in found)


def test_15_the_guard_makes_another_gpu_the_current_one():
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda:1")
    with patch.object(torch.cuda, "device") as current:
        on_device(tensor)
    current.assert_called_once_with(torch.device("cuda:1"))


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_18_lora_on_the_head_is_in_force_and_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    from fastdaa.train.adapters import check_prompt_learning

    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    ids = torch.randint(V, (2, 5))
    with torch.no_grad():
        logits = model(ids).logits.flatten(0, 1)
        hidden = model.get_base_model().model(ids).last_hidden_state.flatten(0, 1)
        base = hidden @ model.get_base_model().lm_head.weight.T
        got = LmHead.from_model(model).logits(hidden)
    assert not torch.allclose(base, logits, atol=1e-3)
    torch.testing.assert_close(got, logits)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        check_prompt_learning(config)


def test_19_a_head_that_is_elsewhere_is_refused():
    """ZeRO-3 leaves an empty weight outside the module's own forward."""
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0, 16))
    with pytest.raises(ValueError, match="sharded parameter"):
        LmHead.from_model(model)


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_22_padding_is_no_sequence(layout):
    """Lengths and boundaries count the tokens of the pairs, and nothing else."""
    from fastdaa.data import PairCollator

    sizes = [(3, 2, 5), (4, 1, 1), (2, 6, 3)]
    rows = [
        {"row_id": i, "prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for i, (p, c, r) in enumerate(sizes)
    ]
    (pack,) = PairCollator(layout, pad_token_id=0)(rows)["packs"]
    want = [n for _, c, r in sizes for n in (c, r)]
    assert pack["lengths"].tolist() == want == list(pack["counts"])
    shared = sum(p + c + r for p, c, r in sizes)
    assert pack["tokens"] == shared + (layout != "prefix_shared") * sum(p for p, _, _ in sizes)
    assert len(pack["targets"]) == sum(want) and not (pack["targets"] == 0).any()
