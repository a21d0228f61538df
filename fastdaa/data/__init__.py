"""Preference pairs: reading, checking, tokenising, packing, collating."""

from __future__ import annotations

from fastdaa.data.collate import Layout, PairCollator
from fastdaa.data.errors import DataError
from fastdaa.data.mixture import load_mixture
from fastdaa.data.packing import pack_by_length, pack_by_width
from fastdaa.data.packs import dense_mask, selection_from
from fastdaa.data.pairs import load_pairs, read_pairs
from fastdaa.data.reports import SkipReport, TokenizeReport
from fastdaa.data.rows import PairRows
from fastdaa.data.tokenise import tokenize_pairs, tokenize_unpaired
from fastdaa.data.unpaired import load_unpaired

__all__ = [
    "DataError",
    "Layout",
    "PairCollator",
    "PairRows",
    "SkipReport",
    "TokenizeReport",
    "dense_mask",
    "load_mixture",
    "load_pairs",
    "load_unpaired",
    "pack_by_length",
    "pack_by_width",
    "read_pairs",
    "selection_from",
    "tokenize_pairs",
    "tokenize_unpaired",
]
