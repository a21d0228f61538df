"""``LmHead``: the logits of real architectures from their config, and PEFT around the head."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch

from fastdaa import (
    LmHead,
    reference,
    token_divergence,
    token_entropy,
    token_logps,
    token_logps_and_entropy,
)
from fastdaa.head_config import read_head_config

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MLA = {
    "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
CAP = {"final_logit_softcapping": 0.7}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}

# model type: fields that differ from SIZES (None: leave out), and the head that has to come out.
FAMILIES = {
    "llama": ({}, {}),
    "llama-tied": ({"tie_word_embeddings": True}, {}),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "mistral": ({}, {}),
    "mixtral": (EXPERTS, {}),
    "gpt_oss": (EXPERTS, {}),
    "deepseek_v3": (
        {
            **MLA, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 16,
        },
        {},
    ),
    "phi": ({}, {"bias": True}),
    "phi3": ({}, {}),
    "gptj": ({**GPT2, "rotary_dim": 4}, {"bias": True}),
    "gpt2": (GPT2, {}),
    "gpt_neox": ({}, {}),
    "gpt_bigcode": (GPT2, {}),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, {}),
    "opt-projected": ({"ffn_dim": 48, "word_embed_proj_dim": 16}, {}),
    "bloom": ({"n_layer": 2, "n_head": 4}, {}),
    "falcon": ({"head_dim": None}, {}),
    "stablelm": ({}, {}),
    "starcoder2": ({}, {}),
    "olmo2": ({}, {}),
    "smollm3": ({}, {}),
    "glm4": ({}, {}),
    "mamba": ({"state_size": 4, "num_layers": 2}, {}),
    "jamba": (
        {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}, {},
    ),
    "gemma": ({}, {}),
    "gemma2": (CAP, {"softcap": 0.7}),
    "gemma2-uncapped": ({"final_logit_softcapping": None}, {"softcap": 30.0}),
    "gemma3_text": (CAP, {"softcap": 0.7}),
    "vaultgemma": (CAP, {"softcap": 0.7}),
    "nanochat": (CAP, {"softcap": 0.7}),
    "recurrent_gemma": (
        {
            "lru_width": 32, "logits_soft_cap": 0.7, "block_types": ["recurrent", "attention"],
            "attention_window_size": 16,
        },
        {"softcap": 0.7},
    ),
    "xlstm": ({"output_logit_soft_cap": 0.7, "num_heads": 4}, {"softcap": 0.7}),
    "cohere": ({"logit_scale": 0.3}, {"logit_scale": 0.3}),
    "cohere2": ({"logit_scale": 0.3}, {"logit_scale": 0.3}),
    "granite": ({"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "granitemoe": ({"logits_scaling": 4.0, **EXPERTS}, {"logit_scale": 0.25}),
    "granitemoehybrid": (
        {"logits_scaling": 4.0, "mamba_n_heads": 8, "mamba_d_head": 8}, {"logit_scale": 0.25},
    ),
    "minicpm3": ({**MLA, "dim_model_base": 8}, {"logit_scale": 0.25}),
    "hyperclovax": ({"logits_scaling": 4.0}, {"logit_scale": 4.0}),
    "falcon_h1": ({"lm_head_multiplier": 0.4, "mamba_chunk_size": 16}, {"logit_scale": 0.4}),
    "mpt": (MPT, {}),
    "mpt-unused-scale": ({**MPT, "logit_scale": 0.3}, {}),
    "mpt-unused-scale-name": ({**MPT, "logit_scale": "inv_sqrt_d_model"}, {}),
    "inkling2_text": (
        {"n_routed_experts": 8, "unpadded_vocab_size": 90, **CAP}, {"softcap": 0.7, "vocab": 90},
    ),
}  # fmt: skip


def build(family: str, fields: dict) -> transformers.PreTrainedModel:
    name = family.split("-")[0]
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    given = {k: v for k, v in {**SIZES, **fields}.items() if v is not None}
    config = transformers.AutoConfig.for_model(name, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # logits of a size at which a cap or a scale cannot be overlooked
        head = model.get_output_embeddings()
        head.weight.normal_()
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # of the model, about absent kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_head_are_those_of_the_model(family):
    fields, expected = FAMILIES[family]
    model = build(family, fields)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        hidden_states = model.base_model(ids, use_cache=False)[0]
    head = LmHead.from_model(model)
    torch.testing.assert_close(head.logits(hidden_states), logits, rtol=1e-5, atol=1e-5)
    assert head.softcap == expected.get("softcap")
    assert head.logit_scale == pytest.approx(expected.get("logit_scale", 1.0))
    assert (head.bias is not None) == expected.get("bias", False)
    assert head.vocab_size == expected.get("vocab", 96)
    if getattr(model.config, "tie_word_embeddings", False):
        assert head.weight is model.get_input_embeddings().weight
    assert head.trained


NOT_LINEAR = {
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "xlm-roberta": {"is_decoder": True},
    "electra": {"is_decoder": True, "embedding_size": 16},
    "modernbert-decoder": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_head_with_further_layers_is_refused(name):
    config = transformers.AutoConfig.for_model(name, **SIZES, **NOT_LINEAR[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="expected logits that are one product of the last hidden"):
        LmHead.from_model(model)


def tiny_llama(**fields) -> transformers.PreTrainedModel:
    return build("llama", {"num_hidden_layers": 1, **fields})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(name):
    """T5 scales the hidden states of a tied head, BART adds a buffer to the logits."""
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    small = {
        "vocab_size": 96,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_position_embeddings": 32,
    }
    config = transformers.AutoConfig.for_model(
        name, **(sizes if name == "t5" else {"d_model": 16}), **small
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="expected a causal LM, got an encoder-decoder model"):
        LmHead.from_model(model)


def test_what_is_no_hugging_face_model_is_refused():
    with pytest.raises(TypeError, match=r"expected a Hugging Face causal LM, got Linear$"):
        LmHead.from_model(torch.nn.Linear(2, 3))
    wrapped = torch.nn.Module()
    wrapped.module = tiny_llama()
    with pytest.raises(TypeError, match=r"got Module \(give the model inside, its `module`\)"):
        LmHead.from_model(wrapped)


def test_heads_are_equal_only_to_themselves():
    first, second = (LmHead(torch.zeros(3, 2)) for _ in range(2))
    assert first == first and first != second
    assert len({first, second, first}) == 2


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel: expected a causal LM with output embeddings"):
        LmHead.from_model(tiny_llama().model)


def test_a_quantised_head_is_refused():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(96, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"a quantised one .Linear with torch\.int8"):
        LmHead.from_model(model)


def test_a_packed_four_bit_head_is_refused():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(96 * 16, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"a quantised one .Linear with torch\.uint8"):
        LmHead.from_model(model)


def test_a_sharded_away_head_is_refused():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0, 32))
    with pytest.raises(ValueError, match="the head's weight is empty here; a sharded parameter"):
        LmHead.from_model(model)


def test_a_scale_that_is_no_number_is_refused():
    model = tiny_llama()
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ValueError, match=r"llama: expected config\.logit_scale to be a number"):
        LmHead.from_model(model)


def test_the_head_is_read_anew_and_not_copied():
    model = tiny_llama()
    head = LmHead.from_model(model, temperature=0.5)
    assert head.weight is model.lm_head.weight and head.temperature == 0.5
    model.lm_head.weight.requires_grad_(False)
    assert not head.trained
    assert not tiny_llama().requires_grad_(False).get_output_embeddings().weight.requires_grad


TEXT = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
# transformers 5.17 does not cap these logits.
PALIGEMMA = (
    0.7
    if "softcapping" in inspect.getsource(transformers.PaliGemmaForConditionalGeneration)
    else None
)
MULTIMODAL = {
    # The model, what its text config has, and what of it the model itself applies.
    "paligemma": ("PaliGemma", {"model_type": "gemma2", "head_dim": 8, **CAP}, (PALIGEMMA, 1.0)),
    "llava-gemma2": ("Llava", {"model_type": "gemma2", "head_dim": 8, **CAP}, (None, 1.0)),
    "llava-cohere": ("Llava", {"model_type": "cohere2", "logit_scale": 0.25}, (None, 1.0)),
    "llava-granite": ("LlavaNext", {"model_type": "granite", "logits_scaling": 8.0}, (None, 1.0)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_model_does_what_its_own_code_does(name):
    kind, text, expected = MULTIMODAL[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | text, vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=90,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        made = model(torch.arange(3, 14)[None], use_cache=False, output_hidden_states=True)
    head = LmHead.from_model(model)
    assert (head.softcap, head.logit_scale) == expected
    torch.testing.assert_close(
        head.logits(made.hidden_states[-1]), made.logits, rtol=1e-5, atol=1e-5
    )


def test_a_text_config_counts_where_no_code_can_be_read():
    text = SimpleNamespace(model_type="gemma2", final_logit_softcapping=0.7)
    model = tiny_llama()
    config = SimpleNamespace(model_type="wrapper", get_text_config=lambda: text)
    assert read_head_config(config, model).softcap is None  # Llama's code does not read it
    made_at_run_time = type("Made", (torch.nn.Module,), {"forward": lambda self: None})
    assert read_head_config(config, made_at_run_time()).softcap == 0.7


class CappedText(torch.nn.Module):
    """As a multimodal model that reads ``final_logit_softcapping``."""

    def forward(self):
        return None


class CallsSuper(CappedText):
    def forward(self):
        return super().forward()


class CallsBase(CappedText):
    def forward(self):
        return CappedText.forward(self)


class Replaces(CappedText):
    def forward(self):
        return 1


@pytest.mark.parametrize(
    ("kind", "softcap"),
    [
        (CallsSuper, 0.7),
        (CallsBase, 0.7),
        (type("Made", (CappedText,), {"forward": lambda self: CappedText.forward(self)}), 0.7),
        (type("MadeOfAnother", (CallsSuper,), {}), 0.7),
        (Replaces, None),
    ],
)
def test_a_subclass_that_runs_its_base_has_the_head_of_it(kind, softcap):
    text = SimpleNamespace(model_type="gemma2", final_logit_softcapping=0.7)
    config = SimpleNamespace(model_type="wrapper", get_text_config=lambda: text)
    assert read_head_config(config, kind()).softcap == softcap


# LmHead by itself


def test_logits_follow_the_specification():
    head = LmHead(torch.randn(9, 4), torch.randn(9), 1.5, -0.7, 1.3)
    hidden = torch.randn(2, 3, 4)
    expected = reference.logits(
        hidden.flatten(0, 1), head.weight, bias=head.bias,
        softcap=1.5, logit_scale=-0.7, temperature=1.3,
    )  # fmt: skip
    torch.testing.assert_close(head.logits(hidden).flatten(0, 1), expected)


def test_detach():
    head = LmHead(torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True), 2.0)
    assert head.trained and not head.detach().trained
    assert head.detach().softcap == 2.0
    assert LmHead(torch.ones(3, 2), torch.ones(3, requires_grad=True)).trained


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3),), ValueError, r"weight: expected shape \[V, D\], got \[3\]"),
        ((torch.zeros(3, 2).long(),), TypeError, "weight: expected fp16, bf16, fp32 or fp64"),
        (([[1.0]],), TypeError, "weight: expected a torch.Tensor, got list"),
        ((torch.zeros(3, 2), torch.zeros(2)), ValueError, r"bias: expected shape \[3\], got \[2\]"),
        ((torch.zeros(3, 2), None, -1.0), ValueError, "softcap: expected a finite number above 0"),
        ((torch.zeros(3, 2), None, None, 0), ValueError, "logit_scale: expected a number other"),
        ((torch.zeros(3, 2), None, None, 1.0, 0.0), ValueError, "temperature: expected a finite"),
    ],
    ids=["1d", "int", "list", "bias", "softcap", "scale", "temperature"],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LmHead(*arguments)


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft, config_class="LoraConfig", base=None, **fields):
    """A PEFT model whose trained parameters are no longer those of its initialisation."""
    if config_class == "LoraConfig":
        fields = {"r": 4, "lora_alpha": 12, **fields}
    config = getattr(peft, config_class)(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(base or tiny_llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def both_logits(model):
    """Of the model, and of the head on the model's last hidden states."""
    ids = torch.arange(14).view(2, 7)
    hidden_states = model.get_base_model().model(ids)[0]
    return model(ids).logits, LmHead.from_model(model).logits(hidden_states)


