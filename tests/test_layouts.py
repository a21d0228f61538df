"""The three layouts give the same log-probs and gradients, family by family."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdaa.data.collate import PairCollator
from fastdaa.train.attention import dense_mask, enable_segments
from fastdaa.train.backbone import causal_lm, install_head_task, run_head_task
from fastdaa.train.support import check_layout, supports_segments

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 4}),
    "llama-gqa": ("Llama", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "mistral-window": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 5}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "gpt2": ("GPT2", {**SIZES, **NO_DROPOUT, "n_layer": 2, "n_head": 4, "n_embd": 32}),
}
# Prompt, chosen and rejected tokens. One pair is longer than a block of the CPU kernel.
LENGTHS = ((1, 1, 3), (40, 60, 33), (7, 9, 1), (5, 2, 4))


@functools.cache
def build(family: str) -> transformers.PreTrainedModel:
    """A tiny random model; tests copy it before they change it."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    implementation = "eager" if family == "gemma2" else "sdpa"
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")._from_config(
        config, attn_implementation=implementation
    )
    # Norm weights and biases of one and zero hide mistakes.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.eval()


@functools.cache
def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {"row_id": i}
        | {
            name: torch.randint(3, VOCAB, (n,), generator=generator).tolist()
            for name, n in zip(names, lengths, strict=True)
        }
        for i, lengths in enumerate(LENGTHS)
    ]


def pack_of(layout: str) -> dict[str, Any]:
    return PairCollator(layout, pad_token_id=0)(rows())["packs"][0]


def token_logps(logits: Tensor, pack: dict[str, Any]) -> Tensor:
    picked = logits.flatten(0, -2)[pack["rows"]].log_softmax(-1)
    return picked.gather(1, pack["targets"][:, None]).squeeze(1)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    model = causal_lm(model)
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def measure(model: nn.Module, logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of a fixed weighted sum of them."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype) / len(logps)
    (logps * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), grads


def padded_reference(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the unchanged model on a padded batch, and autograd through them."""
    pack = pack_of("padded")
    inputs = {name: pack[name] for name in ("input_ids", "attention_mask")}
    return measure(model, token_logps(model(**inputs).logits, pack))


def through_backbone(model: nn.Module, pack: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    def head(hidden: Tensor) -> Tensor:
        return token_logps(logits_of(model, hidden), pack)

    return measure(model, run_head_task(model, pack, head).result)


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    assert sum(grad.abs().sum() for grad in expected[1].values()) > 0
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            found[1][name],
            grad,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree(family, training):
    model = copy.deepcopy(build(family)).train(training)
    expected = padded_reference(model)
    enable_segments(model)
    install_head_task(model)
    for layout in ("prefix_shared", "packed", "padded"):
        assert_same(through_backbone(model, pack_of(layout)), expected, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_with_gradient_checkpointing(family, use_reentrant):
    model = copy.deepcopy(build(family)).train()
    expected = padded_reference(model)
    enable_segments(model)
    # transformers renamed it within 5.x and warns about the old name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    install_head_task(model)
    assert_same(through_backbone(model, pack_of("prefix_shared")), expected, 1e-5)


def in_native_precision(model: nn.Module) -> None:
    """Llama's own RMSNorm computes in fp32 whatever its input."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox", "gpt2"])
def test_layouts_agree_in_fp64(family):
    model = copy.deepcopy(build(family)).double()
    in_native_precision(model)
    expected = padded_reference(model)
    enable_segments(model)
    install_head_task(model)
    for layout in ("prefix_shared", "packed"):
        assert_same(through_backbone(model, pack_of(layout)), expected, 1e-10)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "gemma2"])
def test_dense_masks_agree(family):
    model = copy.deepcopy(build(family))
    expected = padded_reference(model)
    install_head_task(model)
    pack = pack_of("prefix_shared")
    length = pack["input_ids"].shape[1]
    pack["attention_mask"] = dense_mask(pack.pop("segments"), length, model.config)
    if family == "gemma2":
        assert set(pack["attention_mask"]) == {"full_attention", "sliding_attention"}
    assert_same(through_backbone(model, pack), expected, 1e-5)


def test_layouts_agree_with_lora():
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(build("llama-gqa"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    expected = padded_reference(model)
    enable_segments(model.get_base_model())
    install_head_task(model)
    found = through_backbone(model, pack_of("prefix_shared"))
    assert all("lora" in name for name in found[1])
    assert_same(found, expected, 1e-5)
    with model.disable_adapter(), torch.no_grad():
        pack = pack_of("padded")
        inputs = {name: pack[name] for name in ("input_ids", "attention_mask")}
        adapter_off = token_logps(model(**inputs).logits, pack)
        pack = pack_of("prefix_shared")
        plain = run_head_task(
            model, pack, lambda hidden: token_logps(logits_of(model, hidden), pack)
        ).result
    assert (adapter_off - found[0]).abs().max() > 1e-3
    torch.testing.assert_close(plain, adapter_off, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_accepts_and_leaves_no_trace(family):
    model = copy.deepcopy(build(family)).train()
    before = model.config._attn_implementation
    assert supports_segments(model).ok
    check = check_layout(model)
    assert check.ok
    assert check.error < 1e-4
    assert model.config._attn_implementation == before
    assert all(module.training for module in model.modules())


UNSUPPORTED = {
    "Mamba": ({}, "recurrent"),
    "Jamba": ({"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}, "recurrent"),
    "GptOss": ({"num_local_experts": 2, "head_dim": 8}, "sinks"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "registry"),
    "Falcon": ({"alibi": True}, "ALiBi"),
    "T5": ({"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1}, "encoder-decoder"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_named_with_their_reason(name):
    options, word = UNSUPPORTED[name]
    head = "ForConditionalGeneration" if name == "T5" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**{**GROUPED, **options})
    with torch.device("meta"):
        model = getattr(transformers, f"{name}{head}")(config)
    support = supports_segments(model)
    assert not support.ok
    assert word in support.reason


def test_padded_rows_have_the_positions_of_the_model():
    """Those of Kosmos-2.5 begin behind its padding token, not with 0."""
    text = {
        "vocab_size": VOCAB, "embed_dim": 32, "ffn_dim": 48, "layers": 2, "attention_heads": 4,
        "max_position_embeddings": 160, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "init_std": 0.1, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.Kosmos2_5Config(
        text_config=text, vision_config={**vision, "num_attention_heads": 4}
    )
    torch.manual_seed(0)
    model = transformers.Kosmos2_5ForConditionalGeneration(config).eval()
    assert not supports_segments(model, probe=True).ok
    expected = padded_reference(model)
    install_head_task(model)
    assert_same(through_backbone(model, pack_of("padded")), expected, 1e-4)


def test_model_that_drops_the_segments_fails_the_probe():
    model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**GROUPED))
    support = supports_segments(model, probe=True)
    assert not support.ok
    assert "segments" in support.reason


def test_model_with_its_windows_in_the_mask_alone_fails_the_probe():
    sizes = {**GROUPED, "num_local_experts": 2, "sliding_window": 64}
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes))
    support = supports_segments(model, probe=True)
    assert not support.ok
    assert "differ" in support.reason
    assert model.config.sliding_window == 64


def test_probe_leaves_windows_as_they_were():
    model = copy.deepcopy(build("gemma2"))
    assert check_layout(model).ok
    assert model.config.sliding_window == 5
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [5, None]
