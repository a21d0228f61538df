"""The loop: rollouts, scores, advantages, updates; with checkpoints, metrics and Ctrl-C."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdaa.online.checkpoint import (
    Place,
    load_weights,
    random_states,
    read_checkpoint,
    save_checkpoint,
    tidy,
)
from fastdaa.online.collapse import CollapseMonitor
from fastdaa.online.config import OnlineConfig
from fastdaa.online.controllers import AdaptiveKL, FixedKL, KLController
from fastdaa.online.critic import Critic
from fastdaa.online.experience import collect
from fastdaa.online.models import prepare_models
from fastdaa.online.pieces import is_cut, whole_state
from fastdaa.online.progress import Progress
from fastdaa.online.prompts import prompts_fact
from fastdaa.online.ranks import any_of, collect_objects, number
from fastdaa.online.record import Record
from fastdaa.online.rewards import RunningStd
from fastdaa.online.seeds import Purpose, prompts_of, seed_of
from fastdaa.online.types import Experience, RewardSource, RolloutSource
from fastdaa.online.update import Updater, minibatches
from fastdaa.train import checkpoints
from fastdaa.train.adapters import adapter_words
from fastdaa.train.backbone import causal_lm
from fastdaa.train.finite import all_finite
from fastdaa.train.folder_lock import lock_folder
from fastdaa.train.processes import meet
from fastdaa.train.run_record import remove_record

# What may not change while a run is interrupted, beside its settings, and what decides it.
_FACTS = {
    "reference": "the model (and ref_model)",
    "adapter": "the lora_ options",
    "prompts": "the data",
    "reward": "the reward",
    "gold_reward": "the gold_reward",
}

Evaluation = Callable[["OnlineTrainer"], Mapping[str, float] | None]
"""Called after every iteration, with the policy in evaluation mode; what it returns is logged."""


class OnlineResult(NamedTuple):
    """How a run ended."""

    iterations: int
    """That are finished."""
    steps: int
    """Optimiser steps."""
    interrupted: bool
    """By Ctrl-C or SIGTERM; a checkpoint is there."""
    collapsed: bool
    """What the monitor saw at last."""
    metrics: dict[str, float]
    """Of the last iteration."""


@dataclass
class _Underway:
    """An iteration between its rollouts and its end."""

    experience: Experience
    metrics: dict[str, float]
    """Of the rollouts."""
    sums: dict[str, Any] = field(default_factory=dict)
    """Of the minibatches so far."""
    tokens: int = 0
    seconds: float = 0.0


class OnlineTrainer:
    """APA, PPO or AWR on completions that the policy writes itself.

    Policy, reference and critic run on packed sequences, without padding, through the head's
    engine, without logits. Where a launcher has started several processes (and the process group
    is there), each with a device, they share the work, and every one of them has to make this
    object and call :meth:`train`; see :mod:`fastdaa.online.ranks`. Each is given all models, which
    it keeps whole or, with ``config.fsdp``, in pieces (:mod:`fastdaa.online.pieces`).

    Args:
        policy: a causal language model of transformers, on its device, or PEFT's wrapping of one.
        rollouts: generation.
        rewards: scores.
        prompts: all prompts, ``[n]`` int64 each.
        config: settings.
        reference: a frozen model; None for the policy as it is now: with a new LoRA adapter the
            policy without it, else a copy.
        critic: None for a new one, see :class:`~fastdaa.online.critic.Critic`.
        tokenizer: gives the reward source texts; None to give it token ids alone.
        evaluate: called after every iteration; where it has a method ``begin(trainer)``, that is
            called before the first one.

    Raises:
        ValueError: no prompts, or a model that cannot take packed rows or whose head is unknown.
    """

    def __init__(
        self,
        policy: nn.Module,
        rollouts: RolloutSource,
        rewards: RewardSource,
        prompts: Sequence[Tensor],
        config: OnlineConfig,
        *,
        reference: nn.Module | None = None,
        critic: Critic | None = None,
        tokenizer: Any = None,
        evaluate: Evaluation | None = None,
    ) -> None:
        if not len(prompts) or any(len(ids) == 0 for ids in prompts):
            raise ValueError("prompts: expected at least one, of at least one token each")
        self.config, self.sources, self.prompts = config, (rollouts, rewards), prompts
        self.tokenizer, self.evaluate = tokenizer, evaluate
        asked = [*prompts, *getattr(evaluate, "prompts", ())]
        self.models = prepare_models(policy, reference, critic, config, max(map(len, asked)))
        self._facts = {
            "reference": self.models.reference_fact,
            "adapter": adapter_words(policy),
            "prompts": prompts_fact(prompts),
            "reward": getattr(rewards, "fact", None),
            "gold_reward": getattr(getattr(evaluate, "gold", None), "fact", None),
        }
        self.updater = Updater(policy, self.models.critic, config)
        self.controller: KLController = FixedKL(config.kl_coef)
        if config.kl_controller == "adaptive":
            self.controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        self.running = RunningStd() if config.reward_scaling == "running_std" else None
        self.monitor = CollapseMonitor()
        self.place = Place(0, 0, 0, 0)
        self._underway: _Underway | None = None
        self._metrics: dict[str, float] = {}

    def train(self, resume: str | Path | bool = False) -> OnlineResult:
        """Runs all iterations that are left.

        Args:
            resume: a checkpoint, or True for the last complete one of ``output_dir`` (from the
                start if there is none).

        Raises:
            ValueError: a new run where there are checkpoints, or a checkpoint of other settings.
            FileNotFoundError: no complete checkpoint where one was named.
            FloatingPointError: losses, weights or probabilities that are not finite; checkpoints of
                before stay.
            KeyboardInterrupt: the second Ctrl-C; checkpoints of before stay.
        """
        config = self.config
        self._start(resume)
        begin = getattr(self.evaluate, "begin", None)
        if begin is not None and self.place.iteration < config.iterations:
            begin(self)
        device = causal_lm(self.models.policy).device
        record = Record(config, self.place.steps, device)
        shown = not config.disable_tqdm and number() == 0
        progress = Progress(config.iterations, self.place.iteration, shown=shown)
        try:
            while self.place.iteration < config.iterations and not record.interrupted:
                self._iterate(record, progress)
                if self.monitor.collapsed and config.stop_on_collapse:
                    progress.say("stopped, because stop_on_collapse is set")
                    break
        finally:
            progress.close()
            record.close()
        return OnlineResult(
            self.place.iteration, self.place.steps, record.interrupted, self.monitor.collapsed,
            dict(self._metrics),
        )  # fmt: skip

    def save_model(self, folder: str | Path) -> None:
        """The policy as ``save_pretrained`` writes it, and the tokenizer where there is one.

        All processes call it, and the first one writes.
        """
        policy: Any = self.models.policy
        state = whole_state(policy) if is_cut(policy) else None
        if number() != 0:
            return
        policy.save_pretrained(folder, state_dict=state)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _iterate(self, record: Record, progress: Progress) -> None:
        """One iteration, or what is left of it; after each minibatch it can be stopped."""
        config = self.config
        if self._underway is None:
            progress.phase("rollouts")
            self._underway = self._collect()
            for sentence in self.monitor.look(self._underway.metrics):
                progress.say(f"iteration {self.place.iteration + 1}: {sentence}")
        progress.phase("update")
        underway = self._underway
        experience = underway.experience
        plan = minibatches(config, self.place.iteration, len(experience.rollouts.prompt_ids))
        self.models.train()
        for batch in plan[self.place.minibatches :]:
            if record.asked(self.place.steps):
                self._check_weights()
                self._save()
                return
            began = time.perf_counter()
            for name, value in self.updater.step(experience, batch).items():
                underway.sums[name] = underway.sums.get(name, 0.0) + value
            underway.seconds += time.perf_counter() - began
            underway.tokens += int(experience.lengths[batch.sequences].sum())
            _, done, steps, _ = self.place
            self.place = self.place._replace(minibatches=done + 1, steps=steps + 1)
        self._finish(underway, len(plan), record, progress)

    def _collect(self) -> _Underway:
        config, iteration = self.config, self.place.iteration
        self.models.train(False)
        prompts = prompts_of(self.prompts, config.rollouts_per_iteration, iteration, config.seed)
        experience, metrics = collect(
            self.models, prompts, self.sources, config,
            seed=seed_of(config.seed, iteration, Purpose.ROLLOUTS),
            kl_coef=self.controller.coefficient, running=self.running, tokenizer=self.tokenizer,
        )  # fmt: skip
        return _Underway(experience, metrics)

    def _finish(self, underway: _Underway, steps: int, record: Record, progress: Progress) -> None:
        """The end of an iteration: metrics, controller, evaluation, checkpoint."""
        config, place = self.config, self.place
        metrics = underway.metrics
        metrics |= {name: float(value) / steps for name, value in underway.sums.items()}
        losses = metrics["loss/policy"], metrics["loss/value"]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"iteration {place.iteration + 1}: expected finite losses, got {losses[0]} of the "
                f"policy and {losses[1]} of the critic; a lower learning_rate may help"
            )
        self._check_weights()
        self.controller.update(metrics["objective/kl"], config.rollouts_per_iteration)
        sampled = place.rollouts + config.rollouts_per_iteration
        self.place = Place(place.iteration + 1, 0, place.steps, sampled)
        self._underway = None
        metrics |= {
            "iteration": self.place.iteration,
            "episode": sampled,
            "lr": self.updater.learning_rate(),
            "update_tokens_per_second": underway.tokens / max(underway.seconds, 1e-9),
            "time/update": underway.seconds,
            "monitor/collapsed": int(self.monitor.collapsed),
        }
        self._metrics = metrics
        self.models.train(False)
        if self.evaluate is not None:
            metrics |= self.evaluate(self) or {}
        self._report(record, progress)

    def _check_weights(self) -> None:
        finite = all_finite(self.models.policy) and all_finite(self.models.critic)
        if any_of(not finite, causal_lm(self.models.policy).device):
            raise FloatingPointError(
                f"iteration {self.place.iteration + 1}: expected finite weights after its updates, "
                "got some that are infinite or not a number; a lower learning_rate may help"
            )

    def _report(self, record: Record, progress: Progress) -> None:
        """A row and a checkpoint, where they are due."""
        config, iteration = self.config, self.place.iteration
        last = iteration == config.iterations
        if self.monitor.collapsed and config.stop_on_collapse:
            last = True
        if iteration % config.logging_steps == 0 or last:
            record.write(self.place.steps, self._metrics)
            progress.row(iteration, self._metrics)
        progress.advance()
        if iteration % config.save_steps == 0 or last or record.asked(self.place.steps):
            self._save()

    def _save(self) -> None:
        if self.config.output_dir is None:
            return
        self._write_checkpoint(collect_objects(random_states()))
        meet()  # or a launcher would end the process that writes with the first of the others

    def _write_checkpoint(self, random_of: list[dict[str, Any]]) -> None:
        underway = self._underway
        state: dict[str, Any] = {
            "updater": self.updater.state_dict(),
            "controller": self.controller.state_dict(),
            "running": None if self.running is None else self.running.state_dict(),
            "monitor": self.monitor.state_dict(),
            "metrics": self._metrics if underway is None else underway.metrics,
            "underway": None,
            **self._facts,
        }
        if underway is not None:
            sums = {name: float(value) for name, value in underway.sums.items()}
            state["underway"] = (sums, underway.tokens, underway.seconds)
        experience = None if underway is None else underway.experience
        save_checkpoint(self.config, self.place, self.models, state, experience, random_of)

    def _start(self, resume: str | Path | bool) -> None:
        """Loads what is to be resumed, if anything is."""
        output_dir = self.config.output_dir
        if output_dir is not None and number() == 0:
            self._lock = lock_folder(output_dir)
            tidy(output_dir)
        meet()
        found = [] if output_dir is None else checkpoints.complete(output_dir)
        last = found[-1][1] if found else None
        if resume is False:
            if last is not None and self.place.steps == 0:
                raise ValueError(
                    f"output_dir: expected a folder without checkpoints for a new run, got {last}; "
                    "resume it, or choose another folder"
                )
            if output_dir is not None and number() == 0:
                remove_record(output_dir)
            return
        folder: str | Path | None = resume if resume is not True else None
        if resume is True and output_dir is not None:
            folder = checkpoints.to_continue(output_dir)
        if folder is None:
            return
        lazily = is_cut(self.models.policy)
        self.place, state, experience = read_checkpoint(folder, self.config, lazily=lazily)
        for name, now in self._facts.items():
            then = state.get(name)
            if None not in (then, now) and then != now:
                raise ValueError(
                    f"resume: expected the {name} of {folder}, {then}, got another, {now}; give "
                    f"{_FACTS[name]} that the run began with, or choose another output_dir for a "
                    "new run"
                )
        load_weights(folder, self.models)
        self.updater.load_state_dict(state["updater"])
        self.controller.load_state_dict(state["controller"])
        if self.running is not None:
            self.running.load_state_dict(state["running"])
        self.monitor.load_state_dict(state["monitor"])
        self._metrics = state["metrics"]
        if experience is not None:
            self._underway = _Underway(experience, state["metrics"], *state["underway"])
