"""What ``engine="auto"`` is: the Triton kernels, where they have shown that they work."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdaa import engine_check, plan_head
from fastdaa.engine_check import triton_obstacle, wrong_results

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plan(device="cuda", **kwargs):
    return plan_head(50257, device, hidden_grad=True, head_grad=True, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to plan for, as far as questions to PyTorch go."""
    monkeypatch.setattr(engine_check, "_OBSTACLES", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(engine_check, "wrong_results", lambda device: [])
    return monkeypatch


def test_the_kernels_agree_with_fp64():
    assert wrong_results(torch.device(DEVICE)) == []


def without_confident_target(gradient):
    gradient[0] = 0.0  # a few parts in a billion of the whole
    return gradient


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "change", "name"),
    [
        ("statistics", lambda r: (r[0]._replace(logps=r[0].logps + 0.01), r[1]), "log-probs"),
        ("gradient", lambda gradient: gradient.mul_(1.1), "gradients"),
        ("gradient", without_confident_target, "gradients"),
        ("slopes", lambda r: r._replace(factors=1.1 * r.factors), "gradients of frozen heads"),
        (
            "slopes",
            lambda r: r._replace(state=r.state._replace(logps=r.state.logps * (1 + 2**-23))),
            "log-probs beside gradients",
        ),
        ("column_sums", lambda sums: sums * 1.1, "column sums"),
    ],
    ids=["statistics", "gradient", "confident", "slopes", "last-bits", "column-sums"],
)
def test_a_kernel_that_computes_something_else_is_named(monkeypatch, kernel, change, name):
    ours = getattr(engine_check.TritonTile, kernel)

    def changed(*args, **options):
        return change(ours(*args, **options))

    static = isinstance(vars(engine_check.TritonTile)[kernel], staticmethod)
    monkeypatch.setattr(
        engine_check.TritonTile, kernel, staticmethod(changed) if static else changed
    )
    assert name in wrong_results(torch.device("cpu"))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_caller_does_not_matter(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert wrong_results(torch.device("cpu")) == []
    finally:
        torch.set_default_dtype(torch.float32)


class Recorder(TorchDispatchMode):
    """What a checkpoint or a profiler of operators sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.interpreter
@pytest.mark.parametrize("around", ["operators", "torch.func", "inference", "autocast"])
def test_what_the_caller_is_in_the_middle_of_does_not_matter(gpu, around):
    gpu.setattr(engine_check, "wrong_results", lambda device: wrong_results(torch.device("cpu")))
    cuda = torch.device("cuda")
    if around == "torch.func":
        said = []
        torch.vmap(lambda x: said.append(triton_obstacle(cuda)) or x)(torch.ones(2))
        assert said == [""]
        return
    recorder = Recorder()
    contexts = {
        "operators": recorder,
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with contexts[around]:
        assert triton_obstacle(cuda) == ""
    assert recorder.seen == []


def test_the_check_may_wait_where_the_caller_may_not(gpu):
    mode = ["error"]
    gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    gpu.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.insert(0, new))
    gpu.setattr(engine_check, "wrong_results", lambda device: [] if mode[0] == "default" else ["x"])
    assert triton_obstacle(torch.device("cuda")) == ""
    assert mode == ["error", "default", "error"]


@pytest.mark.interpreter
def test_a_wrong_kernel_of_the_targets_rows_is_named(monkeypatch):
    from fastdaa.kernels import target_rows

    ours = target_rows.add_sorted_rows

    def twice(out, hidden, targets, sources, factors, less):
        ours(out, hidden, targets, sources, 1.1 * factors, less)

    def without(out, hidden, targets, sources, factors, less):
        ours(out, hidden, targets, sources, factors)

    for wrong in (twice, without):
        monkeypatch.setattr(target_rows, "add_sorted_rows", wrong)
        assert wrong_results(torch.device("cpu")) == ["rows of targets"]


@pytest.mark.interpreter
def test_a_wrong_kernel_of_the_hidden_states_rows_is_named(monkeypatch):
    from fastdaa.kernels import hidden_rows

    ours = hidden_rows.finish_hidden_rows

    def without_targets(product, factors, own, *rest):
        ours(product, factors, torch.zeros_like(own), *rest)

    monkeypatch.setattr(hidden_rows, "finish_hidden_rows", without_targets)
    assert wrong_results(torch.device("cpu")) == ["rows of hidden states"]


@pytest.mark.interpreter
def test_a_factor_that_is_rounded_to_the_nearest_is_named(monkeypatch):
    from fastdaa.kernels import hidden_rows

    def nearest(hidden, factors, out, sources):
        out.copy_(factors[:, None] * hidden)

    monkeypatch.setattr(hidden_rows, "scale_hidden_rows", nearest)
    assert wrong_results(torch.device("cpu")) == ["factors"]


@pytest.mark.interpreter
def test_a_nan_is_wrong(monkeypatch):
    objective = engine_check._objective_differences
    monkeypatch.setattr(
        engine_check, "_objective_differences",
        lambda logps: objective(logps) | {"losses": torch.tensor(torch.nan)},
    )  # fmt: skip
    assert wrong_results(torch.device("cpu")) == ["losses"]


def test_auto_on_a_cpu_has_no_choice():
    assert plan("cpu").engine == "torch"
    assert plan("cpu").explain().endswith("lies outside this call")


def test_auto_for_a_gpu_is_triton(gpu):
    made = plan()
    assert made.engine == "triton"
    assert made.explain().endswith("; engine triton: its kernels agree with fp64 on this GPU")
    assert plan(engine="torch").explain().endswith("; engine torch: asked for")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_plan_for_a_gpu_elsewhere_is_triton():
    assert plan().explain().endswith("; engine triton: what GPUs take")


@pytest.mark.parametrize(
    "options",
    [{"operand": torch.float64}, {"divergence": True}, {"impl": "reference"}],
    ids=lambda options: next(iter(options)),
)
def test_what_only_plain_torch_serves_takes_it(gpu, options):
    assert plan(**options).engine == "torch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((engine_check.importlib.util, "find_spec", lambda name: None), "triton is not installed"),
        ((torch.version, "hip", "6.4"), "made for NVIDIA"),
        ((torch.cuda, "get_device_capability", lambda device=None: (7, 5)), r"has \(7, 5\)"),
        ((engine_check, "detect_fake_mode", lambda: "a mode"), "tensors without values"),
    ],
    ids=["no-triton", "rocm", "old", "fake"],
)
def test_auto_is_torch_where_the_kernels_cannot_run(gpu, change, words):
    gpu.setattr(*change)
    made = plan()  # a warning would be an error
    assert made.engine == "torch" and re.search(words, made.explain())


def test_kernels_that_disagree_are_left_with_a_warning_once(gpu):
    asked = []
    gpu.setattr(engine_check, "wrong_results", lambda device: asked.append(device) or ["losses"])
    with pytest.warns(UserWarning, match=r"wrong losses here. Plain torch takes their place"):
        made = plan()
    assert made.engine == "torch" and "give wrong losses here" in made.explain()
    assert plan("cuda:0").engine == "torch"
    assert asked == [torch.device("cuda:0")]
    plan(engine="triton")  # an explicit choice stands


def test_kernels_that_do_not_run_are_left_with_a_warning(gpu):
    def fail(device):
        raise RuntimeError("no C compiler\nat all")

    gpu.setattr(engine_check, "wrong_results", fail)
    with pytest.warns(UserWarning, match=r"do not run on this machine: no C compiler\. Plain"):
        assert plan().engine == "torch"


def test_processes_that_share_a_vocabulary_do_not_decide_alone(gpu):
    made = plan(sharded=True)
    assert made.engine == "torch" and "ask for 'triton'" in made.explain()
    assert plan(sharded=True, engine="triton").engine == "triton"


def test_a_graph_is_not_captured_with_kernels_that_were_not_tried(gpu):
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match=r"The graph will hold plain torch.*Make one call before"):
        made = plan()
    assert made.engine == "torch" and "call once before" in made.explain()
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert plan().engine == "triton"
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plan().engine == "triton"


def test_a_full_gpu_says_nothing_about_the_kernels(gpu):
    def fail(device):
        raise torch.OutOfMemoryError("full")

    gpu.setattr(engine_check, "wrong_results", fail)
    with pytest.raises(torch.OutOfMemoryError):
        triton_obstacle(torch.device("cuda"))
    gpu.setattr(engine_check, "wrong_results", lambda device: [])
    assert triton_obstacle(torch.device("cuda")) == ""
