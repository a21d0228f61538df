"""TRL's trainers on the LM head of fastdaa: change the import, keep the script.

``from trl import DPOTrainer`` becomes ``from fastdaa.drop_in.trl import DPOTrainer``, and so do
``KTOTrainer``, ``SFTTrainer``, ``GRPOTrainer`` and ``RLOOTrainer``; their configs stay TRL's. Needs
TRL from 1.16 to below 1.17, else ``ImportError``.
"""

from fastdaa.drop_in.trl.version import check_version

check_version()

from fastdaa.drop_in.trl.trainers import (  # noqa: E402 - of a TRL that is known
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RLOOTrainer,
    SFTTrainer,
)

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "SFTTrainer"]
