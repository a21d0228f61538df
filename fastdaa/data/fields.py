"""Names of the columns of a tokenised dataset."""

from __future__ import annotations

TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SEQUENCE_FIELDS = ("prompt_ids", "completion_ids")
PAIR_SEQUENCES = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))
"""Columns whose tokens make the sequences of a pair."""
SKIP_FIELDS = ("chosen_skip", "rejected_skip")
REF_FIELDS = ("ref_chosen_logps", "ref_rejected_logps")
REF_SEQUENCE_FIELD = "ref_logps"
"""The same of unpaired rows."""
MISMATCHED_FIELD = "mismatched_ids"
"""Of unpaired rows: the completion of another prompt, where it is fixed for the run."""
REF_MISMATCHED_FIELD = "ref_mismatched_logps"
"""Its log-probs after the prompt of the row."""
REF_TOKEN_FIELDS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
ADVANTAGE_FIELDS = ("chosen_advantage", "rejected_advantage")
LABEL_FIELD = "label"
"""Of unpaired rows: whether the completion is desirable."""
SOURCE_FIELD = "mixture_source"
PLACE_FIELD = "mixture_place"
"""Of the rows of a mixture: the source, as the user has named it, and where the row is in it."""
