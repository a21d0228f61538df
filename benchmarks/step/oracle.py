"""The first losses of a case by plain means: one sequence at a time, whole rows of logits.

No trainer, no padding, no fused head. Where contenders are fp32 (CPU), matrix products, attention,
log-softmax, loss and AdamW are fp64 here; transformers' norms and rotary tables stay fp32. Where
contenders are bf16 (CUDA), everything is fp32 here: attention in fp64 would need its square of
scores in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastdaa.benchmarks.step.model import build, lora_config
from fastdaa.benchmarks.step.pairs import FIELDS, ORDERS
from fastdaa.benchmarks.step.plan import BETA, MAX_GRAD_NORM, Plan

STEPS = 2
"""The second one has seen the first one's gradients through the optimizer."""


class Expected(NamedTuple):
    """Loss and gradient norm (before clipping) of the first steps."""

    losses: list[float]
    grad_norms: list[float]


def expected(plan: Plan, orders: Sequence[str] = ORDERS) -> dict[str, Expected]:
    """What every right contender has to report, for pairs in each of the ``orders``."""
    import torch
    from datasets import load_from_disk

    torch.set_num_threads(plan.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {name: _train(plan, load_from_disk(f"{plan.folder}/{name}")) for name in orders}


def _train(plan: Plan, dataset: Any) -> Expected:
    import torch

    policy = _policy(plan)
    reference = build(plan.case.model, plan.device, plan.seed, plan.case.workload.max_length)
    reference = reference.to(_dtype(plan)).eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=0.0)
    result = Expected([], [])
    batch = plan.case.batch
    for step in range(min(STEPS, plan.all_steps)):
        rows = dataset[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        loss = 0.0
        for prompt, *sides in zip(*(rows[field] for field in FIELDS), strict=True):
            with torch.no_grad():
                ref = [_logp(reference, prompt, side) for side in sides]
            own = [_logp(policy, prompt, side) for side in sides]
            pair = _loss(plan.loss, own, ref, sides) / batch
            pair.backward()
            loss += float(pair.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        result.losses.append(loss)
        result.grad_norms.append(float(norm))
    return result


def _policy(plan: Plan) -> Any:
    model = build(plan.case.model, plan.device, plan.seed, plan.case.workload.max_length)
    if plan.case.tuning == "lora":
        from peft import get_peft_model
        from transformers import set_seed

        set_seed(plan.seed)  # as in the contenders: adapters begin with random numbers
        model = get_peft_model(model, lora_config())
    return model.to(_dtype(plan)).train()


def _dtype(plan: Plan) -> Any:
    import torch

    return torch.float32 if plan.mixed else torch.float64


def _logp(model: Any, prompt: list[int], completion: list[int]) -> Any:
    """Sum of the log-probs of the completion's tokens, summed in fp64."""
    import torch

    tokens = torch.tensor([prompt + completion], device=model.device)
    kept = len(completion) + 1  # the last position predicts nothing
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    targets = tokens[0, len(prompt) :]
    return torch.log_softmax(logits.double(), -1).gather(1, targets[:, None]).sum()


def _loss(name: str, own: list[Any], ref: list[Any], sides: list[list[int]]) -> Any:
    """DPO (Rafailov et al. 2023, eq. 7), hinge (Zhao et al. 2023, on log-ratios) and IPO
    (Azar et al. 2024, eq. 17, on means over tokens) with h = log-ratio chosen - rejected."""
    import torch

    ratios = [a - b for a, b in zip(own, ref, strict=True)]
    if name == "ipo":
        ratios = [r / len(side) for r, side in zip(ratios, sides, strict=True)]
    h = ratios[0] - ratios[1]
    if name == "dpo":
        return torch.nn.functional.softplus(-BETA * h)
    if name == "slic":
        return torch.relu(1 - BETA * h)
    return (h - 1 / (2 * BETA)) ** 2
