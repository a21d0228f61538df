"""Models of which accelerate keeps weights elsewhere until their layer runs."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from fastdaa.train.offload import check_offload

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def offloaded(model, *parts, folder):
    """Those of ``PARTS`` lie on disk."""
    device_map = {part: "disk" if part in parts else "cpu" for part in (*PARTS, "model.rotary_emb")}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


@pytest.mark.filterwarnings("ignore")
class TestOffloaded:
    @pytest.mark.parametrize("part", ["model.layers.1", "lm_head"])
    def test_weights_to_train_are_refused(self, make_trainer, tiny_model, tmp_path, part):
        model = offloaded(tiny_model(), part, folder=tmp_path / "away")
        with pytest.raises(ValueError, match=r"^model: expected the weights to .* offloaded; load"):
            make_trainer(model=model)

    def test_the_head_of_a_reference_is_refused(self, make_trainer, tiny_model, tmp_path):
        reference = offloaded(tiny_model(), "lm_head", folder=tmp_path / "away")
        with pytest.raises(ValueError, match=r"ref_model: expected the LM head on .* its LM head"):
            make_trainer(ref_model=reference)
        with pytest.raises(ValueError, match="ref_model: expected the LM head"):
            make_trainer(ref_model=cpu_offload(tiny_model(), execution_device="cpu"))

    def test_other_layers_may_be_anywhere(self, make_trainer, tiny_model, losses_of, tmp_path):
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(
            r=2, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False
        )

        def losses(model, reference):
            torch.manual_seed(0)
            options = {"max_steps": 2, "learning_rate": 1e-2}
            trainer = make_trainer(model=model, ref_model=reference, peft_config=adapter, **options)
            trainer.train()
            return losses_of(trainer)

        away = [
            offloaded(tiny_model(), "model.layers.1", folder=tmp_path / f"away{number}")
            for number in range(2)
        ]
        assert losses(*away) == losses(tiny_model(), tiny_model())


def test_other_models_are_none_of_its_business(tiny_model):
    check_offload(tiny_model(), "model", trained=True)
