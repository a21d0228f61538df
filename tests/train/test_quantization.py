"""LoRA on a base in 4 or 8 bits: the numbers of the dequantised model, and nothing in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdaa.head import LmHead
from fastdaa.train.adapter_files import find_adapter, load_causal_lm, load_merged
from fastdaa.train.backbone import causal_lm
from fastdaa.train.prepare import check_head
from fastdaa.train.quantization import (
    QuantizationOptions,
    describe,
    is_quantized,
    quantization_of,
    stored_quantization,
)
from fastdaa.train.reward_models import give_padding
from fastdaa.train.run_record import weights_fact
from fastdaa.train.sharding import check_parallelism

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

FOUR = {"load_in_4bit": True}
WAYS = [
    pytest.param(FOUR, id="nf4"),
    pytest.param({**FOUR, "use_bnb_nested_quant": True}, id="nested"),
    pytest.param({**FOUR, "bnb_4bit_quant_type": "fp4"}, id="fp4"),
    pytest.param({"load_in_8bit": True}, id="8-bit"),
]
BITS = [WAYS[0], WAYS[3]]
# Shapes that bitsandbytes has another packing for, on processors with AVX512-BF16.
PACKABLE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def quantized(tiny_model, tmp_path):
    """``quantized(dtype=torch.float32, sizes={}, **options)``: the tiny model, as loaded so."""

    def load(dtype=torch.float32, sizes=None, **options):
        folder = tmp_path / "base"
        tiny_model(**(sizes or {})).save_pretrained(folder)
        config = QuantizationOptions(**options).quantization_config(dtype)
        return load_causal_lm(str(folder), dtype=dtype, quantization_config=config)

    return load


def test_llm_int8_is_causal_on_a_gpu(quantized, monkeypatch):
    # There the columns with outliers, of any token, are rounded otherwise in all of them.
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)
    model = quantized(load_in_8bit=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(3.0)
        hidden = [
            model.model(torch.tensor([[1, 2, 3, 4, last]])).last_hidden_state for last in (5, 6)
        ]
    assert (hidden[0] - hidden[1])[:, :-1].abs().max() > 1e-3 * hidden[0].abs().max()
    check_head(model)


def lora(**options):
    given = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**given)


def dequantised(model, plain):
    """``plain`` with the values that the codes of ``model`` stand for, by bitsandbytes itself."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # Row by row, a scale of the largest magnitude / 127.
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            values = module.weight.data.float() * scales[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(values)
    return plain


def moved(model):
    """The same adapter on any model of these sizes, away from its zeros."""
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, lora())
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return adapted


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
@pytest.mark.parametrize("options", WAYS)
def test_numbers_of_the_dequantised_model(
    options, layout, quantized, tiny_model, one_step, naive, pairs
):
    data = pairs(4)
    base = quantized(**options)
    plain = dequantised(base, tiny_model())
    # What is measured is not rounding: the unquantised model is far away.
    with torch.no_grad():
        distance = (naive(plain).logps(data)[0] - naive(tiny_model()).logps(data)[0]).abs().max()
    assert float(distance) > (0.5 if "load_in_4bit" in options else 0.02)
    found = [
        one_step(model=moved(model), data=data, layout=layout, ref_model=tiny_model())
        for model in (base, plain)
    ]
    (grads, trainer), (expected, other) = found
    rows = [each.state.log_history[0] for each in (trainer, other)]
    for name in ("loss", "logps/chosen", "logps/rejected", "kl/token"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name
    trained = [name for name in grads if "lora_" in name]
    assert len(trained) == 2 * 7 * 2
    for name in trained:
        scale = expected[name].abs().max()
        assert float(scale) > 1e-5
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5 * float(scale))
    assert not any(grads[name].float().abs().max() for name in grads if "lora_" not in name)


