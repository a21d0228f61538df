"""How a logged number is shown to a person: in lines, tables and model cards."""

from __future__ import annotations

import math

_NOT_NEGATIVE = ("kl/token", "kl/sequence")
_OF_ANSWERS = ("rewards/", "logps/", "logits/")


def shown_value(key: str, value: float) -> float:
    """The value as it is shown: an exact KL below 0 is rounding, and is shown as 0.

    In fp32 the divergence of a token comes out up to some 5e-7 nats off, and the mean of 400 of
    them 1e-8, which is more than the divergence itself where policy and reference are nearly equal.
    What is logged and averaged stays as it was computed.
    """
    return max(value, 0.0) if key.removeprefix("eval_") in _NOT_NEGATIVE else value


def shown_as(key: str, value: float, spec: str) -> str:
    """The value in a format; what that rounds to 0 has no sign: ``0.0000`` for -0.00001."""
    text = format(shown_value(key, value), spec)
    return text.removeprefix("-") if float(text.replace(",", "").rstrip("%")) == 0 else text


def shown_text(key: str, value: float) -> str:
    """Four significant digits, or a whole number with separators from 1,000 on.

    A dash for the mean of answers of which there was none, as of one label of unpaired data. What
    diverged is shown as ``nan``, the loss above all.
    """
    if math.isnan(value) and key.removeprefix("eval_").startswith(_OF_ANSWERS):
        return "-"
    return shown_as(key, value, ",.0f" if 1000 <= abs(value) < 1e15 else ".4g")
