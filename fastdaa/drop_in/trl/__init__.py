"""TRL's ``DPOTrainer`` on the LM head of fastdaa: change the import, keep the script.

``from trl import DPOTrainer`` becomes ``from fastdaa.drop_in.trl import DPOTrainer``; ``DPOConfig``
stays TRL's. Needs TRL from 1.16 to below 1.17, else ``ImportError``.
"""

from fastdaa.drop_in.trl.version import check_version

check_version()

from fastdaa.drop_in.trl.trainer import DPOTrainer  # noqa: E402 - of a TRL that is known

__all__ = ["DPOTrainer"]
