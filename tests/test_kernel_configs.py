"""Which entry of the tables a GPU gets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastdaa.kernels import configs, score_configs


@pytest.mark.parametrize(
    ("capability", "rows", "tiles"),
    [
        pytest.param((7, 5), 80, 80, id="older"),
        pytest.param((8, 0), 80, 80, id="A100"),
        pytest.param((8, 9), 80, 80, id="L40"),
        pytest.param((9, 0), 90, 90, id="H200"),
        pytest.param((10, 0), 100, 100, id="B200"),
        pytest.param((10, 3), 100, 100, id="B300"),
        # Neither tcgen05 nor as much shared memory: the tiles of an A100.
        pytest.param((12, 0), 100, 80, id="RTX-50"),
    ],
)
def test_a_gpu_takes_the_entry_of_its_architecture(monkeypatch, capability, rows, tiles):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    device = torch.device("cuda", 1)
    assert configs.architecture(device) == rows
    assert score_configs._architecture(device) == tiles
    assert set(asked) == {device}
    table = {a: configs.RowConfig(16 * a, 4) for a in configs.ARCHITECTURES}
    monkeypatch.setitem(configs.ROW_CONFIGS, "row_gradient", table)
    assert configs.row_config("row_gradient", device) == table[rows]


def test_cpu_tensors_take_the_first_entry(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    assert configs.architecture(torch.device("cpu")) == configs.ARCHITECTURES[0]