@pytest.mark.filterwarnings("ignore")  # of peft, about tied weights
@pytest.mark.parametrize(
    ("fields", "tied", "trained"),
    [
        pytest.param({"target_modules": ["q_proj"]}, False, False, id="other-layers"),
        pytest.param({"target_modules": "all-linear"}, False, False, id="all-linear"),
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, False, True, id="lm-head"),
        pytest.param(
            {"target_modules": ["lm_head"], "use_rslora": True}, False, True, id="rank-stabilised"
        ),
        pytest.param({"target_modules": ["lm_head"]}, True, True, id="lm-head-tied"),
        pytest.param({"target_modules": ["embed_tokens"]}, True, False, id="embedding-tied"),
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, True, id="saved"
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, True, True,
            id="single-tokens-tied",
        ),
    ],
)  # fmt: skip
def test_adapters_are_in_force_and_can_be_disabled(peft, fields, tied, trained):
    base = tiny_llama(tie_word_embeddings=tied)
    ids = torch.arange(14).view(2, 7)
    before = base(ids).logits.detach()
    model = adapted(peft, base=base, **fields)
    expected, got = both_logits(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert LmHead.from_model(model).trained == trained
    with model.disable_adapter():
        expected, got = both_logits(model)
        torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-5)


def test_gradients_of_lora_on_the_head_are_those_of_the_materialised_model(peft):
    model = adapted(peft, target_modules=["lm_head"])
    ids, targets = torch.arange(7)[None], torch.randint(96, (7,))
    twin = copy.deepcopy(model)
    picked = twin(ids).logits[0].log_softmax(-1).gather(1, targets[:, None])
    picked.sum().backward()

    hidden_states = model.get_base_model().model(ids)[0][0].detach()
    head = LmHead.from_model(model)
    token_logps(hidden_states, head.weight, targets).sum().backward()
    layer, expected = model.get_output_embeddings(), twin.get_output_embeddings()
    for name in ("lora_A", "lora_B"):
        got, want = (getattr(m, name)["default"].weight.grad for m in (layer, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert layer.base_layer.weight.grad is None


def test_a_merged_adapter_counts_once(peft):
    model = adapted(peft, target_modules=["lm_head"])
    original = model.get_output_embeddings().base_layer.weight.detach().clone()
    _, before = both_logits(model)
    model.merge_adapter()
    expected, got = both_logits(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(LmHead.from_model(model).weight.detach(), original)
        expected, got = both_logits(model)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, before, atol=1e-2)


def test_the_active_adapter_of_two_is_used(peft):
    model = adapted(peft, target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().lora_B["second"].weight.normal_()
    _, first = both_logits(model)
    model.set_adapter("second")
    expected, second = both_logits(model)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        pytest.param("LoraConfig", {"use_dora": True}, "got DoRA", id="dora"),
        pytest.param("LoraConfig", {"lora_dropout": 0.1}, "expected lora_dropout 0", id="dropout"),
        pytest.param("LoraConfig", {"lora_bias": True}, "got lora_bias", id="lora-bias"),
        pytest.param(
            "LoraConfig", {"alora_invocation_tokens": [5]}, "got ALora", id="activated-lora"
        ),
        pytest.param("IA3Config", {"feedforward_modules": []}, "got ia3", id="ia3"),
        pytest.param("LoHaConfig", {}, "got loha", id="loha"),
        pytest.param("VeraConfig", {}, "got vera", id="vera"),
    ],
)
def test_adapters_that_are_no_sum_of_two_matrices_are_refused(peft, config_class, fields, message):
    model = adapted(peft, config_class, target_modules=["lm_head"], **fields)
    with pytest.raises(ValueError, match=message):
        LmHead.from_model(model)
    with model.disable_adapter():
        LmHead.from_model(model)


@pytest.mark.parametrize("what", ["recompute", "single_pass", "entropy", "both", "divergence"])
def test_a_graph_holds_the_weight_as_what_was_saved_alone(what):
    """FSDP and ZeRO take the memory of a saved weight back until the backward pass."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets, head = torch.arange(5), LmHead(weight)
    if what in ("recompute", "single_pass"):
        result = token_logps(hidden, weight, targets, impl=what)
    elif what == "entropy":
        result = token_entropy(hidden, weight)
    elif what == "both":
        result = token_logps_and_entropy(hidden, weight, targets)[0]
    else:
        result = token_divergence(hidden, head, torch.randn(5, 8), head.detach())
    function = result.grad_fn
    while not hasattr(function, "options"):
        function = function.next_functions[0][0]
    held = function.options if isinstance(function.options, tuple) else (function.options,)
    assert all(one.weight.untyped_storage().nbytes() == 0 for one in held)
    result.sum().backward()
    assert weight.grad.any()
