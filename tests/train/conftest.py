"""Tiny models, tokenised pairs and trainers on them."""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
import multiprocessing.connection
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from meeting import meeting

from fastdaa.train import PreferenceConfig, PreferenceTrainer
from fastdaa.train.callbacks import Curves

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
TRAINER_OPTIONS = {
    *("ref_model", "eval_dataset", "peft_config", "processing_class", "callbacks", "optimizers")
}


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """The Trainer collects garbage when it starts; it need not look through all imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def _model(family: str, overrides: tuple[tuple[str, Any], ...]) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **dict(overrides)})
    torch.manual_seed(0)
    names = (f"{family}ForCausalLM", f"{family}LMHeadModel")
    kind = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    return kind(config).eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """``tiny_model(family="Llama", **config)``: a new model, always with the same weights."""

    def build(family: str = "Llama", **overrides: Any) -> transformers.PreTrainedModel:
        return copy.deepcopy(_model(family, tuple(sorted(overrides.items()))))

    return build


@pytest.fixture(scope="session")
def pairs() -> Callable[..., Dataset]:
    """``pairs(count, seed=0)``: tokenised pairs of many lengths."""

    def build(count: int = 8, seed: int = 0, longest: int = 9) -> Dataset:
        generator = torch.Generator().manual_seed(seed)

        def ids() -> list[int]:
            length = int(torch.randint(1, longest, (), generator=generator))
            return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

        return Dataset.from_list([{field: ids() for field in FIELDS} for _ in range(count)])

    return build


@pytest.fixture(scope="session")
def unpaired(pairs: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """``unpaired(count, seed=0)``: tokenised completions of many lengths, with labels."""

    def build(count: int = 8, seed: int = 0) -> Dataset:
        rows = pairs(count, seed).to_list()
        return Dataset.from_list(
            [
                {
                    "prompt_ids": row["prompt_ids"],
                    "completion_ids": row["chosen_ids"],
                    "label": number % 3 != 1,
                }
                for number, row in enumerate(rows)
            ]
        )

    return build


@pytest.fixture
def make_trainer(
    tmp_path: Path, tiny_model: Callable[..., Any], pairs: Callable[..., Dataset]
) -> Callable[..., PreferenceTrainer]:
    """``make_trainer(model=None, data=None, **options)``: options of the trainer and the config."""

    def make(model: Any = None, data: Any = None, **options: Any) -> PreferenceTrainer:
        given = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "ref_cache_dir": str(tmp_path / "cache"),
            **options,
        }
        torch.manual_seed(0)  # a new adapter is random
        trainer = PreferenceTrainer(
            tiny_model() if model is None else model,
            args=PreferenceConfig(**settings),
            train_dataset=pairs() if data is None else data,
            **given,
        )
        # Drawing takes longer than the training here, and has tests of its own.
        trainer.remove_callback(Curves)
        return trainer

    return make


@pytest.fixture
def losses_of() -> Callable[[PreferenceTrainer], list[float]]:
    """The logged training losses."""
    return lambda trainer: [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def one_step(make_trainer: Callable[..., PreferenceTrainer]) -> Callable[..., Any]:
    """``one_step(**options)``: the gradients of one step, by name, and the trainer."""

    def step(**options: Any) -> tuple[dict[str, torch.Tensor], PreferenceTrainer]:
        trainer = make_trainer(
            **{"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **options}
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        grads = {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}
        return grads, trainer

    return step


class Naive:
    """Sequence by sequence, whole logits, nothing shared: what the trainer has to agree with."""

    def __init__(self, model: Any):
        self.model = model

    def logits(self, row: dict[str, Any], field: str) -> torch.Tensor:
        """Logits ``[tokens, V]`` that predict a completion."""
        prompt, completion = row["prompt_ids"], row[field]
        logits = self.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        return logits[len(prompt) - 1 : -1]

    def token_logps(self, row: dict[str, Any], field: str) -> torch.Tensor:
        """Log-probs ``[tokens]`` of a completion."""
        logps = self.logits(row, field).log_softmax(-1)
        return logps.gather(1, torch.tensor(row[field])[:, None])[:, 0]

    def logps(self, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs ``[B]`` of all chosen and all rejected completions."""
        sides = [
            torch.stack([self.token_logps(row, field).sum() for row in data])
            for field in FIELDS[1:]
        ]
        return sides[0], sides[1]


@pytest.fixture(scope="session")
def naive() -> type[Naive]:
    return Naive


RUNS = Path(__file__).with_name("runs.py")


@pytest.fixture(scope="session")
def start_run() -> Callable[..., Any]:
    """``start_run(**OPTIONS)``: a started process of ``runs.py``.

    The processes are forked from one that has imported everything and has done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdaa.train.unpaired", "peft", "datasets"])

    def start(**options: Any) -> Any:
        # Functions of this file could not be imported there.
        process = context.Process(
            target=runpy.run_path, args=(str(RUNS),), kwargs={"init_globals": {"OPTIONS": options}}
        )
        process.start()
        return process

    return start


@pytest.fixture
def run(start_run: Callable[..., Any], pairs: Callable[..., Dataset]) -> Callable[..., int]:
    """``run(folder, end=None, resume=False, **settings)``: one run to its end; the exit code."""

    def run_to_the_end(folder: Path, **options: Any) -> int:
        own = {k: options.pop(k) for k in RUN_OPTIONS & options.keys()}
        process = start_run(**run_options(folder, pairs(12).to_list(), own, options))
        process.join(60)
        assert process.exitcode is not None, "the run does not end"
        return process.exitcode

    return run_to_the_end


@pytest.fixture
def run_several(start_run: Callable[..., Any], pairs: Callable[..., Dataset]) -> Callable[..., Any]:
    """``run_several(count, folder, **options)``: the same with several processes over gloo; all
    their exit codes."""

    def run_to_the_end(count: int, folder: Path, **options: Any) -> list[int]:
        own = {k: options.pop(k) for k in RUN_OPTIONS & options.keys()}
        rows = own.pop("pairs", None) or pairs(24).to_list()
        launcher = own.pop("launcher", False)
        env = {**own.pop("env", {}), **meeting(count)}
        processes = [
            start_run(
                **run_options(folder, rows, dict(own), {"ddp_backend": "gloo", **options}),
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        if launcher:
            # As torchrun does: where one process ends with an error, it ends all.
            multiprocessing.connection.wait([process.sentinel for process in processes], 60)
            for process in processes:
                process.terminate()
        for process in processes:
            process.join(90)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert None not in codes, f"the run does not end: {codes}"
        return codes

    return run_to_the_end


@pytest.fixture
def run_two(run_several: Callable[..., Any]) -> Callable[..., Any]:
    """``run_two(folder, **options)``: the same with two processes."""
    return functools.partial(run_several, 2)


RUN_OPTIONS = {
    *("pairs", "reshard", "end", "resume", "adapter", "lora", "eval", "model", "env"),
    *("launcher", "slow_end", "groups", "reference", "lone"),
}


def run_options(
    folder: Path, rows: list[Any], own: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The ``OPTIONS`` of a run of six steps in two epochs, with a checkpoint every second one."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "seed": 3,
    }
    model = {**SIZES, **own.pop("model", {})}
    if "reference" in own:
        own["reference"] = {**SIZES, **own["reference"]}
    return {"model": model, "pairs": rows, "settings": {**defaults, **settings}, **own}


@pytest.fixture(scope="module")
def shifted(tiny_model: Callable[..., transformers.PreTrainedModel]):
    """A reference that is not the policy."""
    model = tiny_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
