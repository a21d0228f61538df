"""The trainer's callback: measures the policy every so often and keeps what it finds."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fastdaa.online.generation import end_tokens
from fastdaa.study.track.answers import Subject, answer, share_of_rank
from fastdaa.study.track.decline import Decline
from fastdaa.study.track.journal import TABLE, Journal
from fastdaa.study.track.prompts import held_out_prompts, longest_prompt
from fastdaa.study.track.record import RunRecord
from fastdaa.study.track.reference import tracked_reference
from fastdaa.study.track.scoring import Sample, Scorer, ScorerError
from fastdaa.study.track.settings import TrackSettings
from fastdaa.study.track.summary import logged
from fastdaa.train.interrupt import was_interrupted
from fastdaa.validation import check_positive

if TYPE_CHECKING:
    from fastdaa.train.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)


class _Outcome(NamedTuple):
    """What the main process found, for all of them."""

    row: dict[str, Any] | None = None
    stop: Decline | None = None
    error: str | None = None


class TrackQuality(TrainerCallback):
    """Samples the policy on held-out prompts, estimates KL and quality, and appends to a table.

    It measures before the first step, then at every checkpoint or every ``steps`` steps, and after
    the last step; not on the way out of an interrupted run. Training is the same to the bit as
    without it. With several processes each answers a share of the prompts; the main one scores.

    A scorer that fails at the first measurement of a run stops it, as nothing is lost yet. Later
    that is a warning, and the row has no score.

    Args:
        trainer: before its training; add the callback with ``trainer.add_callback``.
        pairs: held-out pairs, a ``datasets.Dataset``; their chosen answers are what a judge
            compares with.
        scorers: the mean of the first is the table's ``score``; none to measure KL only. Only
            those of the main process are asked.
        settings: how the policy is sampled.
        steps: steps between two measurements; None for every checkpoint.
        stop_after: stop training after so many measurements in a row that have declined (see
            :mod:`fastdaa.study.track.decline`), with a checkpoint; None to warn only.
        run: name of the run in the table; by default ``run_name`` or the output folder's.
        ref_model: see :func:`~fastdaa.study.track.reference.tracked_reference`.

    Raises:
        ValueError: a number out of range, no prompt that fits, or no reference model.

    Attributes:
        stopped: the decline that ended the last training, or None.
    """

    def __init__(
        self,
        trainer: PreferenceTrainer,
        pairs: Any,
        *,
        scorers: Sequence[Scorer] = (),
        settings: TrackSettings | None = None,
        steps: int | None = None,
        stop_after: int | None = None,
        run: str | None = None,
        ref_model: Any = None,
    ):
        check_positive("steps", steps)
        check_positive("stop_after", stop_after)
        self.settings = TrackSettings() if settings is None else settings
        self.stopped: Decline | None = None
        self._trainer, self._steps = trainer, steps
        folder = Path(str(trainer.args.output_dir))
        name = run or trainer.args.run_name or folder.resolve().name
        self._record = RunRecord(
            Journal(folder / TABLE), name, scorers, self.settings, stop_after,
            # Clears the bar, prints above it, draws it again.
            tell=functools.partial(tqdm.write, file=sys.stdout),
        )  # fmt: skip
        self._prompts = held_out_prompts(
            pairs, trainer.processing_class, self.settings,
            longest=longest_prompt(trainer.model, self.settings, trainer.args.max_length),
            end_ids=end_tokens(trainer.model),
        )  # fmt: skip
        self._reference = tracked_reference(trainer, ref_model)
        self._last: int | None = None
        self._began = 0.0

    @property
    def table(self) -> Path:
        """Where the rows are."""
        return self._record.journal.table

    @property
    def best(self) -> int | None:
        """The step with the highest score so far; known on the main process."""
        return self._record.best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped, self._last = None, None
        self._began = time.monotonic()
        step = state.global_step
        if state.is_world_process_zero:
            rows = self._record.resume(step) if step else self._record.begin()
            if rows:
                self._last = rows[-1]["checkpoint"]
                self._began -= rows[-1].get("seconds") or 0.0
        self._last = broadcast_object_list([self._last])[0]
        # A run that was interrupted at a due step has not been measured there. That it was
        # interrupted makes none due: the rows are those of a run that nothing stops.
        due = _saves(args, state) if self._steps is None else step % self._steps == 0
        if step == 0 or due:
            self._measure(state, control, strict=step == 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = self._steps is not None and state.global_step % self._steps == 0
        # Where a checkpoint follows, it is written first: then nothing that happens here loses it.
        if (due or _ends(state, control)) and not control.should_save:
            self._measure(state, control)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = self._steps is None or state.global_step % self._steps == 0
        if due or _ends(state, control):
            self._measure(state, control, saved=True)
        return control

    def _measure(
        self,
        state: TrainerState,
        control: TrainerControl,
        *,
        strict: bool = False,
        saved: bool = False,
    ) -> None:
        """Measure once a step; ``saved``: the checkpoint of the step is written already."""
        if self._last == state.global_step or was_interrupted(self._trainer):
            return
        began = time.perf_counter()
        self._last = state.global_step
        samples = self._answer()
        # Only the main process has scorers and files; the others wait for what it finds.
        outcome = _Outcome()
        if state.is_world_process_zero:
            outcome = self._write(samples, state, strict)
        outcome = broadcast_object_list([outcome])[0]
        if outcome.error is not None:
            raise ScorerError(outcome.error)
        assert outcome.row is not None
        self._log(outcome.row, control)
        # What the trainer says of its speed is about training.
        self._trainer.leave_out(time.perf_counter() - began)
        if outcome.stop is not None:
            self.stopped = outcome.stop
            control.should_training_stop = True
            control.should_save = control.should_save or not saved

    def _answer(self) -> list[Sample]:
        """All samples, by prompt, on every process."""
        trainer, args = self._trainer, self._trainer.args
        subject = Subject(
            trainer.model, self._reference, trainer.processing_class,
            precision=trainer.compute_loss_context_manager, max_bytes=args.head_max_bytes,
            synced=trainer.is_fsdp_enabled and args.world_size > 1,
        )  # fmt: skip
        rank, ranks = args.process_index, args.world_size
        batches = self._prompts.batches(self.settings.batch_size)
        mine = share_of_rank(len(batches), rank, ranks, equally_many=False)
        hidden = True if args.disable_tqdm or not trainer.is_world_process_zero() else None
        total = sum(len(batches[batch]) for batch, _ in mine)
        with tqdm(total=total, desc="tracking", leave=False, disable=hidden) as bar:
            samples = answer(
                subject, self._prompts, self.settings, rank=rank, ranks=ranks, advance=bar.update
            )
        return sorted(gather_object(samples), key=lambda sample: sample.prompt.number)

    def _write(self, samples: list[Sample], state: TrainerState, strict: bool) -> _Outcome:
        args, step = self._trainer.args, state.global_step
        more = {
            "loss": "+".join(args.loss_type),
            "beta": self._trainer.objective.beta,
            "seed": args.seed,
            "lr": args.learning_rate,
            "fraction": step / state.max_steps,
            "final": step >= state.max_steps,
            "seconds": time.monotonic() - self._began,
        }
        try:
            row, found, stop = self._record.add(samples, step, more, strict=strict)
        except ScorerError as error:
            return _Outcome(error=str(error))
        if stop:
            logger.warning("track: stopping after step %d, with a checkpoint", step)
        return _Outcome(row, found if stop else None)

    def _log(self, row: dict[str, Any], control: TrainerControl) -> None:
        # Logging tells the trainer that this step has been logged, which its own row has not been.
        should_log = control.should_log
        self._trainer.log(logged(row))
        control.should_log = should_log


def _saves(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a run that nothing stops has a checkpoint of this step."""
    if args.save_strategy == SaveStrategy.STEPS:
        return state.global_step % state.save_steps == 0 or state.global_step >= state.max_steps
    if args.save_strategy == SaveStrategy.EPOCH:
        return float(state.epoch or 0.0).is_integer()
    return args.save_strategy != SaveStrategy.NO


def _ends(state: TrainerState, control: TrainerControl) -> bool:
    return state.global_step >= state.max_steps or control.should_training_stop
