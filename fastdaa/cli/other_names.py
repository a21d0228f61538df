"""Options under the names that other programs have for them, and what to give in their place.

Names of TRL 1.16, older releases of transformers, the alignment handbook, LLaMA-Factory, Axolotl.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

SAME = {
    "model_name_or_path": "model",
    "ref_model_name_or_path": "ref_model",
    "torch_dtype": "dtype",
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_split",
    "test_split_size": "test_size",
    "dataset_text_field": "text_column",
    "assistant_only_loss": "every_answer",
    "preprocessing_num_workers": "dataset_num_proc",
    "max_seq_length": "max_length",
    "chat_template_path": "chat_template",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "push_to_hub_model_id": "hub_model_id",
    "no_cuda": "use_cpu",
}
"""What TRL and transformers call an option of ours: it is read as that."""

RELEASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Names of one release of transformers in another one, which may have them alone."""

SIMILAR = {
    "base_model": "model",
    "model_ref": "ref_model",
    "model_dtype": "dtype",
    "split": "dataset_split",
    "dataset_processes": "dataset_num_proc",
    **dict.fromkeys(("val_size", "val_set_size"), "test_size"),
    **dict.fromkeys(("cutoff_len", "sequence_len"), "max_length"),
    **dict.fromkeys(("pref_beta", "rl_beta"), "beta"),
    "pref_loss": "loss_type",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "optimizer": "optim",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "max_samples": "max_train_samples",
}
"""Options that may mean something else there, or have other values: they are named in the error."""


class Foreign(NamedTuple):
    """An option that there is none of here."""

    instead: str
    """What to do; ``--`` stands before names of our options."""
    idle: tuple[str, ...] = ()
    """Values that ask for what is so anyway, in lower case: the option is passed over."""


_OFF = ("false", "none")
_DROP_IN = "none here; fastdaa.drop_in.trl has it"
_SAMPLES = "--track_steps samples while training, docs/tracking.md"
_TOKENIZER = "save the tokenizer that has it, with the model"
_PROMPTS = "leave it out: --max_length bounds prompt and completion together"
_LAUNCHER = "for `accelerate launch`, which starts -m fastdaa.cli"

