"""What ``engine="auto"`` is: the Triton kernels, where they have shown that they work."""

from __future__ import annotations

import re

import pytest
import torch

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


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "name"),
    [("statistics", "log-probs"), ("gradient", "gradients")],
)
def test_a_kernel_that_computes_something_else_is_named(monkeypatch, kernel, name):
    ours = getattr(engine_check.TritonTile, kernel)

    def slightly_wrong(self, *args, **kwargs):
        result = ours(self, *args, **kwargs)
        if kernel == "gradient":
            return result.mul_(1.1)
        return (result[0]._replace(logps=result[0].logps + 0.01), result[1])

    monkeypatch.setattr(engine_check.TritonTile, kernel, slightly_wrong)
    assert name in wrong_results(torch.device("cpu"))


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


def test_a_graph_is_not_captured_with_kernels_that_were_not_tried(gpu):
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plan().engine == "torch" and "call once before" in plan().explain()
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