@pytest.mark.parametrize("cached", [False, True], ids=["online", "cached"])
@pytest.mark.parametrize("options", WAYS)
def test_no_margin_before_the_first_step(options, cached, quantized, make_trainer):
    trainer = make_trainer(
        model=quantized(**options), peft_config=lora(), precompute_ref_log_probs=cached,
        max_steps=2, learning_rate=0.0, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    for row in trainer.state.log_history[:2]:
        # Cached log-probs come from other batches, whose products may round otherwise.
        assert row["rewards/margins"] == pytest.approx(0.0, abs=1e-6 if cached else 0.0)
        assert row["rewards/chosen"] == pytest.approx(0.0, abs=1e-6 if cached else 0.0)
        if not cached:
            assert row["kl/token"] == 0.0


@pytest.mark.parametrize("options", BITS)
def test_training_lowers_the_loss_and_leaves_the_base(
    options, quantized, make_trainer, losses_of, tmp_path
):
    model = quantized(**options)
    before = weights_fact(model)
    trainer = make_trainer(
        model=model, peft_config=lora(), max_steps=12, per_device_train_batch_size=8
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.2
    assert weights_fact(trainer.model, trainable=False).split()[0] == before.split()[0]
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    # An update of 1e-3 times a weight, or less, would be lost in bf16.
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_head_is_frozen_and_whole(quantized, make_trainer):
    trainer = make_trainer(model=quantized(**FOUR), peft_config=lora(), impl="frozen")
    trainer.train()
    core = causal_lm(trainer.model)
    head = LmHead.from_model(core)
    assert not head.trained
    for end in (core.get_input_embeddings(), core.get_output_embeddings()):
        assert end.weight.dtype == torch.float32 and end.weight.shape == (61, 16)
    assert type(core.get_output_embeddings()) is torch.nn.Linear
    kinds = {type(m) for m in core.modules() if isinstance(m, torch.nn.Linear)}
    assert bnb.nn.Linear4bit in kinds


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_quantised_head_is_refused(storage, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=[], bnb_4bit_quant_storage=storage
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    with pytest.raises(ValueError, match=r"expected a floating-point head, got a quantised one"):
        LmHead.from_model(model)


@pytest.mark.parametrize("options", BITS)
def test_evaluation_leaves_training_as_it_was(options, quantized):
    """On a CPU, bitsandbytes alone computes other logits in eval mode, and goes on with them."""
    model, ids = moved(quantized(sizes=PACKABLE, **options)), torch.arange(3, 15)[None]
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        logits = model.train()(input_ids=ids).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), trained)]

    before = step()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
    assert torch.equal(before[0], evaluated)
    assert all(torch.equal(new, old) for new, old in zip(step(), before, strict=True))


