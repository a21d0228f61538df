"""TRL's trainers with the LM head of fastdaa in place of TRL's own."""

from __future__ import annotations

from typing import Any

from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer, sft_trainer

from fastdaa.drop_in.trl.on_head import OnHead
from fastdaa.drop_in.trl.refusals import refused


class DPOTrainer(OnHead, dpo_trainer.DPOTrainer):
    """``trl.DPOTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, data, losses, references, metrics and checkpoints: every loss of TRL works, with
    ``ld_alpha``, f-divergences, precomputed reference log-probs, a ``ref_model`` of its own,
    synchronised references, PEFT adapters and reference adapters.
    Further arguments, work, memory and errors: :class:`fastdaa.drop_in.trl.on_head.OnHead`.
    """

    trl_class = dpo_trainer.DPOTrainer
    precomputes_reference = True


class KTOTrainer(OnHead, kto_trainer.KTOTrainer):
    """``trl.KTOTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, data, losses, references, metrics and checkpoints. The completions of the KL
    baseline are scored without gradient, 1U of their own tokens for each model. Further arguments,
    work, memory and errors: :class:`fastdaa.drop_in.trl.on_head.OnHead`.
    """

    trl_class = kto_trainer.KTOTrainer
    precomputes_reference = True


class SFTTrainer(OnHead, sft_trainer.SFTTrainer):
    """``trl.SFTTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, data, packing, losses (``nll``, ``dft``), metrics and checkpoints. Refused are
    ``compute_loss_func`` and a ``label_smoothing_factor`` of ``nll``: TRL takes the loss from all
    logits of an ordinary forward then, and a fused head only for metrics. Further arguments, work,
    memory and errors: :class:`fastdaa.drop_in.trl.on_head.OnHead`.
    """

    trl_class = sft_trainer.SFTTrainer

    @classmethod
    def check_given(cls, given: dict[str, Any]) -> None:
        """Raise ``ValueError`` also for a loss that TRL takes from the logits."""
        super().check_given(given)
        args = given.get("args")
        if given.get("compute_loss_func") is not None:
            raise refused("SFTTrainer", "compute_loss_func", "None", "a function")
        smoothing = getattr(args, "label_smoothing_factor", 0)
        if smoothing > 0 and getattr(args, "loss_type", "nll") == "nll":
            raise refused("SFTTrainer", "label_smoothing_factor", "0", str(smoothing))


class GRPOTrainer(OnHead, grpo_trainer.GRPOTrainer):
    """``trl.GRPOTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, generation, rewards, losses, metrics and checkpoints; ``temperature`` and
    ``cast_lm_head_to_fp32`` are those of the log-probs, too. Generation has nothing to do with this
    head. With an entropy bonus (``entropy_coef``, ``use_adaptive_entropy``) the gradients of
    log-probs and entropies are made together, and the head takes 3U where it is frozen and 4U where
    it is trained, as TRL's. Further arguments, work, memory and errors:
    :class:`fastdaa.drop_in.trl.on_head.OnHead`.
    """

    trl_class = grpo_trainer.GRPOTrainer

    def has_entropy_bonus(self) -> bool:
        """As TRL's trainer decides it."""
        args: Any = self.args
        return bool(args.entropy_coef != 0.0 or args.use_adaptive_entropy)


class RLOOTrainer(OnHead, rloo_trainer.RLOOTrainer):
    """``trl.RLOOTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, generation, rewards, losses, metrics and checkpoints; ``temperature`` is that of
    the log-probs, too. Generation has nothing to do with this head. Further arguments, work, memory
    and errors: :class:`fastdaa.drop_in.trl.on_head.OnHead`.
    """

    trl_class = rloo_trainer.RLOOTrainer
