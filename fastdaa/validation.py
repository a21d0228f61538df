"""Every check of a public argument. Below the public doors, arguments are trusted.

A message names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN_CHARACTERS = 60
_UNSHARD_HEAD = (
    "with fully_shard, compute the loss in the forward of the outermost module, which holds the "
    "head or calls its unshard() first; elsewhere its gradient would be that of one process"
)


def shown(value: object) -> str:
    """``value`` as an error message quotes it: its ``repr``, of at most 60 characters or so."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    return repr(text) if isinstance(value, str) else text


def check_readable(name: str, tensor: object) -> None:
    """Raise ``ValueError`` for a tensor without values, on the device ``meta``."""
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise ValueError(f"{name}: expected a device that holds values, got {tensor.device}")


def check_whole(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` for a distributed tensor, of which every process holds a part.

    A graph asks when it runs, as for all that is checked of its tensors.
    """
    if not torch.compiler.is_compiling() and hasattr(tensor, "full_tensor"):
        of_head = name.endswith(("weight", "bias"))
        raise TypeError(
            f"{name}: expected a tensor with all of its entries, got {type(tensor).__name__}; "
            f"{_UNSHARD_HEAD if of_head else 'give what its full_tensor() returns'}"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a dense, real floating-point tensor.

    Raises:
        TypeError: not a tensor, sparse or nested, or not fp16, bf16, fp32 or fp64.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    if not torch.compiler.is_compiling() and (tensor.is_nested or tensor.layout != torch.strided):
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_indices(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is int64 of the given shape.

    Raises:
        TypeError: not an int64 tensor, or a distributed one.
        ValueError: another shape.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    check_whole(name, tensor)
    check_shape(name, tensor, shape)


def check_kind(name: str, value: object, kind: type, how: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a ``kind``; ``how`` says what makes one."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{name}: expected {article} {kind.__name__}, as of {how}, got {type(value).__name__}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` has the given shape.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {shown(value)}")


def check_number(name: str, value: object) -> float:
    """A finite real number, of Python or NumPy, as a float.

    Raises:
        TypeError: something else, such as a tensor.
        ValueError: infinite or not a number.
    """
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not float("-inf") < number < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_positive(name: str, value: object) -> float | None:
    """A finite number above zero, as a float; or None.

    Raises:
        TypeError: not a number.
        ValueError: infinite, not a number, or not above zero.
    """
    number = None if value is None else check_number(name, value)
    if number is not None and number <= 0.0:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return number


def check_positions(name: str, hidden_states: Tensor, positions: Sequence[int]) -> None:
    """Raise unless ``hidden_states`` are floating-point ``[*positions, D]``.

    Raises:
        TypeError: not a tensor, of another dtype, or a distributed one.
        ValueError: another shape.
    """
    check_floating(name, hidden_states)
    check_whole(name, hidden_states)
    if not hidden_states.ndim or tuple(hidden_states.shape[:-1]) != tuple(positions):
        expected = ", ".join(map(str, positions))
        raise ValueError(f"{name}: expected shape [{expected}, D], got {list(hidden_states.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``tensor`` is on the given device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_vector(name: str, tensor: Tensor, length: int, device: torch.device) -> None:
    """Raise unless ``tensor`` is floating-point, ``[length]``, and on the given device.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    check_floating(name, tensor)
    check_whole(name, tensor)
    check_shape(name, tensor, (length,))
    check_device(name, tensor, device)


def check_product(hidden_states: Tensor, weight: Tensor, prefix: str = "") -> None:
    """Check hidden states ``[N, D]`` and a head's weight ``[V, D]`` on the same device.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices that do not fit together.
    """
    check_floating(f"{prefix}hidden_states", hidden_states)
    check_floating(f"{prefix}weight", weight)
    check_whole(f"{prefix}hidden_states", hidden_states)
    check_whole(f"{prefix}weight", weight)
    if hidden_states.ndim != 2:
        raise ValueError(
            f"{prefix}hidden_states: expected shape [N, D], got {list(hidden_states.shape)}; "
            "flatten the batch and select the scored positions first"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"{prefix}weight: expected shape [V, D] with D = {hidden_states.shape[1]} as in "
            f"{prefix}hidden_states, got {list(weight.shape)}"
        )
    if weight.device != hidden_states.device:
        raise ValueError(
            f"{prefix}weight: expected device {hidden_states.device} as {prefix}hidden_states, "
            f"got {weight.device}"
        )


def _readable(tensor: Tensor) -> bool:
    """Whether a check may look at values: on a device it would wait for them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if not _readable(ids) or not ids.numel():
        return
    lowest, highest = (int(extreme) for extreme in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {wrong}")


def check_not_negative(name: str, numbers: Tensor) -> None:
    """Raise ``ValueError`` for a number below 0; read on CPU alone, too."""
    if _readable(numbers) and numbers.numel() and int(numbers.min()) < 0:
        raise ValueError(f"{name}: expected 0 or more, got {int(numbers.min())}")


def check_lengths(name: str, lengths: Tensor, tokens: int) -> None:
    """Raise unless ``lengths [S]`` are int64 numbers of tokens that sum to ``tokens``.

    Values are read on CPU alone, as target ids are: on CUDA others are undefined.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: not one dimension, a negative length, or another sum.
    """
    check_indices(name, lengths, tuple(getattr(lengths, "shape", ())))
    if lengths.ndim != 1:
        raise ValueError(f"{name}: expected shape [S], got {list(lengths.shape)}")
    if not _readable(lengths):
        return
    check_not_negative(name, lengths)
    if int(lengths.sum()) != tokens:
        raise ValueError(f"{name}: expected a sum of {tokens} tokens, got {int(lengths.sum())}")


def check_counts(name: str, lengths: Tensor, counts: tuple[int, ...]) -> None:
    """Raise unless int64 ``lengths [S]`` are the numbers ``counts``; read on CPU alone, too.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: another shape or other numbers.
    """
    check_indices(name, lengths, (len(counts),))
    if _readable(lengths) and lengths.tolist() != list(counts):
        raise ValueError(
            f"{name}: expected the numbers of selection.counts, {shown(list(counts))}, got "
            f"{shown(lengths.tolist())}"
        )


def check_head_inputs(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_size: int | None = None,
    prefix: str = "",
    tokens: int | None = None,
) -> None:
    """Check the tensors of a head call: ``[N, D]``, ``[V, D]``, ``[N]`` and ``[V]``.

    ``prefix`` goes before the names of hidden states, weight and bias in messages. ``tokens`` says
    how many rows of hidden states will be selected; None for all.

    Target ids lie in ``[0, vocab_size)``, by default the rows of the weight. They are read on CPU
    alone, so that nothing waits for a device: on CUDA another id is undefined, as in
    ``torch.gather``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices that do not fit together.
    """
    check_product(hidden_states, weight, prefix)
    check_indices("targets", targets, (hidden_states.shape[0] if tokens is None else tokens,))
    _check_ids("targets", targets, weight.shape[0] if vocab_size is None else vocab_size)
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
        check_whole(f"{prefix}bias", bias)
        check_shape(f"{prefix}bias", bias, (weight.shape[0],))
    for name, tensor in (("targets", targets), (f"{prefix}bias", bias)):
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected device {hidden_states.device} as {prefix}hidden_states, "
                f"got {tensor.device}"
            )
