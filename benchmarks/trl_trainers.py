"""``python -m fastdaa.benchmarks.trl_trainers``: TRL's trainers on fastdaa's head and on TRL's.

One micro-batch, forward (references included) and backward without the optimizer, by the trainers
of ``fastdaa.drop_in.trl`` and by TRL's own classes, on equal models and tokens, in turns. Nothing
is timed before the losses agree. Trainers that sample are left out: generation would hide the head.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

_TOLERANCE = 1e-4
"""Between the losses, relative; fp32 sums in another order."""
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Case(NamedTuple):
    """A trainer and its settings."""

    name: str
    trainer: str
    settings: dict[str, Any]
    lora: bool = False


CASES = (
    Case("dpo", "DPO", {}),
    Case("dpo-wpo", "DPO", {"use_weighting": True}),
    Case("dpo-lora", "DPO", {}, lora=True),
    Case("kto", "KTO", {}),
    Case("kto-lora", "KTO", {}, lora=True),
    Case("sft", "SFT", {}),
    Case("sft-prompts", "SFT", {"completion_only_loss": False}),
    Case("sft-lora", "SFT", {}, lora=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="CASE",
                        help=f"of {', '.join(names)}; default: all")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=12, help="timed steps each; default: 12")
    parser.add_argument("--completions", type=int, default=4, help="of a batch; default: 4")
    parser.add_argument("--length", type=int, default=64, help="tokens of every prompt and of "
                        "every completion; default: 64")  # fmt: skip
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; default: 256")
    parser.add_argument("--vocab", type=int, default=32000, help="default: 32000")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--output", metavar="FILE", help="append a line of JSON a case")


def run(options: argparse.Namespace) -> int:
    """0; 1 if losses disagree; 130 after Ctrl-C."""
    import torch
    from rich.console import Console

    from fastdaa.benchmarks.measure import interleave

    torch.set_num_threads(options.threads)
    console, code = Console(), 0
    cases = [case for case in CASES if case.name in options.cases]
    with tempfile.TemporaryDirectory(prefix="fastdaa-trl-") as folder:
        for case in cases:
            steps = contenders(case, options, folder)
            losses = {name: step().item() for name, step in steps.items()}
            gap = abs(losses["fastdaa"] - losses["trl"])
            if gap > _TOLERANCE * abs(losses["trl"]):
                console.print(f"{case.name}: wrong, so it is not timed: losses {losses}")
                code = 1
                continue
            try:
                seconds = interleave(steps, "cpu", repeats=options.rounds)
            except KeyboardInterrupt:
                console.print("interrupted; cases above are finished")
                return 130
            _tell(console, _row(case, options, losses, seconds), options.output)
    return code


def contenders(
    case: Case, options: argparse.Namespace, folder: str
) -> dict[str, Callable[[], Tensor]]:
    """A step of both, on weights and tokens that are the same: it returns the loss, detached."""
    import trl

    from fastdaa.drop_in import trl as drop_in

    classes = {"fastdaa": drop_in, "trl": trl}
    name = f"{case.trainer}Trainer"
    return {
        contender: _step(getattr(module, name), case, options, folder)
        for contender, module in classes.items()
    }


def _step(
    trainer_class: type, case: Case, options: argparse.Namespace, folder: str
) -> Callable[[], Tensor]:
    import trl
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pairs = case.trainer == "DPO"
    config = getattr(trl, f"{case.trainer}Config")(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=max(options.completions // (2 if pairs else 1), 1),
        report_to="none", disable_tqdm=True, max_steps=1, dataloader_pin_memory=False,
        save_strategy="no", train_sampling_strategy="sequential", **case.settings,
    )  # fmt: skip
    trainer: Any = trainer_class(
        _model(options, folder), args=config, train_dataset=dataset(case.trainer, options),
        processing_class=tokenizer(options.vocab), peft_config=_lora() if case.lora else None,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def step() -> Tensor:
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _model(options: argparse.Namespace, folder: str) -> Any:
    """A Llama with seeded weights, from a file, as TRL reads the reference from there again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden,
        intermediate_size=2 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=2 * options.length + 2, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    return LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{i}" for i in range(vocab - len(_SPECIAL)))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def dataset(trainer: str, options: argparse.Namespace) -> Dataset:
    """Random words in the columns of a trainer, more rows than a batch has."""
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        ids = torch.randint(options.vocab - len(_SPECIAL), (length,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    rows = []
    for i in range(2 * options.completions):
        # The end of a completion is a token, too.
        prompt, one, other = text(options.length), *(text(options.length - 1) for _ in range(2))
        row: dict[str, Any] = {"prompt": prompt}
        if trainer == "DPO":
            row |= {"chosen": f" {one}", "rejected": f" {other}"}
        else:
            row["completion"] = f" {one}"
        if trainer == "KTO":
            row["label"] = i % 2 == 0
        rows.append(row)
    return Dataset.from_list(rows)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


def _row(
    case: Case,
    options: argparse.Namespace,
    losses: Mapping[str, float],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    import statistics

    from fastdaa.benchmarks.machine import machine

    sizes = ("completions", "length", "layers", "hidden", "vocab", "threads", "rounds")
    return {
        "kind": "trl_trainers",
        "case": case.name,
        **{name: getattr(options, name) for name in sizes},
        "losses": dict(losses),
        "median_s": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": {name: list(times) for name, times in seconds.items()},
        **machine("cpu"),
    }


def _tell(console: Any, row: Mapping[str, Any], output: str | None) -> None:
    times = row["median_s"]
    factor = times["trl"] / times["fastdaa"]
    console.print(
        f"{row['case']:12} fastdaa {times['fastdaa']:.3f} s, TRL {times['trl']:.3f} s a step, "
        f"{factor:.2f} x (medians of {row['rounds']})",
        highlight=False,
    )
    if output:
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdaa.benchmarks.trl_trainers", description=__doc__.split("\n")[0]
    )
    add_arguments(parser)
    options = parser.parse_args(argv)
    for name in ("rounds", "completions", "layers", "hidden", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if options.completions % 2:
        parser.error(f"--completions: expected an even number, got {options.completions}")
    if options.length < 2 or options.vocab <= len(_SPECIAL):
        parser.error(f"expected --length above 1 and --vocab above {len(_SPECIAL)}, got "
                     f"{options.length} and {options.vocab}")  # fmt: skip
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
