"""``fastdaa online``: reads options, builds what they name, and calls the loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.cli import building, paths
from fastdaa.cli.online_arguments import OnlineArguments, parse
from fastdaa.cli.option_names import named_as
from fastdaa.cli.runs import (
    INTERRUPTED,
    check_whole_models,
    command_run,
    print_continuation,
    staying_together,
)

if TYPE_CHECKING:
    from fastdaa.online.config import OnlineConfig
    from fastdaa.online.loop import OnlineTrainer
    from fastdaa.online.prompts import Prompts


class _Data(NamedTuple):
    train: Prompts
    held_out: Prompts | None

    def original(self, ids: Any) -> Any:
        """The prompt as it is in the data."""
        found = self.train.original(ids)
        return self.held_out.original(ids) if found is None and self.held_out else found


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    from fastdaa.train.processes import run_together

    return run_together(partial(_run, argv))


def _run(argv: Sequence[str]) -> int:
    from fastdaa.train.trainer_options import launched_processes

    arguments, config = parse(argv)
    config = _as_launched(config)
    several = launched_processes() > 1
    if several:
        _check_together(arguments)
    main = not several or _join(arguments)
    if arguments.pipeline:
        from fastdaa.cli.pipeline import run_pipeline

        with staying_together():
            return run_pipeline(arguments, config, argv, main_process=main)
    with command_run(main_process=main):
        return train_online(arguments, config, argv, main_process=main)


def train_online(
    arguments: OnlineArguments,
    config: OnlineConfig,
    argv: Sequence[str],
    *,
    main_process: bool = True,
) -> int:
    """One run of the loop, from its options to its saved policy, which the main process saves.

    Raises:
        OSError: the memory or the disk is full.
    """
    from fastdaa.train.full_disk import full_disk_named

    writing = full_disk_named(str(config.output_dir), "what the run writes")
    with writing, _loading_everywhere():
        return _train_online(arguments, config, argv, main_process)


def _train_online(
    arguments: OnlineArguments, config: OnlineConfig, argv: Sequence[str], main_process: bool
) -> int:
    import torch

    from fastdaa.online.ranks import part

    checkpoint = check_paths(arguments, config)
    trainer = build(arguments, config, checkpoint, main_process=main_process)
    try:
        result = trainer.train(resume=False if checkpoint is None else checkpoint)
    except KeyboardInterrupt:
        result = None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OSError(
            f"the memory of the device is full after iteration {trainer.place.iteration}: expected "
            f"a --generation_batch_size (now {arguments.generation_batch_size}) and --minibatch "
            f"(now {config.minibatch}) that fit, --tokens_per_pack, --activation_checkpointing, "
            f"--fsdp over several GPUs, or --use_peft; {error}"
        ) from error
    if result is None or result.interrupted:
        if main_process:
            where = f"iteration {trainer.place.iteration}, step {trainer.place.steps}"
            print_continuation("online", argv, str(config.output_dir), where)
        if result is not None:
            part()
        return INTERRUPTED
    trainer.save_model(str(config.output_dir))
    if main_process:
        _print_summary(result.metrics, str(config.output_dir))
    part()
    return 0


def _as_launched(config: OnlineConfig) -> OnlineConfig:
    """The configuration with what `accelerate launch` was asked for.

    Raises:
        ValueError: that is something that on-policy training does not have.
    """
    from accelerate.utils import parse_flag_from_env

    from fastdaa.online.pieces import check_processes
    from fastdaa.train.trainer_options import launched_processes

    check_whole_models("DEEPSPEED")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision: expected no or bf16 by `accelerate launch`, got {asked}"
        )
    config = replace(config, bf16=True) if asked == "bf16" else config
    if config.fsdp:
        check_processes(launched_processes())
    # For one process, accelerate does not look at it either.
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or launched_processes() == 1:
        return config
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version: expected 2 by `accelerate launch`, got {version}")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "fsdp_offload_params: expected false by `accelerate launch`, got true, which on-policy "
            "training does not have"
        )
    again = parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
    return replace(
        config, fsdp=True, activation_checkpointing=config.activation_checkpointing or again
    )


@contextmanager
def _loading_everywhere() -> Iterator[None]:
    """Every process loads the weights: transformers would have the first one alone load them, and
    leave it to FSDP to pass them on."""
    name, asked = "FSDP_CPU_RAM_EFFICIENT_LOADING", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    os.environ[name] = "false"
    try:
        yield
    finally:
        if asked is None:
            del os.environ[name]
        else:
            os.environ[name] = asked


def _check_together(arguments: OnlineArguments) -> None:
    """Raise ``ValueError`` for what several processes of a launcher cannot do."""
    if arguments.rollouts == "vllm":
        raise ValueError(
            "rollouts: expected transformers with several processes, got vllm, which is run in "
            "one process here"
        )


def _join(arguments: OnlineArguments) -> bool:
    """Meet the other processes; whether this is the first."""
    import torch
    from accelerate import PartialState

    from fastdaa.train.processes import be_quiet

    # Processes on CPUs meet only where this says so.
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    if not state.is_main_process:
        be_quiet()
    return bool(state.is_main_process)


def check_paths(arguments: OnlineArguments, config: OnlineConfig) -> str | None:
    """Checks every local path before anything slow, and finds the checkpoint to resume from."""
    for name in ("reward", "gold_reward"):
        given = getattr(arguments, name)
        if given is not None and ":" not in given:
            paths.check_model(name, given)
    folder = str(config.output_dir)
    return paths.check_paths(arguments, folder, arguments.resume_from_checkpoint)


def build(
    arguments: OnlineArguments,
    config: OnlineConfig,
    checkpoint: str | None = None,
    *,
    main_process: bool = True,
) -> OnlineTrainer:
    """Everything that a run needs, from the options that name it.

    Args:
        checkpoint: that the run continues from.
        main_process: this process writes files.
    """
    import torch
    from transformers import set_seed

    from fastdaa.online.held_out import HeldOut
    from fastdaa.online.loop import OnlineTrainer
    from fastdaa.online.prompts import chat_ending
    from fastdaa.online.reward_sources import load_reward
    from fastdaa.train.device_options import check_ways

    device = _device(arguments)
    check_ways(config, device)
    set_seed(config.seed)
    tokenizer = building.load_tokenizer(arguments)
    data = _load_prompts(arguments, config, tokenizer)
    ending = chat_ending(tokenizer) if data.train.conversational else None
    read_reward = partial(
        load_reward, tokenizer=tokenizer, original=data.original, ending=ending, device=device,
        dtype=getattr(torch, arguments.dtype, arguments.dtype),
    )  # fmt: skip
    assert arguments.reward is not None
    rewards = read_reward(arguments.reward)
    policy = building.load_policy(
        arguments, tokenizer, str(config.output_dir), checkpoint,
        main_process=main_process, device=device,
    )  # fmt: skip
    policy, reference = _on(device, policy), None
    if arguments.ref_model is not None:
        reference = building.load_model(
            arguments.ref_model, arguments, "ref_model", device=device,
            revision=building.model_revision(arguments, "ref_model"),
        )  # fmt: skip
        reference = _on(device, reference)
    peft_config = building.lora_config(arguments)
    if peft_config is not None:
        from peft import get_peft_model

        # The adapter starts as nothing, so without it the policy is the reference.
        policy = get_peft_model(policy, peft_config)
    rollouts = _rollouts(arguments, config, policy, tokenizer, ending)
    evaluate = None
    if data.held_out is not None:
        with named_as(reward="gold_reward"):
            gold = None if arguments.gold_reward is None else read_reward(arguments.gold_reward)
        asked = list(islice(cycle(data.held_out.ids), arguments.eval_rollouts))
        evaluate = HeldOut(asked, every=arguments.eval_steps, seed=config.seed, gold=gold)
    return OnlineTrainer(
        policy, rollouts, rewards, data.train.ids, config, reference=reference,
        tokenizer=tokenizer, evaluate=evaluate,
    )  # fmt: skip


def _device(arguments: OnlineArguments) -> Any:
    """Of this process."""
    import torch

    if arguments.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _on(device: Any, model: Any) -> Any:
    """A model on a device; a quantised one was loaded there."""
    from fastdaa.train.quantization import is_quantized

    return model if is_quantized(model) else model.to(device)


def _load_prompts(arguments: OnlineArguments, config: OnlineConfig, tokenizer: Any) -> _Data:
    from fastdaa.cli.load_data import load_splits
    from fastdaa.data.examples import PROMPTS
    from fastdaa.online.prompts import read_prompts

    parts = load_splits(arguments, PROMPTS, on_bad_row=arguments.on_bad_row, seed=config.seed)
    building.check_template(tokenizer, parts[0])
    read: dict[str, Any] = {
        "max_length": arguments.max_prompt_length, "on_bad_row": arguments.on_bad_row,
    }  # fmt: skip
    train = read_prompts(parts[0], tokenizer, "prompts", **read)
    if parts[1] is None:
        return _Data(train, None)
    return _Data(train, read_prompts(parts[1], tokenizer, "held-out prompts", **read))


def _rollouts(
    arguments: OnlineArguments, config: OnlineConfig, policy: Any, tokenizer: Any, ending: Any
) -> Any:
    from fastdaa.online.generation import Sampling, TransformersRollouts, end_tokens
    from fastdaa.train.backbone import causal_lm

    ends = {*end_tokens(policy, tokenizer)}
    if ending is not None and ending.end_id is not None:
        ends.add(ending.end_id)
    if not ends:
        raise ValueError("model: expected an EOS token that ends completions, got none")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    sampling = Sampling(tuple(sorted(ends)), pad, config.max_new_tokens, config.temperature)
    if arguments.rollouts == "vllm":
        from fastdaa.online.vllm_rollouts import VllmRollouts
        from fastdaa.train.quantization import quantization_of

        if quantization_of(policy) is not None:
            raise ValueError(
                "rollouts: expected transformers for a quantised policy "
                f"({quantization_of(policy)}), got vllm, which wants its adapter merged"
            )

        # Of an adapter, the base; the policy's weights follow.
        path = causal_lm(policy).name_or_path or arguments.model
        return VllmRollouts(path, sampling, memory=arguments.vllm_memory)
    return TransformersRollouts(sampling, batch_size=arguments.generation_batch_size)


_SHOWN = (
    ("objective/raw_scores", "reward of rollouts"),
    ("eval/scores", "reward on held-out prompts"),
    ("eval/ref_scores", "reward of the reference there"),
    ("eval/gold", "gold reward on held-out prompts"),
    ("eval/ref_gold", "gold reward of the reference there"),
    ("objective/kl", "KL of rollouts (nats a completion)"),
    ("eval/kl", "KL on held-out prompts (nats a completion)"),
    ("policy/token_entropy", "entropy (nats a token)"),
    ("completions/finished", "share of finished completions"),
    ("rollout_tokens_per_second", "rollout tokens per second"),
    ("update_tokens_per_second", "update tokens per second"),
)


def _print_summary(metrics: dict[str, float], folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastdaa.train.shown import shown_text

    table = Table("")
    table.add_column("last iteration", justify="right")
    for key, title in _SHOWN:
        if key in metrics:
            table.add_row(title, shown_text(key, metrics[key]))
    console = Console(markup=False)
    console.print(table)
    console.print(f"model and tokenizer: {folder}", highlight=False, soft_wrap=True)
