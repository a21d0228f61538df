"""Quality against KL on real runs: samples, KL estimates, scores, and a warning, checkpoint by
checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdaa.train.lazy_names import lazy_names

if TYPE_CHECKING:
    from fastdaa.study.track.callback import TrackQuality
    from fastdaa.study.track.settings import TrackSettings

__all__ = ["TrackQuality", "TrackSettings"]

__getattr__, __dir__ = lazy_names(
    __name__, {"TrackQuality": "callback", "TrackSettings": "settings"}
)
