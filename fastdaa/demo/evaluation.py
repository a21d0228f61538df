"""What a policy's answers are worth: sampled answers, gold scores, and the distance to SFT."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdaa.demo.world import judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 72


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    ref_model: PreTrainedModel | None = None,
    ref_scores: list[float] | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """Samples one answer a prompt at temperature 1 and judges them.

    Args:
        prompts: messages of the user, questions of the demo's world.
        ref_model: where the distance is measured from; None for no ``kl``.
        ref_scores: gold scores of the SFT model's answers to the same prompts, for ``win_rate``.
        seed: of the sampling; the same prompts, weights and seed give the same answers.

    Returns:
        ``gold`` (mean, 0 to 1), its parts ``correct``, ``tone`` and ``brevity``, ``good`` (share
        of answers with the full score), ``length`` (mean tokens, the end included), ``finished``
        (share that ended by itself), ``scores`` and ``answers`` (one a prompt); ``kl`` to the
        reference in nats an answer; ``win_rate`` (0 to 1, ties count half).
    """
    ids, mask = _encode(tokenizer, prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    new = output[:, ids.shape[1] :]
    ended = new == tokenizer.eos_token_id
    # Up to and with the first end; everything where there is none.
    scored = ended.cumsum(1) - ended.long() == 0
    answers = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    verdicts = [judge(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    scores = [verdict.score for verdict in verdicts]
    mean = statistics.fmean
    result: dict[str, Any] = {
        "gold": mean(scores),
        "correct": mean(verdict.correct for verdict in verdicts),
        "tone": mean(verdict.tone for verdict in verdicts),
        "brevity": mean(verdict.brevity for verdict in verdicts),
        "good": mean(float(verdict.good) for verdict in verdicts),
        "length": scored.sum().item() / len(prompts),
        "finished": ended.any(1).float().mean().item(),
        "scores": scores,
        "answers": answers,
    }
    if ref_scores is not None:
        pairs = zip(scores, ref_scores, strict=True)
        result["win_rate"] = mean(0.5 + 0.5 * ((ours > ref) - (ours < ref)) for ours, ref in pairs)
    if ref_model is not None:
        result["kl"] = _kl(model, ref_model, output, mask, scored)
    return result


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask ``[S, L]`` of the messages, ready for an answer."""
    encoded: Any = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        padding=True, tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    return encoded["input_ids"], encoded["attention_mask"]


def _kl(
    model: PreTrainedModel, ref_model: PreTrainedModel, output: Tensor, mask: Tensor, scored: Tensor
) -> float:
    """Mean ``KL(policy || ref)`` of whole answers, in nats.

    The policy's own samples, and at each of their positions the exact divergence of the two next
    token distributions: the expectation is that of the summed log-ratio, with less variance.
    """
    prompt_length = mask.shape[1]
    mask = torch.cat([mask, scored.to(mask.dtype)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logps = [
        each(output, attention_mask=mask, position_ids=positions, use_cache=False)
        .logits[:, prompt_length - 1 : -1]
        .float()
        .log_softmax(-1)
        for each in (model, ref_model)
    ]
    divergence = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)
    return ((divergence * scored).sum() / len(output)).item()
