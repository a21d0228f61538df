"""What the ``track_*`` options of ``fastdaa train`` build, cheap errors first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.cli.option_names import named_as

if TYPE_CHECKING:
    from fastdaa.cli.arguments import TrainArguments
    from fastdaa.study.track import TrackQuality
    from fastdaa.study.track.scoring import Scorer
    from fastdaa.train.config import PreferenceConfig
    from fastdaa.train.trainer import PreferenceTrainer


_NAMES = {
    name: f"track_{name}"
    for name in (
        *("reward", "judge", "judge_timeout", "prompts", "max_new_tokens", "temperature"),
        *("batch_size", "seed"),
    )
}
"""Settings of tracking by the options that give them."""


class Tracking:
    """Tracking of one run; does nothing where no option asks for it.

    Raises:
        ValueError: options that cannot work together, or a scorer that cannot be set up.
    """

    def __init__(self, arguments: TrainArguments, config: PreferenceConfig):
        self._options, self._arguments, self._config = arguments.track, arguments, config
        self._scorers: list[Scorer] = []
        self._pairs: Any = None
        self._trainer: Any = None
        self._callback: TrackQuality | None = None
        if self._options.on:
            with named_as(**_NAMES):
                self._check()
                self._scorers = self._build_scorers()

    def load_pairs(self, evaluation: Any) -> None:
        """Read ``--track_dataset``, or take the evaluation pairs.

        Raises:
            DataError: data that cannot be used.
        """
        if not self._options.on:
            return
        self._pairs = evaluation
        if self._options.track_dataset is not None:
            from fastdaa.data.named_columns import NamedColumns
            from fastdaa.data.pairs import PAIRS

            # Its columns may have other names than those of the training data.
            self._pairs = PAIRS.load(
                self._options.track_dataset, on_bad_row=self._config.on_bad_row,
                columns=NamedColumns(self._arguments.columns, "nowhere"),
            )  # fmt: skip

    def attach(self, trainer: PreferenceTrainer) -> None:
        """Add the callback to a trainer."""
        if not self._options.on:
            return
        from fastdaa.study.track import TrackQuality

        with named_as(**_NAMES):
            self._callback = TrackQuality(
                trainer,
                self._pairs,
                scorers=self._scorers,
                settings=self._options.settings(),
                steps=self._options.track_steps,
                stop_after=self._options.track_stop,
            )
        trainer.add_callback(self._callback)
        self._trainer = trainer

    def print_summary(self) -> None:
        """Say where the table is, where quality was best, and whether training was stopped."""
        if self._callback is None:
            return
        folder = Path(str(self._config.output_dir))
        if self._callback.stopped is not None:
            step = self._trainer.state.global_step
            print(f"stopped early at step {step} by --track_stop: {self._callback.stopped}")
        best = self._callback.best
        if best is not None:
            checkpoint = folder / f"checkpoint-{best}"
            where = f" ({checkpoint})" if checkpoint.is_dir() else ""
            where = " (the start)" if best == 0 else where
            print(f"best tracked score: step {best}{where}")
        table = self._callback.table
        if table.is_file():
            print(f"quality against KL: {table}; `fastdaa study fit` and `report` read it")

    def _check(self) -> None:
        from fastdaa.cli.paths import adapter_of
        from fastdaa.train.unpaired_config import UnpairedConfig

        if isinstance(self._config, UnpairedConfig):
            raise ValueError(
                "track_reward, track_judge: expected preference pairs to train on, got unpaired "
                "data, with which quality cannot be tracked"
            )
        self._options.settings()
        if not self._arguments.evaluates and self._options.track_dataset is None:
            raise ValueError(
                "track_dataset: expected held-out pairs for the prompts, got none; give "
                "track_dataset, eval_dataset, eval_split or test_size"
            )
        adapted = self._arguments.use_peft or adapter_of("model", self._arguments.model)
        if self._config.precompute_ref_log_probs and not adapted:
            from fastdaa.study.track.reference import NO_REFERENCE

            raise ValueError(NO_REFERENCE)

    def _build_scorers(self) -> list[Scorer]:
        # Only the main process asks them.
        if self._config.process_index != 0:
            return []
        from fastdaa.study.track.judge import JudgeCommand
        from fastdaa.study.track.reward_function import reward_scorer

        options = self._options
        scorers: list[Scorer] = []
        if options.track_reward is not None:
            # The mean of the first is the score.
            scorers.append(
                reward_scorer(
                    options.track_reward,
                    device=self._config.device,
                    batch_size=options.track_batch_size,
                )
            )
        if options.track_judge is not None:
            scorers.append(JudgeCommand(options.track_judge, options.track_judge_timeout))
        return scorers
