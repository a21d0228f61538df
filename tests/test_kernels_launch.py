"""Launches, as on an sm_90 device that is not there.

Triton takes CPU tensors through its own binding of arguments, compiles for them and launches, with
a driver that refuses what a driver refuses and runs nothing (``stub_driver.c``). This finds what
neither the interpreter nor ``aot_entries`` sees: an option that a launcher hands over and Triton
does not know, tiles that no descriptor can have, a size of 1 that becomes a constant, and variants
that a batch of another size would compile in the middle of training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow

DEVICE = """if True:
    import ctypes
    import json
    from collections import defaultdict

    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    stub = ctypes.CDLL(f"{knobs.nvidia.libcuda_path}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    class Device:
        utils, launcher_cls = CudaUtils(), CudaLauncher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Device())
    run, variants, fused = JITFunction.run, defaultdict(set), set()

    def launch(self, *args, grid, **options):
        compiled = run(self, *args, grid=grid, **options)
        assert 0 not in grid
        variants[self.fn.__name__].add(compiled.hash)
        if compiled.metadata.enable_fp_fusion:
            fused.add(self.fn.__name__)

    JITFunction.run = launch

    from fastdaa.kernels import configs, score_configs

    configs.architecture = score_configs._architecture = lambda device: 90
"""

ROWS = """if True:
    from fastdaa.kernels.column_sums import sum_columns
    from fastdaa.kernels.row_gradient import write_row_gradient
    from fastdaa.kernels.row_statistics import take_row_statistics

    for rows in (64, 37, 2, 1):
        z, targets = torch.zeros(rows, 4096), torch.zeros(rows, dtype=torch.int64)
        state = take_row_statistics(z, targets)[:3]
        ones = torch.ones(rows + 1)[1:]
        dz = write_row_gradient(z, targets, *state, ones, dtype=torch.bfloat16)
        sum_columns(dz)
"""
SLOPES = """if True:
    from fastdaa.kernels.row_slopes import take_row_slopes

    for rows in (64, 37, 2, 1):
        z, targets = torch.zeros(rows, 4096), torch.zeros(rows, dtype=torch.int64)
        take_row_slopes(z, targets, torch.zeros(rows, 4096, dtype=torch.bfloat16))
"""
TARGETS = """if True:
    from fastdaa.kernels.hidden_rows import finish_hidden_rows, scale_hidden_rows
    from fastdaa.kernels.target_rows import add_sorted_rows

    weight = torch.zeros(300, 80, dtype=torch.bfloat16)
    for rows in (64, 37, 2, 1):
        numbers = torch.zeros(rows + 1, dtype=torch.int64)[1:]
        factors, product = torch.zeros(rows + 1)[1:], torch.zeros(rows, 80)
        add_sorted_rows(weight, weight[:rows], numbers, numbers, factors)
        less = weight[:rows], numbers, factors
        add_sorted_rows(weight, weight[:rows], numbers, numbers, factors, less)
        finish_hidden_rows(product, factors, factors, weight, numbers, weight[:rows])
        scale_hidden_rows(weight, factors, weight[:rows])
"""
SCORE = """if True:
    from fastdaa.kernels.score import score_tokens

    weight = torch.zeros(4100, 80, dtype=torch.bfloat16)
    for rows in (256, 37, 1):
        hidden, targets = weight[:rows], torch.zeros(rows, dtype=torch.int64)
        score_tokens(hidden, weight, targets)
"""
SIZES_OF_ONE = """if True:
    from fastdaa.kernels.row_statistics import take_row_statistics
    from fastdaa.kernels.row_gradient import write_row_gradient
    from fastdaa.kernels.row_slopes import take_row_slopes
    from fastdaa.kernels.hidden_rows import finish_hidden_rows, scale_hidden_rows
    from fastdaa.kernels.score import score_tokens
    from fastdaa.kernels.target_rows import add_sorted_rows

    z, target = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    state = take_row_statistics(z, target, stats=True)[:3]
    write_row_gradient(z, target, *state, torch.ones(1), dtype=torch.float32)
    take_row_slopes(z, target, torch.zeros(1, 1, dtype=torch.bfloat16), stats=True)
    score_tokens(torch.zeros(1, 1), torch.zeros(1, 1), target, stats=True)
    add_sorted_rows(z, z, target, target, torch.ones(1))
    finish_hidden_rows(z, torch.ones(1), torch.ones(1), z, target, z, target)
    scale_hidden_rows(z, torch.ones(1), z.bfloat16(), target)
"""
DIVERGENCE = """if True:
    from fastdaa.kernels.divergence import HeadOptions, token_divergences

    weight, bias = torch.zeros(300, 25, dtype=torch.float16), torch.zeros(300)
    for rows in (256, 37):
        token_divergences(
            weight[:rows], weight, weight[:rows], weight, bias=bias, js=True,
            options=HeadOptions(softcap=30.0),
        )
"""
OBJECTIVE = """if True:
    from fastdaa.kernels.objective import evaluate_pairs, evaluate_tokens
    from fastdaa.kernels.objective_functions import apa, dpo

    for start in (0, 1):
        logps, offsets = torch.zeros(8)[start : start + 6], torch.tensor([0, 3, 6, 6, 6, 6])[start:]
        ref = torch.zeros(5)[start : start + 4]
        evaluate_pairs(dpo, logps, offsets[:5], ref_logps=ref, parameters=(0.1, 0.0, 0.0))
        evaluate_tokens(apa, logps, offsets[:5], ref_token_logps=logps, parameters=(0.2,))
