"""Names of the columns of a tokenised dataset."""

from __future__ import annotations

TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SEQUENCE_FIELDS = ("prompt_ids", "completion_ids")
SKIP_FIELDS = ("chosen_skip", "rejected_skip")
REF_FIELDS = ("ref_chosen_logps", "ref_rejected_logps")
REF_TOKEN_FIELDS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
ADVANTAGE_FIELDS = ("chosen_advantage", "rejected_advantage")
