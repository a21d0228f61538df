"""The configuration of preference training: ``TrainingArguments`` and what pairs need beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from fastdaa.losses.objective import Objective
from fastdaa.losses.registry import LOSSES, Loss
from fastdaa.train.options import HeadOptions, check_count, read_mapping
from fastdaa.train.packed_config import PackedConfig
from fastdaa.validation import shown


@dataclass
class PreferenceConfig(HeadOptions, PackedConfig):
    """Settings of :class:`fastdaa.train.PreferenceTrainer`.

    Every field of ``transformers.TrainingArguments`` is here under its own name. Batch sizes count
    pairs. Other defaults than there: ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``logging_nan_inf_filter`` False (a broken loss shows, and no step waits for the device),
    ``remove_unused_columns`` False, and ``bf16`` None, which means True on a CUDA device that has
    bf16, unless ``fp16`` is set or accelerate was launched with another mixed precision.

    Args:
        loss_type: names or aliases of losses, or from Python losses of
            :func:`fastdaa.custom_loss`; several make a mixture.
        loss_weights: one weight a loss; 1 each by default.
        beta: strength of the KL regularisation; by default the loss's own.
        label_smoothing: probability that a label is flipped; by default the loss's own.
        ld_alpha: LD-DPO: what tokens beyond the length of the shorter completion count, in [0, 1];
            None for 1.
        use_weighting: WPO: weigh every pair by how likely the policy would write it.
        loss_kwargs: any other hyperparameter of the chosen losses, by name; JSON text or a dict.
        max_length: longest sequence of prompt and completion, in tokens; None for no limit.
        truncation_mode: ``"keep_start"`` keeps the first tokens of a sequence and drops pairs whose
            prompt fills it; ``"keep_end"`` keeps the last tokens.
        on_bad_row: ``"error"`` stops at a row that cannot be used, ``"skip"`` counts such rows.
        dataset_num_proc: processes that tokenise; pays off for slow chat templates.
        layout: ``"prefix_shared"`` computes the prompt of a pair once, ``"packed"`` stores
            sequences without padding, ``"padded"`` is the classical batch; ``"auto"`` takes the
            first of them that the model can run.
        attention: which kernel attends over the segments of a packed row.
        tokens_per_pack: tokens of one forward; a batch is split into forwards of at most that many.
            None puts a whole per-device batch into one.
        impl: which way through the LM head is taken; ``"auto"`` plans it.
        head_engine: what works on tiles of logits, ``"torch"`` or ``"triton"``.
        head_max_bytes: memory that the head may take, see :func:`fastdaa.plan_head`; by default the
            device's.
        precompute_ref_log_probs: compute all reference log-probs before training, from the cache
            on disk where it has them; the reference model is then not kept.
        precompute_ref_batch_size: pairs of a batch while precomputing; by default the evaluation
            batch size.
        ref_cache_dir: where reference log-probs are kept; by default ``fastdaa/reference`` in the
            Hugging Face home, so that other runs find them.
        disable_dropout: set all dropout probabilities of policy and reference to 0.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts, 0 for none;
            by default that of the model's configuration, if it has ``output_router_logits``.
        log_exact_kl: log the exact per-token KL to the reference, on the last batch of every
            logging interval and on the evaluation set. Needs an online reference.
        log_token_stats: log entropy, top-1 accuracy and mean logits.

    Raises:
        ValueError: a value that cannot be used, a loss that does not exist, or a hyperparameter
            that no chosen loss has.
        TypeError: ``loss_kwargs`` is not a mapping.
    """

    objective_type: ClassVar[Any] = Objective
    """What ``loss_type`` names losses of; it is made by ``parse``."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    loss_type: list[str] = field(
        default_factory=lambda: ["dpo"],
        metadata={
            "help": f"One loss, or several as a mixture: {', '.join(LOSSES)} "
            "(docs/objectives.md, also for TRL's names).",
            "aliases": ["--loss"],
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per loss. Default: 1 each."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Strength of the KL penalty. Default: the loss's."}
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Probability that a label is flipped. Default: the loss's."},
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: what tokens beyond the shorter completion's length count, 0 to 1. "
            "Default: 1."
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={"help": "WPO: weigh pairs by their probability under the policy."},
    )
    # HfArgumentParser reads this union, in this order, as text.
    loss_kwargs: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Other hyperparameters of the losses, as JSON: '{\"delta\": 1.0}'."},
    )

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute reference log-probs before training, and keep them on disk for other "
            "runs."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Batch size while precomputing. Default: that of evaluation."},
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached log-probs. Default: in the Hugging Face home."},
    )
    log_exact_kl: bool = field(
        default=True, metadata={"help": "Log the exact per-token KL to the reference."}
    )
    log_token_stats: bool = field(
        default=True, metadata={"help": "Log entropy, top-1 accuracy and mean logits."}
    )

    def __post_init__(self) -> None:
        self._normalise_loss()
        self.check_head()
        check_count("precompute_ref_batch_size", self.precompute_ref_batch_size, optional=True)
        self._check_objective()
        super().__post_init__()

    def objective(self) -> Any:
        """The objective that the loss fields describe.

        Raises:
            ValueError: an unknown loss, a hyperparameter that no chosen loss has, or a value out
                of range.
        """
        hyperparameters = dict(cast("dict[str, Any]", self.loss_kwargs))
        for name in ("beta", "label_smoothing", "ld_alpha", "use_weighting"):
            value = getattr(self, name)
            if value is None or value is False:
                continue
            if name in hyperparameters:
                raise ValueError(
                    f"{name}: expected it once, got {name}={value} and "
                    f"{hyperparameters[name]!r} in loss_kwargs"
                )
            hyperparameters[name] = value
        losses, weights = self.loss_type, self.loss_weights
        return self.objective_type.parse(losses, weights=weights, **hyperparameters)

    def loss_names(self) -> list[str]:
        """``loss_type`` in words; a loss of the caller's has the name of its function."""
        return [getattr(loss, "name", loss) for loss in self.loss_type]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them, for trackers."""
        return {**super().to_dict(), "loss_type": self.loss_names()}

    def identity(self) -> dict[str, Any]:
        """The base class's settings, and the objective."""
        return {**super().identity(), "objective": str(self.objective())}

    def ref_cache_root(self) -> Path:
        """The folder of cached reference log-probs, ``ref_cache_dir`` or its default."""
        if self.ref_cache_dir is not None:
            return Path(self.ref_cache_dir).expanduser()
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "fastdaa" / "reference"

    def _normalise_loss(self) -> None:
        # Python callers and YAML files may give one name or one weight without a list.
        names: Any = self.loss_type
        weights: Any = self.loss_weights
        single = isinstance(names, str | Loss)
        self.loss_type = [names] if single else list(names)
        if weights is not None:
            weights = [weights] if isinstance(weights, int | float) else weights
            self.loss_weights = [float(weight) for weight in weights]
        self.loss_kwargs = _read_loss_kwargs(self.loss_kwargs)

    def _check_objective(self) -> None:
        objective = self.objective()
        if not objective.coupled:
            return
        if self.tokens_per_pack is not None:
            raise ValueError(
                f"tokens_per_pack: expected None for {objective}, which couples the pairs of a "
                f"batch, so that it cannot be split, got {self.tokens_per_pack}"
            )
        if self.impl == "single_pass":
            raise ValueError(
                f"impl: expected another path than 'single_pass' for {objective}, which couples "
                "the pairs of a batch"
            )


def _read_loss_kwargs(given: dict[str, Any] | str | None) -> dict[str, Any]:
    read = read_mapping("loss_kwargs", given, "hyperparameters", '{"delta": 1.0}')
    try:
        json.dumps(read)
    except TypeError as error:
        raise ValueError(
            f"loss_kwargs: expected values that JSON can hold, got {shown(read)} ({error})"
        ) from error
    return read
