"""Which of the four ways through the head a call takes.

The unit of cost is ``U = 2 N V D`` FLOP, one matrix product of the head.

| path | cost | when |
|---|---|---|
| score | 1U | no gradient is wanted |
| frozen | 2U | the head is not trained: the unscaled gradient of the hidden states is made in the
forward pass, and the backward pass is a row scale |
| single pass | 3U to 4U | the loss is known inside a chunk of whole pairs
(:func:`fastdaa.pair_loss`), or bf16 gradients of logits, all or a part of them, fit: see
:mod:`fastdaa.single_pass_memory` |
| recompute | 4U | anything else: the backward pass computes the logits again, vocabulary-major; 3U
for log-probs and entropies of a head that is not trained, which would keep two gradients |
"""

from __future__ import annotations

PATHS = ("auto", "score", "frozen", "single_pass", "recompute", "reference")
GEMMS = {"score": 1, "frozen": 2, "single_pass": 3, "recompute": 4, "reference": 3}
"""Cost of forward and backward together in ``U``."""


def choose_path(
    impl: str, hidden_grad: bool, head_grad: bool, loss_inside: bool, bonus: bool = False
) -> tuple[str, str]:
    """The cheapest path that can serve, or the one that is asked for; and why, for people.

    ``bonus``: one gradient of log-probs and entropies is wanted.

    Raises:
        ValueError: the one that is asked for cannot serve.
    """
    path, reason = _cheapest(hidden_grad, head_grad, loss_inside)
    if bonus and path != "score":
        path, reason = "recompute", "log-probs and entropies have one gradient"
    if impl in ("auto", path):
        return path, reason
    if bonus and impl != "score":
        raise ValueError(f"impl={impl!r} cannot serve a gradient of log-probs and entropies: "
                         "expected 'auto' or 'recompute'")  # fmt: skip
    _check_explicit(impl, hidden_grad, head_grad, loss_inside)
    return impl, "asked for"


def _cheapest(hidden_grad: bool, head_grad: bool, loss_inside: bool) -> tuple[str, str]:
    if not (hidden_grad or head_grad):
        return "score", "no gradient is wanted"
    if not head_grad:
        return "frozen", "the head is not trained"
    if not loss_inside:
        return "recompute", "the head is trained and the loss lies outside this call"
    return "single_pass", "the head is trained"


def _check_explicit(impl: str, hidden_grad: bool, head_grad: bool, loss_inside: bool) -> None:
    if impl == "score" and (hidden_grad or head_grad):
        raise ValueError("impl='score' gives no gradient: detach the inputs or use torch.no_grad()")
    if impl == "frozen" and head_grad:
        raise ValueError("impl='frozen' gives the head no gradient: expected weight and bias "
                         "with requires_grad=False")  # fmt: skip
    if impl == "single_pass" and not loss_inside:
        raise ValueError("impl='single_pass' needs the loss: call fastdaa.pair_loss")
