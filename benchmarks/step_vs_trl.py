"""The whole training step against TRL's DPOTrainer: same model, same pairs, same order.

    python -m fastdaa.benchmarks.step_vs_trl --data pairs.jsonl.gz --steps 12 --threads 2
    python -m fastdaa.benchmarks.step_vs_trl --device cuda --hidden 2048 --layers 16 --vocab 128256

Every contender is a process of its own that runs the ordinary ``trainer.train()``. A callback holds
it at the end of each step until the parent lets it go on, so the steps of all contenders alternate
and meet the same machine. A step is everything from one optimizer step to the next: data, reference
forward, policy forward and backward, clipping, optimizer, metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One line each: what is different from the library's defaults.
CONTENDERS: dict[str, dict[str, Any]] = {
    "trl": {"library": "trl"},
    "trl, no checkpointing": {"library": "trl", "gradient_checkpointing": False},
    "trl, sorted pairs": {"library": "trl", "sort": True},
    "trl, sorted, no checkpointing": {
        "library": "trl", "sort": True, "gradient_checkpointing": False,
    },
    "fastdaa": {"library": "fastdaa"},
    "fastdaa, sorted pairs": {"library": "fastdaa", "sort": True},
    "fastdaa, packed": {"library": "fastdaa", "layout": "packed"},
    "fastdaa, padded": {"library": "fastdaa", "layout": "padded"},
}  # fmt: skip
DEFAULT = ("trl", "trl, sorted pairs", "trl, sorted, no checkpointing", "fastdaa")
# The same objective under each library's name.
LOSSES = {"sigmoid": ("sigmoid", "dpo"), "hinge": ("hinge", "slic"), "ipo": ("ipo", "ipo_norm")}


def main(argv: list[str] | None = None) -> int:
    """Run the contenders and print one table; ``--output`` adds JSON lines."""
    args = _parse(argv)
    rows = run(args)
    _print_table(rows, args)
    if args.output:
        with Path(args.output).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="preference pairs, JSONL or JSONL.gz (default: generated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bf16")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a batch (default: 8)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=16000, help="vocabulary of the model")
    parser.add_argument("--loss", choices=LOSSES, default="sigmoid")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(DEFAULT))
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a contender, with every loss and every step time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, folder)
        workers: dict[str, tuple[Any, Connection]] = {}
        for name in args.contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(name, vars(args), folder, theirs))
            process.start()
            workers[name] = (process, ours)
            _receive(name, process, ours)  # one at a time: building models is noise, too
        rows = {name: {"seconds": [], "losses": [], "cpu_seconds": []} for name in workers}
        for step in range(args.warmup + args.steps):
            for name, (process, pipe) in workers.items():
                pipe.send("go")
                report = _receive(name, process, pipe)
                rows[name]["losses"].append(report["loss"])
                if step >= args.warmup:
                    rows[name]["seconds"].append(report["seconds"])
                    rows[name]["cpu_seconds"].append(report["cpu_seconds"])
                rows[name]["peak_mib"] = report["peak_mib"]
            print(f"step {step + 1} of {args.warmup + args.steps}", file=sys.stderr, flush=True)
        for process, pipe in workers.values():
            pipe.send("stop")
            process.join()
    return [_row(name, values, args) for name, values in rows.items()]


def _receive(name: str, process: Any, pipe: Connection) -> Any:
    """What a worker says; its death is an error, not a wait without end."""
    while not pipe.poll(1.0):
        if not process.is_alive():
            raise RuntimeError(f"{name}: expected a step, but the process ended")
    return pipe.recv()


def _row(name: str, values: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    median = statistics.median(values["seconds"])
    return {
        "contender": name,
        "case": {k: v for k, v in vars(args).items() if k not in ("output", "contenders", "data")},
        "median_seconds": median,
        "pairs_per_second": args.batch / median,
        **values,
        "machine": machine(args.device),
    }


def machine(device: str) -> dict[str, Any]:
    """Device, commit and versions, for every row."""
    names = ("torch", "transformers", "accelerate", "trl", "fastdaa")
    return {
        "device": device_name(device),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {_cpu_name()}"


def _commit() -> str:
    """The commit of this checkout, with a plus sign if it was changed since."""
    run = partial(subprocess.run, cwd=Path(__file__).resolve().parent, capture_output=True)
    head = run(["git", "rev-parse", "--short", "HEAD"], text=True)
    if head.returncode:
        return "no checkout"
    changed = run(["git", "status", "--porcelain", "--untracked-files=no"], text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def prepare(args: argparse.Namespace, folder: str) -> None:
    """Tokenizer, model and pairs as files that all contenders load."""
    import torch
    from datasets import Dataset

    from fastdaa.data import load_pairs, tokenize_pairs

    pairs = load_pairs(args.data) if args.data else Dataset.from_list(generated_pairs())
    tokenizer = _train_tokenizer(pairs, min(args.vocab, 16000))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    _build_model(tokenizer, args).save_pretrained(folder)
    # Pairs that fit: both libraries would drop the others, and say so elsewhere.
    tokens, _ = tokenize_pairs(pairs, tokenizer, max_length=None)
    need = args.batch * (args.steps + args.warmup)
    fitting = [i for i, row in enumerate(tokens) if len(row["prompt_ids"]) < 1024]
    chosen = (fitting * (need // len(fitting) + 1))[:need]
    length = {i: _longest(tokens[i]) for i in set(chosen)}
    pairs = Dataset.from_list([pairs[i] for i in chosen])
    pairs.save_to_disk(f"{folder}/pairs")
    ordered = sorted(range(need), key=lambda row: length[chosen[row]])
    batches = [ordered[i : i + args.batch] for i in range(0, need, args.batch)]
    # Batches of similar length, in a random order of batches: the same work at every time.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(batches), generator=generator).tolist()
    pairs.select([row for batch in order for row in batches[batch]]).save_to_disk(
        f"{folder}/sorted"
    )


def generated_pairs(count: int = 300) -> list[dict[str, Any]]:
    """Pairs of random words with the lengths of real chats: log-normal, median prompt 170 words,
    median completion 340. The words mean nothing; only lengths matter to the speed."""
    numbers = random.Random(0)
    words = ["".join(numbers.choices("abcdefghiklmnoprstuvw", k=4)) for _ in range(2000)]

    def text(median: float) -> str:
        size = int(numbers.lognormvariate(math.log(median), 0.7))
        return " ".join(numbers.choices(words, k=min(max(size, 4), 700)))

    return [
        {
            "prompt": [{"role": "user", "content": text(170)}],
            "chosen": [{"role": "assistant", "content": text(340)}],
            "rejected": [{"role": "assistant", "content": text(340)}],
        }
        for _ in range(count)
    ]


def _longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _train_tokenizer(pairs: Any, size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(
        (m["content"] for row in pairs for k in ("prompt", "chosen", "rejected") for m in row[k]),
        trainer,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[0], pad_token=special[3]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _build_model(tokenizer: Any, args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(args.vocab, len(tokenizer)),
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // (64 if args.hidden >= 1024 else 32),
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _work(name: str, case: dict[str, Any], folder: str, pipe: Connection) -> None:
    """One contender: an ordinary training run that asks for leave after every step."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    torch.set_num_threads(case["threads"])
    logging.set_verbosity_error()
    losses: list[float] = []
    peak = _Peak(case["device"])

    class Baton(TrainerCallback):
        began = began_cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - self.began
            cpu = time.process_time() - self.began_cpu
            report = {"seconds": seconds, "cpu_seconds": cpu, "loss": losses[-1]}
            pipe.send({**report, "peak_mib": peak.read()})
            self.wait()

        def wait(self) -> None:
            if pipe.recv() == "stop":
                os._exit(0)
            self.began, self.began_cpu = time.perf_counter(), time.process_time()

    options = dict(CONTENDERS[name])
    library = options.pop("library")
    dataset = load_from_disk(f"{folder}/{'sorted' if options.pop('sort', False) else 'pairs'}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common = {
        "output_dir": f"{folder}/{name}", "per_device_train_batch_size": case["batch"],
        "max_steps": case["steps"] + case["warmup"] + 1, "learning_rate": case["lr"], "beta": 0.1,
        "lr_scheduler_type": "constant", "max_length": 1024,
        "use_cpu": case["device"] == "cpu", "bf16": case["device"] == "cuda",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = _trainer(library, case["loss"], {**common, **options}, model, tokenizer, dataset)
    trainer.add_callback(Baton())
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    pipe.send("ready")
    peak.start()
    trainer.train()


def _trainer(
    library: str, loss: str, options: dict[str, Any], model: Any, tokenizer: Any, dataset: Any
) -> Any:
    theirs, ours = LOSSES[loss]
    if library == "trl":
        from trl import DPOConfig, DPOTrainer

        config: Any = DPOConfig(loss_type=[theirs], **options)
        kind: Any = DPOTrainer
    else:
        from fastdaa.train.config import PreferenceConfig
        from fastdaa.train.trainer import PreferenceTrainer

        config = PreferenceConfig(loss_type=[ours], **options)
        kind = PreferenceTrainer
    return kind(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


class _Peak:
    """Highest memory since the start of training, above what was there before.

    Resident memory of the process on CPU, allocated device memory on CUDA.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def start(self) -> None:
        """Forget what happened so far."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() // 1024
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS")

    def read(self) -> float:
        """MiB above the start."""
        if self.cuda:
            import torch

            return (torch.cuda.max_memory_allocated() // 1024 - self.before) / 1024
        return (self._field("VmHWM") - self.before) / 1024

    def _field(self, name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
        raise RuntimeError(f"expected {name} in /proc/self/status")


def _print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = "CUDA, bf16" if args.device == "cuda" else f"{args.threads} threads, fp32"
    title = f"batches of {args.batch} pairs, {kind}, loss {args.loss}"
    table = Table(title=f"Whole training step, median of {args.steps}: {title}")
    for column in ("contender", "s / step", "CPU s", "pairs / s", "peak MiB", "first losses"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for other in (row for row in rows if row["contender"].startswith("trl")):
        table.add_column(f"against {other['contender']}", justify="right")
    for row in rows:
        ratios = [
            f"{other['median_seconds'] / row['median_seconds']:.2f} x"
            for other in rows
            if other["contender"].startswith("trl")
        ]
        cells = (
            f"{row['median_seconds']:.2f}", f"{statistics.median(row['cpu_seconds']):.2f}",
            f"{row['pairs_per_second']:.2f}", f"{row['peak_mib']:.0f}",
            " ".join(f"{loss:.5f}" for loss in row["losses"][:5]),
        )  # fmt: skip
        table.add_row(row["contender"], *cells, *ratios)
    Console(width=max(Console().width, 160)).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
