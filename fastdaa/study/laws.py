"""Laws of quality against distance, in which the coefficients are linear.

With ``d = sqrt(KL(policy || reference))`` (KL in nats a sequence) and ``R`` the gain in quality
over the reference:

========= ============================ ============== ================
law       R(d)                         peak d*        gain there
========= ============================ ============== ================
log       d (alpha - beta log d)       e^(a/b - 1)    beta d*
d         d (alpha - beta d)           a / 2b         alpha^2 / (4 beta)
kl        KL (alpha - beta KL)         sqrt(a / 2b)   alpha^2 / (4 beta)
========= ============================ ============== ================

``log`` is the law of reinforcement learning and ``d`` the law of best-of-n of Gao et al. (arXiv
2210.10760, section 3.1); Rafailov et al. (arXiv 2406.02900, section 3.2) take ``log`` for direct
alignment and compare it with a quadratic in KL. The best-of-n law *is* the quadratic in d. Each law
can have an intercept, the gain at the reference itself; without one it goes through the origin.
``log`` cannot hold near the origin: its slope there is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MIN_DISTANCE = 1e-3
"""Points closer to the reference (``d``, so KL below 1e-6) are left out: log d says nothing."""


class Law(NamedTuple):
    """``R = intercept + alpha * rise(d) - beta * fall(d)``."""

    name: str
    formula: str
    rise: Callable[[np.ndarray], np.ndarray]
    fall: Callable[[np.ndarray], np.ndarray]
    stationary: Callable[[float, float], float]
    """``d`` at which the slope is 0, for beta > 0 (0 or below: the law falls from the start)."""

    def design(self, d: np.ndarray, intercept: bool = False) -> np.ndarray:
        """Columns ``[n, 2]`` or ``[n, 3]`` that alpha, beta (and the intercept) multiply."""
        columns = [self.rise(d), -self.fall(d)]
        return np.stack([*columns, np.ones_like(d)] if intercept else columns, axis=1)

    def value(
        self, d: np.ndarray | float, alpha: float, beta: float, intercept: float = 0.0
    ) -> np.ndarray:
        """The gain at ``d > 0``, in the shape of ``d``."""
        distance = np.asarray(d, dtype=np.float64)
        return intercept + alpha * self.rise(distance) - beta * self.fall(distance)

    def peak(self, alpha: float, beta: float) -> float | None:
        """``d`` of the maximum; None where the law has none at a ``d > 0``, inf beyond floats."""
        if not beta > 0:
            return None
        try:
            d = self.stationary(alpha, beta)
        except OverflowError:
            return math.inf
        return d if d > 0 else None

    def zero_crossing(self, alpha: float, beta: float, intercept: float = 0.0) -> float | None:
        """``d`` behind the peak at which the gain is back at 0; None where there is none.

        Without an intercept these are ``e^(alpha / beta)``, ``alpha / beta`` and its root.
        """
        peak = self.peak(alpha, beta)
        if peak is None or not math.isfinite(peak):
            return None
        if self.value(peak, alpha, beta, intercept) <= 0:
            return None
        low, high = peak, 2 * peak
        while self.value(high, alpha, beta, intercept) > 0:
            low, high = high, 2 * high
            if not math.isfinite(high):
                return None
        # The gain falls all the way from the peak, so halving the bracket is exact.
        while low < (middle := 0.5 * (low + high)) < high:
            if self.value(middle, alpha, beta, intercept) > 0:
                low = middle
            else:
                high = middle
        return high


def _identity(d: np.ndarray) -> np.ndarray:
    return d


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "log",
            "d (alpha - beta log d)",
            _identity,
            lambda d: d * np.log(d),
            lambda alpha, beta: math.exp(alpha / beta - 1),
        ),
        Law(
            "d",
            "d (alpha - beta d)",
            _identity,
            np.square,
            lambda alpha, beta: alpha / (2 * beta),
        ),
        Law(
            "kl",
            "KL (alpha - beta KL)",
            np.square,
            lambda d: d**4,
            lambda alpha, beta: math.sqrt(max(alpha, 0.0) / (2 * beta)),
        ),
    )
}
"""The laws by name. ``value``, ``peak`` and ``zero_crossing`` take d, not KL, for all of them."""
