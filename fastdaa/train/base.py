"""The Trainer around batches of packs: loaders, counting, checkpoints that continue to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sized
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastdaa.counted import counted
from fastdaa.data import PairRows
from fastdaa.train import checkpoints
from fastdaa.train.adapters import adapter_words, is_adapted, saving_own_adapters
from fastdaa.train.backbone import causal_lm
from fastdaa.train.best_model import best_model, say_best_model
from fastdaa.train.callbacks import restore_signals, was_interrupted
from fastdaa.train.evaluation_batches import every_row_once
from fastdaa.train.finite import check_weights
from fastdaa.train.folder_lock import FolderLock, lock_folder
from fastdaa.train.full_disk import full_disk_named
from fastdaa.train.missed_evaluation import make_up_last_evaluation
from fastdaa.train.packed_config import PackedConfig
from fastdaa.train.prepare import config_values, dropout_values
from fastdaa.train.quantization import check_adapted, quantization_of
from fastdaa.train.rounding import warn_of_rounding
from fastdaa.train.run_record import RunRecord, rows_fact, weights_fact, write_record
from fastdaa.train.steps_left import check_steps, say_plan, sharing_processes, steps_of
from fastdaa.train.whole_weights import whole_weights


class PairTrainer(Trainer):
    """Loading, counting and saving; what is computed is left to the subclass.

    ``args.disable_dropout`` keeps dropout probabilities that a model reads from its configuration
    at 0 while it is trained; what is saved holds the original ones.
    """

    unit: ClassVar[str] = "pairs"
    """What a row of the dataset is, in the plural, in lines and for the names of rates."""
    args: PackedConfig
    model: Any
    processing_class: Any

    def __init__(self, model: nn.Module, **options: Any):
        check_adapted(model, adapted=is_adapted(model))
        config = causal_lm(model).config
        use_cache = getattr(config, "use_cache", None)
        self._new_tokens = 0
        # Counted while all weights are whole.
        self._parameters = causal_lm(model).num_parameters(exclude_embeddings=True)
        self._record: RunRecord | None = None
        self._first_step: int | None = None
        self._lock: FolderLock | None = None
        super().__init__(model=model, **options)
        # The Trainer has set it for its own forwards; nothing here asks it, and it would be saved.
        if use_cache is not None:
            config.use_cache = use_cache
        self._dropout = dropout_values(config) if self.args.disable_dropout else {}
        # What no checkpoint holds, as it is before it is sharded.
        self.frozen_facts: dict[str, Any] = {}
        if is_adapted(model):
            self.frozen_facts["base model"] = weights_fact(model, trainable=False)
        quantization = quantization_of(model)
        if quantization is not None:
            self.frozen_facts["quantization"] = quantization

    def rows_of(self, dataset: Any, name: str) -> PairRows:
        """Any dataset of pairs as the loader wants it."""
        raise NotImplementedError

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of an evaluation set: one of the trainer's by name, or any set of pairs."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | PairRows):
            eval_dataset = self.rows_of(eval_dataset, "eval_dataset")
        with every_row_once(self):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The loader of any set of pairs."""
        if not isinstance(test_dataset, PairRows):
            test_dataset = self.rows_of(test_dataset, "test_dataset")
        with every_row_once(self):
            return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self._by_length(rows, size) or super()._get_train_sampler(rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        generator = torch.Generator().manual_seed(self.args.sampling_seed)
        by_length = self._by_length(eval_dataset, self.args.eval_batch_size, generator)
        return by_length or super()._get_eval_sampler(eval_dataset)

    def _by_length(
        self, rows: PairRows | None, size: int, generator: torch.Generator | None = None
    ) -> Sampler | None:
        """The Trainer's sampler for grouping by length, which could not find the lengths itself."""
        if rows is None or getattr(self.args, "train_sampling_strategy", "") != "group_by_length":
            return None
        lengths = np.sum([*rows.lengths().values()], axis=0).tolist()
        return LengthGroupedSampler(size, lengths=lengths, generator=generator)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; ``True`` continues the run that was started last in the output folder.

        Raises:
            ValueError: the checkpoint to continue from was not written to its end or belongs to
                another run or has more steps than this one, ``save_total_limit`` would delete
                those of others, another process writes into the output folder, or
                ``dataloader_drop_last`` would leave no batch.
            FloatingPointError: the loss, the gradient norm or the weights are no longer finite;
                checkpoints of before stay.
            OSError: the disk is full.
        """
        self._check_batches()
        checkpoint = self._begin_run(resume_from_checkpoint)
        if self.args.should_log:
            if isinstance(self.train_dataset, Sized):
                say_plan(self.args, len(self.train_dataset), self.unit, self.model)
            warn_of_rounding(self)
        self._new_tokens, self._first_step = 0, None
        off = dict.fromkeys(self._dropout, 0.0)
        try:
            with config_values(causal_lm(self.model).config, off):
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            if was_interrupted(self):
                # A launcher ends all processes when the first one ends, and one may still write.
                self.accelerator.wait_for_everyone()
        finally:
            restore_signals(self)
        if checkpoint is not None and self._first_step is None:
            make_up_last_evaluation(self)
        self._end_run()
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of an optimiser step; none behind the last step.

        The Trainer asks only after a step whether the run is over: one that goes on from its end,
        in the middle of an epoch, would take one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _check_batches(self) -> None:
        args, rows = self.args, self.train_dataset
        needed = args.train_batch_size * sharing_processes(args)
        have = len(rows) if isinstance(rows, Sized) else needed
        if args.dataloader_drop_last and have < needed:
            raise ValueError(
                f"dataloader_drop_last: expected at least {counted(needed, 'row')}, a "
                f"batch of every process, got {have}; nothing would be left to train on"
            )

    def _begin_run(self, resume: str | bool | None) -> str | None:
        """Find the checkpoint to continue from and put down whose output folder it is."""
        facts = {**self.args.identity(), "data": rows_fact(self.train_dataset), **self.frozen_facts}
        # No weight shows the factor of an adapter.
        facts["adapter"] = adapter_words(self.model)
        output_dir, rotates = str(self.args.output_dir), bool(self.args.save_total_limit)
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                self._lock = lock_folder(output_dir)
                found = [*checkpoints.begin(output_dir, resume, facts, rotates=rotates)]
                if found[0] is not None and self.train_dataset is not None:
                    rows: Any = self.train_dataset
                    check_steps(found[0], self.args, steps_of(self.args, len(rows)))
            except (ValueError, OSError) as error:
                found = [None, str(error)]
        # One process decides: the others would see what it writes, and wait for one that fails.
        checkpoint, record = broadcast_object_list(found)
        if isinstance(record, str):
            raise ValueError(record)
        if self.args.should_save:
            write_record(output_dir, record)
        self._record = record
        return checkpoint

    def _end_run(self) -> None:
        """Say and put down which checkpoint the model is now."""
        if was_interrupted(self):
            return
        best = best_model(self)
        if self.args.should_log:
            say_best_model(self)
        if best is not None and self._record is not None and self.args.should_save:
            self._record = self._record._replace(best=best.step)
            write_record(str(self.args.output_dir), self._record)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with contextlib.ExitStack() as stack:
            core = causal_lm(self.model)
            stack.enter_context(config_values(core.config, self._dropout))
            if is_adapted(self.model):
                stack.enter_context(saving_own_adapters(self.model))
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, by default as the end of the run.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
            OSError: the disk is full.
        """
        if _internal_call:
            # Part of a checkpoint, which is looked at as a whole.
            super().save_model(output_dir, _internal_call)
            return
        check_weights(self)
        with full_disk_named(str(self.args.output_dir), "the model"), whole_weights(self):
            super().save_model(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_weights(self)
        step = self.state.global_step
        with full_disk_named(str(self.args.output_dir), f"the checkpoint of step {step}"):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._settle_tokens()
        if self.args.should_save:
            folder, step = self._get_output_dir(trial=trial), self.state.global_step
            checkpoint = checkpoints.folder(folder, step)
            checkpoints.invalidate(checkpoint)
            if self._record is not None:
                record = self._record
                self._record = record._replace(steps=sorted({*record.steps, step}))
                write_record(str(self.args.output_dir), self._record)
                if self.args.save_total_limit:
                    # Half of a checkpoint must not count, or it could push out a whole one.
                    checkpoints.remove_incomplete(folder, self._record.steps)
                write_record(checkpoint, self._record)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Rank 0 now declares the checkpoint complete: every rank has written its part by then.
        self.accelerator.wait_for_everyone()

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        # Known on the host; summed over the ranks when somebody wants to know.
        self._new_tokens += _tokens(inputs)

    def _settle_tokens(self) -> None:
        """Add what all ranks have computed since the last call; every rank has to call it."""
        new = torch.tensor(self._new_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, reduction="sum"))
        self._new_tokens = 0

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """``6 x`` parameters without embeddings ``x`` tokens computed, as the Trainer counts."""
        return 6 * self._parameters * _tokens(inputs)


def _tokens(batch: Mapping[str, Any]) -> int:
    return sum(pack["tokens"] for pack in batch["packs"])