"""


CALLS = """if True:
    from fastdaa import LmHead, engine_check, engines
    from fastdaa.scaled_rows import scaled_rows
    from fastdaa.target_rows import TargetRows, add_target_rows, finish_hidden

    def memory(rows, width, device, dtype):
        # Rows begin where they do on GPUs.
        stride = on_a_gpu(rows, width, torch.device("meta"), dtype).stride(0)
        return torch.zeros(rows, stride, dtype=dtype)[:, :width]

    on_a_gpu = engines.logits_memory
    engines.logits_memory = engine_check.logits_memory = memory

    def tile(width, start, vocab):
        z, head = memory(4, width, None, torch.float32), LmHead(torch.zeros(vocab, 1))
        return engines.TritonTile(head, z, slice(start, start + width), torch.bfloat16)

    engine_check.wrong_results(torch.device("cpu"))
    checked = {name: set(found) for name, found in variants.items()}
    variants.clear()
    targets, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    for vocab in (128256, 50257):
        whole = tile(vocab, 0, vocab)
        state = whole.statistics(targets)[0]
        whole.slopes(targets)
        for start, stop in ((0, 12544), (vocab // 12544 * 12544, vocab)):
            tile(stop - start, start, vocab).states(targets)
            tile(stop - start, start, vocab).gradient(state, targets, ones)
    weight = torch.zeros(1600, 4096, dtype=torch.bfloat16)
    rows = TargetRows(targets, ones, ones)
    for entries, factor in ((None, None), (ones, weight[:4])):
        of = rows._replace(entries=entries)
        add_target_rows(weight, weight[:4], of, engine="triton", factor=factor)
    for out in (None, weight[:4]):
        finish_hidden(torch.zeros(4, 4096), rows, weight, out, engine="triton")
    scaled_rows(weight[:4], ones, weight.dtype, engine="triton")
    not_checked = [name for name, found in variants.items() if found - checked.get(name, set())]
    print(json.dumps([len(variants), not_checked]))
"""


@pytest.fixture(scope="module")
def on_a_device(
    tmp_path_factory: pytest.TempPathFactory, repository_root: Path
) -> Callable[[str], str]:
    """``on_a_device(calls)``: what calls print."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Triton's launcher needs a C compiler and Python.h")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    subprocess.run(
        [
            *(compiler, "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library.name}"),
            *("-o", library, Path(__file__).with_name("stub_driver.c")),
        ],
        check=True,
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_LIBCUDA_PATH": str(folder)}

    def run(calls: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join((DEVICE, calls))], cwd=repository_root,
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_code_that_calls_run_was_checked_before(on_a_device: Callable[[str], str]) -> None:
    """Other alignments are other machine code: ``engine="auto"`` has to try that of models."""
    used, not_checked = json.loads(on_a_device(CALLS))
    assert used == 7 and not_checked == []


COUNTED = """if True:
    from fastdaa.kernels.score import score_tokens

    # Rows of 160 bytes have descriptors, rows of 162 bytes cannot.
    for width in (80, 81):
        weight = torch.zeros(300, width, dtype=torch.bfloat16)
        score_tokens(weight[:64], weight, torch.zeros(64, dtype=torch.int64))
    counts = ("stub_launches", "stub_descriptors")
    print(json.dumps([ctypes.c_int.in_dll(stub, name).value for name in counts]))
"""


def test_launches_reach_the_driver(on_a_device: Callable[[str], str]) -> None:
    assert json.loads(on_a_device(COUNTED)) == [4, 2]  # each merges splits, and has two operands


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param(
            ROWS,
            {
                "_take_row_states_kernel": 1,
                "_merge_splits_kernel": 1,
                "_write_row_gradient_kernel": 1,
                "_sum_columns_kernel": 1,
            },
            id="rows",
        ),
        pytest.param(
            SLOPES,
            {
                "_take_row_states_kernel": 1,
                "_merge_splits_kernel": 1,
                "_finish_row_slopes_kernel": 1,
            },
            id="slopes",
        ),
        pytest.param(
            TARGETS,
            {
                "_add_target_rows_kernel": 2,
                "_finish_hidden_rows_kernel": 1,
                "_scale_hidden_rows_kernel": 1,
            },
            id="targets",
        ),
        pytest.param(SCORE, {"_score_tiles_kernel": 1, "_merge_splits_kernel": 1}, id="score"),
        pytest.param(
            SIZES_OF_ONE,
            {
                "_take_row_states_kernel": 2,  # the second one writes slopes
                "_write_row_gradient_kernel": 1,
                "_finish_row_slopes_kernel": 1,
                "_score_tiles_kernel": 1,
                "_merge_splits_kernel": 1,
                "_add_target_rows_kernel": 1,
                "_finish_hidden_rows_kernel": 1,
                "_scale_hidden_rows_kernel": 1,
            },
            id="sizes-of-one",
        ),
        pytest.param(
            DIVERGENCE,
            {
                "_sum_gaps_kernel": 1,
                "_merge_gaps_kernel": 1,
                "_sum_js_kernel": 1,
                "_sum_splits_kernel": 1,
            },
            id="divergence",
        ),
        pytest.param(
            OBJECTIVE, {"_evaluate_pairs_kernel": 1, "_evaluate_tokens_kernel": 1}, id="objective"
        ),
    ],
)
def test_a_launcher_compiles_one_variant_whatever_the_batch(
    calls: str, expected: dict[str, int], on_a_device: Callable[[str], str]
) -> None:
    report = (
        "print(json.dumps([{name: len(found) for name, found in variants.items()}, list(fused)]))"
    )
    found, fused = json.loads(on_a_device(f"{calls}\n{report}"))
    assert found == expected
    # What is fused depends on the variant, and a row has the same bits in all of them. Equal terms
    # of an objective cancel.
    exact = ("_take_row_states_kernel", "_merge_splits_kernel", "_evaluate_")
    assert not [name for name in fused if name.startswith(exact)]
