"""The head's work inside the model's forward, whatever is wrapped around or copied from it."""

from __future__ import annotations

import copy
import inspect
import io
import warnings

import pytest
import torch
import transformers

from fastdaa.train.backbone import (
    BackboneOutput,
    backbone_of,
    has_head_task,
    install_head_task,
    remove_head_task,
    run_head_task,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PACK = {"input_ids": torch.arange(3, 15)[None], "position_ids": torch.arange(12)[None]}


def build(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def identity(hidden):
    return hidden


def hidden_of(model):
    return run_head_task(model, PACK, identity).result


@torch.no_grad()
def assert_knows_head_task(model):
    """Its head task sees the hidden states from which its own head makes its logits."""
    logits = model(**PACK).logits
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(hidden_of(model)), logits)


def test_forward_without_the_keyword_is_unchanged():
    model = build()
    signature = inspect.signature(model.forward)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(**PACK, labels=PACK["input_ids"])
    written = model.generate(PACK["input_ids"], max_new_tokens=4, do_sample=False)
    assert install_head_task(model) is model
    after = model(**PACK, labels=PACK["input_ids"])
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(
        written, model.generate(PACK["input_ids"], max_new_tokens=4, do_sample=False)
    )
    assert inspect.signature(model.forward) == signature
    assert state.keys() == model.state_dict().keys()
    assert_knows_head_task(model)


def test_no_logits_are_made():
    model = build()
    install_head_task(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    output = run_head_task(model, PACK, lambda hidden: hidden.shape)
    assert output == BackboneOutput((1, 12, 32), None)


def test_hooks_around_the_model_see_the_call():
    model = build()
    install_head_task(model)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    run_head_task(model, PACK, lambda hidden: seen.append("task"))
    assert seen == ["before", "task", "after"]


def test_installed_twice_removed_once():
    model = build()
    install_head_task(model)
    forward = model.forward
    install_head_task(model)
    assert model.forward == forward
    remove_head_task(model)
    assert not has_head_task(model)
    assert "forward" not in vars(model)
    remove_head_task(model)
    with pytest.raises(RuntimeError, match="without install_head_task"):
        run_head_task(model, PACK, identity)


def test_an_earlier_patch_stays_in_use():
    model = build()
    original, calls = model.forward, []

    def patched(**kwargs):
        calls.append(1)
        return original(**kwargs)

    model.forward = patched
    install_head_task(model)
    model(**PACK)
    assert calls == [1]
    remove_head_task(model)
    assert model.forward is patched


def test_a_deep_copy_runs_its_own_weights():
    model = build()
    install_head_task(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(hidden_of(model), hidden_of(twin))
    assert_knows_head_task(twin)
    assert_knows_head_task(model)


def test_pickling_gives_a_plain_model():
    model = build()
    install_head_task(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(**PACK).logits, model(**PACK).logits)
    assert not has_head_task(loaded)
    install_head_task(loaded)
    assert_knows_head_task(loaded)


def test_saving_and_loading(tmp_path):
    from fastdaa.train.attention import ATTENTION_NAME, enable_segments

    model = build()
    install_head_task(model)
    enable_segments(model)
    model.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**PACK).logits, model(**PACK).logits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft_before_and_after(when):
    peft = pytest.importorskip("peft")
    model = build()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if when == "before":
        install_head_task(model)
    wrapped = peft.get_peft_model(model, config)
    if when == "after":
        install_head_task(wrapped)
    assert_knows_head_task(wrapped)
    hidden_of(wrapped).sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


@pytest.fixture
def no_accelerator_yet():
    """accelerate keeps one state a process; a trainer of another test may have made it."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator_yet")
def test_accelerate_wraps_and_unwraps():
    accelerate = pytest.importorskip("accelerate")
    model = build()
    install_head_task(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    assert has_head_task(prepared)
    seen = []
    run_head_task(prepared, PACK, lambda hidden: seen.append(prepared.lm_head(hidden).dtype))
    assert seen == [torch.bfloat16]
    with pytest.raises(RuntimeError, match="something else has wrapped"):
        remove_head_task(prepared)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_knows_head_task(bare)


def test_mixture_of_experts_returns_its_auxiliary_loss():
    model = build("Mixtral", num_local_experts=4, output_router_logits=True)
    install_head_task(model)
    expected = model(**PACK).aux_loss
    assert torch.equal(run_head_task(model, PACK, identity).aux_loss, expected)
    model.config.output_router_logits = False
    assert run_head_task(model, PACK, identity).aux_loss is None


@pytest.mark.parametrize("name", ["Olmo2", "Phi3", "Qwen2", "OPT"])
def test_hidden_states_are_those_that_the_head_reads(name):
    extra = {"ffn_dim": 48, "word_embed_proj_dim": 16} if name == "OPT" else {}
    model = build(name, **extra)
    install_head_task(model)
    assert_knows_head_task(model)


def test_backbone_under_another_name_than_its_prefix():
    # Of Llama 4 the text model's base_model is itself, and the multimodal one holds it whole.
    text = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text)).eval()
    install_head_task(model)
    assert_knows_head_task(model)
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "intermediate_size": 16, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16,
    }  # fmt: skip
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    assert type(backbone_of(transformers.Llama4ForConditionalGeneration(config))) is type(
        model.model
    )


def test_text_decoder_of_a_multimodal_model():
    text = {**SIZES, "model_type": "llama"}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={**vision, "model_type": "clip_vision_model", "patch_size": 4},
        image_token_index=96,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlavaForConditionalGeneration(config).eval()
    install_head_task(model)
    assert type(backbone_of(model)).__name__ == "LlamaModel"
    assert_knows_head_task(model)


def test_misuse_is_named():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        install_head_task(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="whose base_model is itself"):
        install_head_task(build().model)
    model = build()
    install_head_task(model)
    with pytest.raises(ValueError, match="neither labels nor logits_to_keep"):
        model(**PACK, labels=PACK["input_ids"], head_task=identity)
    with pytest.raises(TypeError, match="keyword arguments only"):
        model(PACK["input_ids"], head_task=identity)
