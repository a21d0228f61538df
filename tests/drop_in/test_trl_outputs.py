"""What a forward with the drop-in's head returns, and its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from head_products import HeadProducts

pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_outputs_of_the_head_are_those_of_the_logits(trl, new_model, temperature):
    from fastdaa.drop_in.trl.head import add_head

    model = new_model("Gemma2", final_logit_softcapping=3.0, head_dim=8).double()
    ids = torch.tensor([[5, 9, 3, 8], [1, 7, 7, 0]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]) == 1, -100)
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    add_head(model, temperature, outputs=EVERYTHING)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    scored = labels[:, 1:] != -100
    expected = logits.log_softmax(-1)
    chosen = expected.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs, chosen * scored)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(out.entropy, entropy * scored)
    torch.testing.assert_close(out.mean_logits, logits.mean(-1) * scored)
    torch.testing.assert_close(out.log_sum_sq_probs, (2 * expected).logsumexp(-1) * scored)
    assert torch.equal(out.is_top1, (logits.argmax(-1) == ids[:, 1:]) & scored)
    torch.testing.assert_close(out.loss, -chosen[scored].mean())
    assert out.label_mask.equal(scored)
    # As with TRL's, log-probs and entropy have gradients.
    assert out.log_probs.requires_grad and out.entropy.requires_grad
    assert not out.log_sum_sq_probs.requires_grad and not out.mean_logits.requires_grad


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "made-again"])
def test_gradient_of_the_entropy(trl, new_model, keep, trained):
    from fastdaa.drop_in.trl.head import add_head

    model = new_model("Gemma2", final_logit_softcapping=3.0, head_dim=8, tie_word_embeddings=False)
    model.double().lm_head.requires_grad_(trained)
    ids = torch.tensor([[5, 9, 3, 8, 6]])
    expected = model(input_ids=ids).logits[:, :-1].div(0.6).log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    logps = expected.gather(-1, ids[:, 1:, None])[..., 0]
    tokens = torch.tensor([0.5, 0.0, -1.0, 2.0], dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((logps.exp() * tokens - 0.3 * entropy).sum(), parameters)
    add_head(model, 0.6, outputs=("log_probs", "entropy"), keep=keep)
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    loss = (out.log_probs.exp() * tokens - 0.3 * out.entropy).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted)


def test_an_entropy_without_gradient_costs_nothing(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    model, ids = new_model(), torch.randint(4, 44, (1, 17))
    unit = 2 * 16 * model.lm_head.weight.numel()
    add_head(model, outputs=("log_probs", "entropy"), keep=True)
    units = []
    for coefficient in (None, 0.1):
        with HeadProducts(44) as products:
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
            loss = out.log_probs.sum()
            (loss if coefficient is None else loss - coefficient * out.entropy.sum()).backward()
        units.append(products.flop / unit)
    assert units == [3, 3 + 4]


def test_a_head_in_fp32_of_a_model_in_bf16(trl, new_model, monkeypatch):
    """As in TRL's: nothing of the head is rounded to bf16."""
    from trl.trainer.utils import add_fused_lm_head

    from fastdaa.drop_in.trl import head

    real, seen = head.head_logps_and_stats, []

    def recorded(rows, *args, **options):
        # On CPU products are in fp32 anyway, on GPU this decides.
        seen.append((rows.dtype, torch.is_autocast_enabled("cpu")))
        return real(rows, *args, **options)

    monkeypatch.setattr(head, "head_logps_and_stats", recorded)
    found, ids = [], torch.tensor([[5, 9, 3, 8, 6]])
    for add in (add_fused_lm_head, head.add_head):
        model = new_model().bfloat16()
        model.lm_head.float()
        add(model, 0.6, True, ("log_probs", "entropy"))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        out.log_probs.sum().backward()
        assert out.log_probs.dtype == model.lm_head.weight.grad.dtype == torch.float32
        found.append([out.log_probs, out.entropy, model.lm_head.weight.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert seen == [(torch.float32, False)]


def test_the_gradient_of_the_entropy_is_made_under_the_autocast_of_forward(
    trl, new_model, monkeypatch
):
    from fastdaa.drop_in.trl import entropy_gradient
    from fastdaa.drop_in.trl.head import add_head

    real, seen = entropy_gradient.token_entropy, []

    def recorded(*args, **options):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return real(*args, **options)

    monkeypatch.setattr(entropy_gradient, "token_entropy", recorded)
    model, ids = new_model(), torch.tensor([[5, 9, 3, 8, 6]])
    add_head(model, outputs=("entropy",))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        out.entropy.sum().backward()
    assert [on for on, _ in seen] == [True, False] and seen[0][1] == torch.bfloat16


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_the_load_balancing_loss_is_that_of_the_model(trl, new_model, family):
    from fastdaa.drop_in.trl.head import add_head

    experts = {"Mixtral": "num_local_experts", "Qwen3Moe": "num_experts"}[family]
    sizes = {experts: 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = new_model(family, **sizes, router_aux_loss_coef=0.5)
    ids, mask = torch.tensor([[5, 9, 3, 8], [6, 7, 0, 0]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    before = model(**inputs)
    before.loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_head(model)
    out = model(**inputs, fused_lm_head=True)
    out.loss.backward()
    torch.testing.assert_close([out.loss, out.aux_loss], [before.loss, before.aux_loss])
    made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(made, wanted)


def test_a_head_with_more_outputs_is_refused(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    with pytest.raises(ValueError, match="outputs: expected some of log_probs"):
        add_head(copy.deepcopy(new_model()), outputs=("log_probs", "logits"))


def test_nothing_scored_gives_a_gradient_of_zero(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    model = new_model()
    add_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.tensor([[5, 9, 3]])
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.loss == 0 and not model.lm_head.weight.grad.any()