def test_a_repacked_model_is_refused(tiny_model, tmp_path, make_trainer):
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this processor gets no other packing")
    tiny_model(**PACKABLE).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 15)[None])
    with pytest.raises(ValueError, match=r"q_proj was run in eval mode"):
        make_trainer(model=model, peft_config=lora())


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_activation_checkpointing(reentrant, quantized, one_step):
    def grads(**options):
        return one_step(model=moved(quantized(**FOUR)), **options)[0]

    expected = grads()
    got = grads(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert any(float(grad.float().abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=name)


def test_bf16(quantized, make_trainer, losses_of):
    model = quantized(torch.bfloat16, **FOUR)
    trainer = make_trainer(
        model=model, peft_config=lora(), max_steps=8, per_device_train_batch_size=8
    )
    trainer.train()
    assert trainer.layout == "prefix_shared"
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0
    assert losses_of(trainer)[-1] < 0.3
    core = causal_lm(trainer.model)
    assert core.get_output_embeddings().weight.dtype == torch.bfloat16
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_without_adapters(quantized, make_trainer):
    with pytest.raises(ValueError, match=r"expected adapters on a quantised model \(bitsandbytes"):
        make_trainer(model=quantized(**FOUR))


def test_another_quantisation_is_another_run(quantized, make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "peft_config": lora()}
    make_trainer(model=quantized(**FOUR), **options).train()
    other = quantized(**FOUR, use_bnb_nested_quant=True)
    with pytest.raises(ValueError, match=r"quantization '.* nf4, comp.*then, '.*nf4, nested.* now"):
        make_trainer(model=other, max_steps=2, **options).train(resume_from_checkpoint=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"quantization 'bitsandbytes 4-bit.* then, None now"):
        make_trainer(model=plain, max_steps=2, **options).train(resume_from_checkpoint=True)


def test_another_base_of_the_same_embeddings_is_another(quantized, tiny_model, tmp_path):
    first = quantized(**FOUR)
    changed = tiny_model()
    torch.nn.init.normal_(changed.model.layers[0].mlp.up_proj.weight)
    changed.save_pretrained(tmp_path / "other")
    config = QuantizationOptions(**FOUR).quantization_config(torch.float32)
    other = load_causal_lm(str(tmp_path / "other"), quantization_config=config)
    assert weights_fact(first) != weights_fact(other)
    assert weights_fact(first) == weights_fact(quantized(**FOUR))


@pytest.fixture
def adapter(quantized, tmp_path):
    """The folder of an adapter that was trained on the quantised base."""
    model = moved(quantized(**FOUR))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_an_adapter_is_trained_further_on_a_quantised_base(adapter, make_trainer, naive, pairs):
    config = QuantizationOptions(**FOUR).quantization_config(torch.float32)
    model = load_causal_lm(adapter, quantization_config=config)
    trainer = make_trainer(model=model, data=pairs(4), max_steps=4)
    trainer.train()
    first, *_, last = (row for row in trainer.state.log_history if "loss" in row)
    with torch.no_grad():
        start = load_causal_lm(adapter, quantization_config=config)
        chosen = naive(start).logps(pairs(4))[0].mean().item()
    assert first["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert first["rewards/margins"] == 0.0 and last["loss"] < first["loss"] - 0.05


def test_an_adapter_is_not_merged_into_codes(adapter):
    config = QuantizationOptions(**FOUR).quantization_config(torch.float32)
    found = find_adapter(adapter)
    with pytest.raises(ValueError, match=r"base .* is quantised \(bitsandbytes 4-bit nf4, comp"):
        load_merged(found, AutoModelForCausalLM, quantization_config=config)
    assert not is_quantized(load_merged(found, AutoModelForCausalLM))


@pytest.mark.parametrize("options", BITS)
def test_a_checkpoint_that_is_quantised_already(
    options, quantized, make_trainer, losses_of, tmp_path
):
    model = quantized(**options)
    fact = weights_fact(model)
    model.save_pretrained(tmp_path / "stored")
    stored = load_causal_lm(str(tmp_path / "stored"))
    words = stored_quantization(str(tmp_path / "stored"))
    assert words == quantization_of(stored) == quantization_of(model)
    assert stored_quantization(str(tmp_path / "base")) is None
    assert weights_fact(stored).split()[1] == fact.split()[1]
    trainer = make_trainer(
        model=str(tmp_path / "stored"), peft_config=lora(), max_steps=4,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.05
    with pytest.raises(ValueError, match="expected adapters on a quantised model"):
        make_trainer(model=str(tmp_path / "stored"))


def test_sharding_is_refused(quantized):
    plugin = SimpleNamespace(fsdp_version=2)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        is_deepspeed_enabled=False, is_fsdp_enabled=True, args=None, model=quantized(**FOUR),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"FSDP: .* got a quantised one \(bitsandbytes 4-bit"):
        check_parallelism(trainer)


def test_words_for_configurations():
    assert describe({"quant_method": "gptq", "bits": 4}) == "gptq 4-bit"
    assert describe({"quant_method": "fp8"}) == "fp8"
    nested = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )  # fmt: skip
    expected = "bitsandbytes 4-bit nf4, nested, computed in bfloat16"
    assert describe(nested) == describe(nested.to_dict()) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param({"unk_token": "<unk>", "bos_token": "<s>"}, "<unk>", id="unknown"),
        pytest.param({"unk_token": "</s>", "bos_token": "<s>"}, "<s>", id="beginning"),
        pytest.param({"unk_token": None, "bos_token": None}, None, id="none"),
    ],
)
def test_padding_of_a_reward_model_under_lora(tokens, expected, tiny_model):
    """A row more would make the embedding another than that of the base."""
    ids = {"<unk>": 3, "<s>": 1, "</s>": 2}

    class Tokenizer(SimpleNamespace):
        pad_token_id = property(lambda self: ids.get(self.pad_token))
        eos_token_id = property(lambda self: ids[self.eos_token])

    tokenizer = Tokenizer(pad_token="</s>", eos_token="</s>", **tokens)
    model = tiny_model()
    if expected is None:
        with pytest.raises(ValueError, match=r"for padding that ends nothing, got '</s>'; under"):
            give_padding(model, tokenizer, resize=False)
        return
    give_padding(model, tokenizer, resize=False)
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == ids[expected]
    assert model.get_input_embeddings().weight.shape[0] == 61
