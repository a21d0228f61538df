"""How long a sequence a model can take: the rows of its table of positions.

Tables (GPT-2, OPT, GPT-Neo, GPT-J) end; on a GPU, reading behind the end kills the process, and a
long sequence may come hours into a run. Rotary positions have no end, but quality has. Some scale
with the longest sequence of a forward pass (LongRoPE, dynamic NTK): behind their first scale, a
log-prob depends on what else is in the pass.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdaa.train.backbone import causal_lm

logger = logging.getLogger(__name__)
_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb|pos_encoding)$")
_ROWS_AT_ONCE = 4096


class Positions(NamedTuple):
    """What a model can take."""

    model: str
    """Its class."""
    table: int | None
    """Tokens behind which there is no position; None without such a table."""
    trained: int | None
    """Tokens behind which rotary positions are such as the model was not made for, if it says."""
    own: int | None = None
    """Tokens up to which rotary positions are a sequence's own; in a forward pass with a longer
    one they scale for all. None where they always are its own."""


def positions_of(model: nn.Module) -> Positions:
    """How many positions a model has, by its modules and its configuration."""
    core: Any = causal_lm(model)
    config = core.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    # The positions of an image or a sound are none of the text's.
    multimodal = core.config.get_text_config() is not core.config
    sizes = [*_tables(core.get_decoder() if multimodal else core)]
    table = min(sizes) if sizes else None
    rope = getattr(config, "rope_parameters", None)
    rotary = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    trained = limit if rotary and table is None and isinstance(limit, int) else None
    return Positions(type(core).__name__, table, trained, min(_scales(rope, limit), default=None))


def _scales(rope: Any, limit: Any) -> Iterable[int]:
    """Tokens behind which rotary positions scale with the longest sequence, of every such kind."""
    if not isinstance(rope, Mapping):
        return
    # Families with kinds of layers have the parameters of each under its name.
    for part in (rope, *rope.values()):
        kind = str(part.get("rope_type", "")) if isinstance(part, Mapping) else ""
        first = part.get("original_max_position_embeddings") if kind == "longrope" else limit
        if (kind == "longrope" or "dynamic" in kind) and isinstance(first, int):
            yield first


def _tables(core: nn.Module) -> Iterable[int]:
    for name, module in core.named_modules():
        if _TABLE.search(name) and isinstance(module, nn.Embedding):
            # OPT and its like leave their first rows free.
            yield module.num_embeddings - int(getattr(module, "offset", 0) or 0)
    for name, buffer in core.named_buffers():
        if _TABLE.search(name) and isinstance(buffer, Tensor) and buffer.dim() == 2:
            yield buffer.shape[0]
    # CTRL keeps its table as a plain attribute.
    for module in core.modules():
        table = vars(module).get("pos_encoding")
        if isinstance(table, Tensor):
            yield table.shape[0]


def longest(dataset: Any, fields: Sequence[Sequence[str]]) -> int:
    """Tokens of the longest sequence of a tokenised dataset; 0 of an empty one.

    Args:
        fields: the columns whose tokens make one sequence, of every kind of sequence.
    """
    import pyarrow.compute as compute

    names = sorted({name for columns in fields for name in columns})
    most = 0
    for table in dataset.with_format("arrow", columns=names).iter(_ROWS_AT_ONCE):
        lengths = {name: compute.list_value_length(table[name]) for name in names}
        for first, *others in fields:
            total = lengths[first]
            for name in others:
                total = compute.add(total, lengths[name])
            most = max(most, compute.max(total).as_py() or 0)
    return most


def check_length(
    models: Iterable[Positions], tokens: int, name: str, how: str, *, cached: bool = False
) -> None:
    """Compare the longest sequence with what models can take.

    Args:
        tokens: of the longest sequence.
        name: of the data.
        how: which option makes sequences shorter, and to what, with ``{limit}`` for the number.
        cached: log-probs of a reference are kept from other forward passes.

    Raises:
        ValueError: it is longer than the table of positions of one of them, or cached log-probs
            would be those of other positions.
    """
    for model in models:
        if model.table is not None and tokens > model.table:
            raise ValueError(
                f"{how.format(limit=model.table)}: the positions of {model.model} end there, and "
                f"the longest sequence of {name} has {tokens:,} tokens"
            )
        if cached and model.own is not None and tokens > model.own:
            raise ValueError(
                f"precompute_ref_log_probs: expected sequences of at most {model.own:,} tokens, "
                f"got {tokens:,} in {name}; behind that, the rotary positions of {model.model} "
                "depend on what else is in a forward pass, which a cache does not know"
            )
        if model.trained is not None and tokens > model.trained:
            logger.warning(
                "%s: the longest sequence has %s tokens, %s was made for up to %s "
                "(max_position_embeddings, without rope scaling)",
                name, f"{tokens:,}", model.model, f"{model.trained:,}",
            )  # fmt: skip
            return
        if model.own is not None and tokens > model.own:
            logger.warning(
                "%s: the longest sequence has %s tokens; the rotary positions of %s change for a "
                "whole forward pass where one of its sequences has more than %s, so that log-probs "
                "depend on the batch",
                name, f"{tokens:,}", model.model, f"{model.own:,}",
            )  # fmt: skip
            return
