"""DDP looks for unused parameters only where there may be some, or where it is asked to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from fastdaa.train.sharding import settle_ddp

SMALL = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def _opt(layerdrop):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=32, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=8, layerdrop=layerdrop,
        )
    )  # fmt: skip


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def _mixture():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    )


@pytest.mark.parametrize(
    ("build", "given", "dropout_off", "expected"),
    [
        pytest.param(_llama, None, True, False, id="uses all"),
        pytest.param(_llama, True, True, True, id="asked for"),
        pytest.param(_mixture, None, True, None, id="experts"),
        pytest.param(lambda: _opt(0.1), None, False, None, id="dropped layers"),
        pytest.param(lambda: _opt(0.1), None, True, False, id="layers that stay"),
    ],
)
def test_settle(build, given, dropout_off, expected):
    args = SimpleNamespace(ddp_find_unused_parameters=given, disable_dropout=dropout_off)
    settle_ddp(args, build())
    assert args.ddp_find_unused_parameters is expected


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_what_ddp_is_told(make_trainer, adapter):
    from peft import LoraConfig

    lora = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if adapter else {}
    assert not make_trainer(**lora).accelerator.ddp_handler.find_unused_parameters
    asked = make_trainer(**lora, ddp_find_unused_parameters=True)
    assert asked.accelerator.ddp_handler.find_unused_parameters