FOREIGN = {
    "dataset_streaming": Foreign("none here: data are read into memory", _OFF),
    "streaming": Foreign("none here: data are read into memory", _OFF),
    "ignore_bias_buffers": Foreign("--ddp_broadcast_buffers false", _OFF),
    "lora_target_parameters": Foreign("in Python, give peft_config a LoraConfig", ("none",)),
    "lora_task_type": Foreign("leave it out", ("causal_lm", "seq_cls")),
    "bnb_4bit_quant_storage": Foreign("in Python, load the model yourself", ("none", "uint8")),
    "bnb_4bit_compute_dtype": Foreign("--dtype, in which 4-bit weights are computed, too"),
    "model_init_kwargs": Foreign(
        "--dtype, --attn_implementation, --model_revision, --trust_remote_code", ("none",)
    ),
    # Packs have no padding; TRL 1.16 goes on with padding, too.
    "padding_free": Foreign("leave it out: --layout", ("false", "true")),
    "pad_to_multiple_of": Foreign("leave it out: packs have no padding", ("auto", "none")),
    "f_divergence_type": Foreign(
        '--loss f_dpo --loss_kwargs \'{"f_divergence_type": "js_divergence"}\'', ("reverse_kl",)
    ),
    "f_alpha_divergence_coef": Foreign("name it in --loss_kwargs, with --loss f_dpo", ("0.5",)),
    "discopop_tau": Foreign("--loss_kwargs '{\"discopop_tau\": 0.05}'", ("0.05",)),
    "desirable_weight": Foreign("--loss_kwargs '{\"desirable_weight\": 1.5}'", ("1", "1.0")),
    "undesirable_weight": Foreign("--loss_kwargs '{\"undesirable_weight\": 1.5}'", ("1", "1.0")),
    "simpo_gamma": Foreign("--loss simpo --loss_kwargs '{\"gamma\": 0.5}'"),
    "cpo_alpha": Foreign("--loss simpo sft --loss_weights 1 ALPHA"),
    "rpo_alpha": Foreign("--loss dpo sft --loss_weights 1 ALPHA", ("none",)),
    "reference_free": Foreign("--loss simpo, orpo and cpo need no reference", _OFF),
    "force_use_ref_model": Foreign("leave it out: --ref_model is used where given", _OFF),
    "generate_during_eval": Foreign(_SAMPLES, _OFF),
    "activation_offloading": Foreign("--activation_checkpointing and --tokens_per_pack", _OFF),
    "sync_ref_model": Foreign(_DROP_IN, _OFF),
    "ref_model_mixup_alpha": Foreign(_DROP_IN, ("0.6",)),
    "ref_model_sync_steps": Foreign(_DROP_IN, ("512",)),
    "use_liger_loss": Foreign("leave it out: the loss is fused anyway", _OFF),
    "max_prompt_length": Foreign(_PROMPTS, ("none",)),
    "max_completion_length": Foreign(_PROMPTS, ("none",)),
    "max_target_length": Foreign(_PROMPTS, ("none",)),
    "label_pad_token_id": Foreign("leave it out", ("-100",)),
    **dict.fromkeys(
        ("pad_token", "eos_token", "tokenizer_name", "tokenizer_name_or_path"),
        Foreign(_TOKENIZER, ("none",)),
    ),
    # Of fine-tuning.
    "loss_type": Foreign(
        "leave it out for the mean over tokens; fastdaa.drop_in.trl has dft", ("nll", "chunked_nll")
    ),
    "dataset_kwargs": Foreign("leave it out", ("none", "{}")),
    "dataset_batch_size": Foreign("leave it out"),
    "shuffle_dataset": Foreign("--train_sampling_strategy", ("false", "true")),
    "packing": Foreign(
        "leave it out: examples are packed anyway, without seeing each other; "
        "--per_device_train_batch_size counts examples",
        _OFF,
    ),
    "packing_strategy": Foreign("leave it out", ("bfd", "bfd_split", "wrapped", "ffd")),
    "eval_packing": Foreign("leave it out: examples are packed anyway", _OFF),
    "completion_only_loss": Foreign("none here: prompts are not learnt", ("true", "none")),
    # TRL would learn all tokens without it.
    "assistant_only_loss": Foreign("--every_answer", _OFF),
    # Of older releases of transformers.
    "overwrite_output_dir": Foreign(
        "choose another --output_dir, or delete that one; --resume_from_checkpoint goes on", _OFF
    ),
    "warmup_ratio": Foreign("--warmup_steps, which below 1 is a share of all steps"),
    "logging_dir": Foreign("set TENSORBOARD_LOGGING_DIR in the shell", ("none",)),
    "group_by_length": Foreign("--train_sampling_strategy group_by_length", _OFF),
    "save_safetensors": Foreign("leave it out: safetensors are what is saved", ("true", "none")),
    "include_inputs_for_metrics": Foreign("leave it out", _OFF),
    "include_tokens_per_second": Foreign("leave it out: metrics have it", ("false", "true")),
    "half_precision_backend": Foreign("leave it out", ("auto", "none")),
    # Of the alignment handbook.
    "use_flash_attention_2": Foreign(
        "--attention, or --layout padded --attn_implementation flash_attention_2", _OFF
    ),
    "dataset_splits": Foreign("--dataset_split and --eval_split"),
    "dataset_configs": Foreign("--dataset_config"),
    "auto_insert_empty_system_msg": Foreign("write the system messages into the data", _OFF),
    "env": Foreign("set variables in the shell"),
    "num_processes": Foreign(_LAUNCHER),
    "accelerate_config": Foreign(_LAUNCHER),
    # Of LLaMA-Factory and Axolotl.
    **dict.fromkeys(("stage", "rl"), Foreign("`fastdaa train`, `sft` and `reward` are the stages")),
    **dict.fromkeys(
        ("finetuning_type", "adapter"), Foreign("--use_peft for LoRA, else leave it out")
    ),
    "template": Foreign("leave it out for the tokenizer's own, or --chat_template FILE"),
    **dict.fromkeys(
        ("plot_loss", "overwrite_cache"), Foreign("leave it out", ("true", "false", "none"))
    ),
    "sample_packing": Foreign("leave it out: sequences are packed anyway", ("true", "false")),
    "flash_attention": Foreign("--attention", _OFF),
    "lora_target_linear": Foreign("leave it out: all linear layers are the default", ("true",)),
}
"""Options that nothing here does in the same way."""

_MIXTURES = ("datasets", "dataset_mixture", "dataset_mixer")


