"""A package that is not installed, in words that say how to get it."""

from __future__ import annotations

from importlib.util import find_spec

# Modules that commands import, and what to give to pip.
PACKAGES = {
    **{
        name: name
        for name in (
            "accelerate", "datasets", "matplotlib", "numpy", "packaging", "rich", "safetensors",
            "scipy", "tokenizers", "torch", "tqdm", "transformers", "vllm",
        )
    },
    "bitsandbytes": "'fastdaa[quantization]'",
    "cut_cross_entropy": "cut-cross-entropy",
    "flash_attn": "'fastdaa[flash]'",
    "huggingface_hub": "huggingface-hub",
    "liger_kernel": "'fastdaa[liger]'",
    "peft": "'fastdaa[peft]'",
    "trl": "trl",
    "triton": "'fastdaa[triton]'",
    "yaml": "pyyaml",
}  # fmt: skip

_TRAINING = ("torch", "transformers", "accelerate", "datasets", "yaml", "rich")
_STUDY = ("torch", "numpy", "rich", "matplotlib")
# What a command would miss only after its work is done.
_NEEDED = {
    **dict.fromkeys(("train", "sft", "reward", "online", "evaluate"), _TRAINING),
    **dict.fromkeys(("study", "demo"), _STUDY),
}


def check_packages(command: str) -> None:
    """Raise ``ImportError`` for a command that would not come to its end; imports nothing."""
    for module in _NEEDED.get(command, ()):
        if find_spec(module) is None:
            raise ImportError(how_to_install(module))


def missing_package(error: BaseException | None) -> str | None:
    """One line about the package whose absence is behind ``error``, or None for other errors."""
    while isinstance(error, ModuleNotFoundError):
        if error.name in PACKAGES:
            return how_to_install(error.name)
        # transformers wraps them into one that names its own module.
        error = error.__cause__ or error.__context__
    return None


def how_to_install(module: str) -> str:
    """The same for a module of :data:`PACKAGES`."""
    return f"expected the package {module}, which is not installed: pip install {PACKAGES[module]}"
