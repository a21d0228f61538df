"""``torch_compile``: the results of eager, and nothing is compiled anew for another length."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from fastdaa.train.compilation import CompiledBackbone

STEPS = 7
CASES = {
    "packs of unequal numbers of pairs": {"layout": "prefix_shared", "tokens_per_pack": 40},
    "padded": {"layout": "padded"},
    "adapter": {"layout": "packed", "use_peft": True, "gradient_checkpointing": True},
}


class Graphs(TrainerCallback):
    """Graphs that were compiled up to the end of every step."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def on_step_end(self, args, state, control, **_):
        self.after.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def train(make_trainer, tiny_model, pairs):
    """``train(options, **more)``: the trainer after ``STEPS`` steps of many lengths."""

    def run(options, **more):
        options = {**options, **more}
        if options.pop("use_peft", False):
            from peft import LoraConfig

            options["peft_config"] = LoraConfig(
                r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
            )
        trainer = make_trainer(
            model=tiny_model(num_hidden_layers=1), data=pairs(21), max_steps=STEPS,
            per_device_train_batch_size=3, **options,
        )  # fmt: skip
        trainer.train()
        return trainer

    yield run
    torch._dynamo.reset()


# What dynamo itself warns of while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_as_eager_and_compiled_once(train, losses_of, case):
    eager = losses_of(train(CASES[case]))
    counters.clear()
    graphs = Graphs()
    trainer = train(
        CASES[case], torch_compile=True, torch_compile_backend="eager", callbacks=[graphs]
    )
    assert losses_of(trainer) == pytest.approx(eager, abs=1e-5)
    # The first pack, with and without gradient; a dimension of another size may cost one more.
    assert 0 < graphs.after[2] == graphs.after[-1]


def test_only_the_backbone_is_compiled(make_trainer):
    plain, compiled = make_trainer(), make_trainer(torch_compile_backend="eager")
    assert plain.compilation is None and compiled.compilation == ("eager", None)
    calls = [vars(t.model).get("_fastdaa_backbone_call") for t in (plain, compiled)]
    assert calls[0] is None and isinstance(calls[1], CompiledBackbone)
    held = vars(compiled.reference.model)["_fastdaa_backbone_call"]
    assert isinstance(held, CompiledBackbone) and held is not calls[1]
    # accelerate would compile the head task with it, for every step anew.
    assert type(compiled.accelerator.prepare_model(compiled.model)) is type(compiled.model)
    # Another run on the model is as its own settings say.
    again = make_trainer(model=compiled.model)
    assert "_fastdaa_backbone_call" not in vars(again.model)


def test_as_accelerate_launch_asks(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    assert make_trainer().compilation == ("eager", "default")


def test_copies_compile_for_themselves():
    call = CompiledBackbone("eager", "default")
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert torch.equal(call(layer, {"x": torch.ones(2)}), torch.full((2,), 2.0))
    for other in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert (other.backend, other.mode, other._of) == ("eager", "default", None)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_graphs_of_one_length(make_trainer, mode):
    with pytest.raises(ValueError, match="torch_compile_mode: expected one of 'default'"):
        make_trainer(torch_compile_mode=mode)