def own_names(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """A command line with our names, without options of others that ask for nothing.

    Args:
        argv: behind the command.
        known: the spellings of options that the command has, perhaps with their actions.

    Raises:
        ValueError: an option under both names.
    """
    words: list[str] = []
    in_file = any(_plain(word) == "__config" for word in argv)
    place = 0
    while place < len(argv):
        behind = place + 1
        while behind < len(argv) and not argv[behind].startswith("--"):
            behind += 1
        given, values = argv[place], list(argv[place + 1 : behind])
        place = behind
        option, equals, value = given.partition("=")
        if option.startswith("--") and option not in known:
            asked = value if equals else " ".join(values) or "true"
            ours = f"--{own_name(option[2:], asked, known)}"
            # One that is ours under another name may take back what a file says.
            if is_idle(option[2:], asked, " ".join(argv)) and (ours == option or not in_file):
                continue
            if ours != option and any(_plain(word) == _plain(ours) for word in argv):
                raise ValueError(f"expected one of {ours} and {option}, which mean the same")
            given = f"{ours}{equals}{value}"
        words += [given, *values]
    return words


def _plain(word: str) -> str:
    return word.partition("=")[0].replace("-", "_")


def own_name(name: str, value: Any, known: Collection[str]) -> str:
    """Our name of an option; the given one where it is ours, or none of ours.

    Args:
        name: without dashes before it.
        value: what it is given, as text or as a file holds it.
        known: the spellings of options that the command has.
    """
    plain = name.replace("-", "_")
    ours = {**SAME, **RELEASES}.get(plain, name)
    if f"--{name}" in known or f"--{ours}" not in known:
        return name
    if plain == "warmup_ratio":
        steps = known["--warmup_steps"] if isinstance(known, Mapping) else None
        return ours if _is_share(value) and getattr(steps, "type", None) is not int else name
    return ours


def is_idle(name: str, value: Any, beside: str = "") -> bool:
    """Whether an option of others asks for nothing beside what is done anyway.

    Args:
        name, value: as of :func:`own_name`.
        beside: the other options, as text.
    """
    plain = name.replace("-", "_")
    if plain == "f_divergence_type" and "f_dpo" in beside:
        return False  # whose default is another one
    if plain == "dataset_text_field":
        # TRL's default, also for data without such a column; here it is recognised.
        return bool(value == "text")
    foreign = FOREIGN.get(plain)
    return foreign is not None and str(value).lower() in foreign.idle


def what_instead(name: str, value: Any = None) -> str | None:
    """What to give instead of an option of others, or None where nothing is known of it.

    Args:
        name: with underscores.
        value: of a file.
    """
    if name in _MIXTURES:
        return _mixture(value)
    foreign = FOREIGN.get(name)
    return None if foreign is None else foreign.instead


def _is_share(value: Any) -> bool:
    """Whether a warm-up means the same as a ratio and as a number of steps."""
    try:
        return 0 <= float(value) < 1
    except (TypeError, ValueError):
        return False


def _mixture(value: Any) -> str:
    """The datasets that a mixture of others names, as ours does; evaluation data among them."""
    if isinstance(value, Mapping) and isinstance(value.get("datasets"), list):
        value = value["datasets"]
    elif isinstance(value, Mapping):
        value = [{"path": path, "weight": share} for path, share in value.items()]
    read = [entry for entry in value or () if isinstance(entry, Mapping)]
    entries = read if isinstance(value, list) and len(read) == len(value) else []
    sources = [_source(entry) for entry in entries]
    if not sources or None in sources:
        return "--dataset, with --dataset_weights and --eval_dataset, docs/data.md"
    weights = [entry.get("weight") for entry in entries]
    shown = f"dataset: [{', '.join(map(str, sources))}]"
    if any(weight not in (None, 1) for weight in weights):
        shown += f", dataset_weights: [{', '.join(str(weight or 1) for weight in weights)}]"
    return f"{shown}; splits to evaluate on are --eval_dataset's"


def _source(entry: Mapping[str, Any]) -> str | None:
    path = entry.get("path", entry.get("id"))
    name, split = entry.get("name", entry.get("config")), entry.get("split")
    if not isinstance(path, str):
        return None
    if name is None:
        return path if split is None else f"{path}::{split}"
    return f"{path}:{name}" if split is None else f"{path}:{name}:{split}"
