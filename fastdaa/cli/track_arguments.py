"""The options of ``fastdaa train`` that track quality against KL."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from fastdaa.train.options import check_count

if TYPE_CHECKING:
    from fastdaa.study.track.settings import TrackSettings

_SWITCHES = ("track_reward", "track_judge", "track_steps")


@dataclass
class TrackArguments:
    """Quality and KL of samples while training; on with any of reward, judge and steps."""

    _argument_group_name = "quality and KL of samples (docs/tracking.md)"

    track_reward: str | None = field(
        default=None,
        metadata={
            "help": "Measure quality and KL of samples, scored by this. It is module:function, "
            "path/to/file.py:function (prompts and completions to a list of numbers), or a reward "
            "model's folder or hub id."
        },
    )
    track_judge: str | None = field(
        default=None,
        metadata={
            "help": "Command that compares answers with the chosen ones, as JSON lines; gives the "
            "win-rate."
        },
    )
    track_judge_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that the judge may take per measurement."}
    )
    track_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between measurements. Default: at every checkpoint."},
    )
    track_dataset: str | None = field(
        default=None,
        metadata={"help": "Pairs whose prompts are answered. Default: the evaluation pairs."},
    )
    track_prompts: int = field(
        default=64, metadata={"help": "Prompts per measurement, each answered once."}
    )
    track_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    track_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples, and of the KL."}
    )
    track_batch_size: int = field(default=16, metadata={"help": "Prompts answered at once."})
    track_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of prompts and of sampling."}
    )
    track_stop: int | None = field(
        default=None,
        metadata={
            "help": "Stop, with a checkpoint, after N measurements in a row in which quality has "
            "fallen while KL has grown. Default: warn only."
        },
    )

    def __post_init__(self) -> None:
        for name in ("track_steps", "track_stop", "track_prompts", "track_batch_size"):
            check_count(name, getattr(self, name), optional=True)
        if not self.on:
            given = [
                entry.name
                for entry in fields(self)
                if entry.name not in _SWITCHES and getattr(self, entry.name) != entry.default
            ]
            if given:
                raise ValueError(
                    f"{given[0]}: expected one of {', '.join(_SWITCHES)} beside it, got none"
                )
        if self.track_stop is not None and not (self.track_reward or self.track_judge):
            raise ValueError(
                "track_stop: expected track_reward or track_judge beside it; KL alone does not "
                "tell when to stop"
            )

    @property
    def on(self) -> bool:
        """Whether anything is to be tracked."""
        return any(getattr(self, name) is not None for name in _SWITCHES)

    def settings(self) -> TrackSettings:
        """How the policy is sampled.

        Raises:
            ValueError: a number out of range.
        """
        from fastdaa.study.track.settings import TrackSettings

        return TrackSettings(
            prompts=self.track_prompts,
            max_new_tokens=self.track_max_new_tokens,
            temperature=self.track_temperature,
            batch_size=self.track_batch_size,
            seed=self.track_seed,
        )
