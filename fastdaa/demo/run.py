"""The demo: tokenizer, small Llama, SFT, alignment by several losses, a table and a picture."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.demo import report, sft
from fastdaa.demo.align import align
from fastdaa.demo.evaluation import evaluate
from fastdaa.demo.make_pairs import read_pairs
from fastdaa.demo.recipes import FAST, RECIPES, TOO_FAR, Recipe, Size
from fastdaa.demo.terminal import progress_bars, without_transformers_bars

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from rich.console import Console
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def main(
    output_dir: str | Path,
    losses: Sequence[str] = ("dpo", "ipo", "slic"),
    seed: int = 0,
    fast: bool = False,
    too_far: bool = True,
) -> dict[str, Any]:
    """Runs the demo on one thread of the CPU and writes everything below ``output_dir``.

    Args:
        output_dir: gets ``sft/`` and a folder for every policy (models with their tokenizer),
            ``results.json``, ``table.txt`` and ``demo.png``.
        losses: any of ``RECIPES``.
        seed: of weights, order and sampling.
        fast: a glimpse in seconds, whose numbers mean nothing.
        too_far: also train a policy that over-optimises, in the folder ``too_far/``.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a loss that has no recipe.
        SystemExit: with code 130 after Ctrl-C.
    """
    import torch
    from rich.console import Console

    for loss in losses:
        if loss not in RECIPES:
            raise ValueError(f"losses: expected some of {', '.join(RECIPES)}, got {loss!r}")
    console = Console()
    output = Path(output_dir)
    recipes = {loss: RECIPES[loss] for loss in losses}
    if too_far:
        recipes["too_far"] = TOO_FAR
    threads = torch.get_num_threads()
    # The model is too small for more: a second thread saves a third of the time on idle cores, and
    # multiplies it on busy ones. Besides, one thread gives the same numbers whatever the cores.
    torch.set_num_threads(1)
    try:
        with without_transformers_bars():
            return _Demo(output, seed, FAST if fast else Size(), console).run(recipes)
    except KeyboardInterrupt:
        console.print(f"\n[bold]Stopped.[/] Finished models, if any, are in {output}.")
        raise SystemExit(130) from None
    finally:
        torch.set_num_threads(threads)


class _Demo:
    """State that the stages share."""

    def __init__(self, output: Path, seed: int, size: Size, console: Console) -> None:
        self.start = time.perf_counter()
        self.output, self.seed, self.size, self.console = output, seed, size, console
        self.policies: list[dict[str, Any]] = []
        self.trajectories: dict[str, list[dict[str, float]]] = {}
        self.logs: dict[str, list[dict[str, float]]] = {}
        self.answers: dict[str, dict[str, Any]] = {}

    def run(self, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
        """All stages in their order."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.stages = 3 + len(recipes)
        self._read_data()
        model = self._fine_tune()
        for number, (folder, recipe) in enumerate(recipes.items(), 3):
            self._align(number, recipe, folder, model)
        return self._finish()

    def _say(self, number: int, text: str) -> None:
        seconds = time.perf_counter() - self.start
        self.console.print(f"[bold]\\[{number}/{self.stages}][/] {text} [dim]({seconds:.0f} s)[/]")

    def _read_data(self) -> None:
        from datasets import Dataset

        from fastdaa.data import tokenize_pairs
        from fastdaa.demo.tokenizer import train_tokenizer

        splits = read_pairs()
        rows, held_out = splits["train"][: self.size.train_pairs], splits["held_out"]
        held_out = held_out[: self.size.prompts]
        self.tokenizer = train_tokenizer(splits["train"])
        self._say(
            1,
            f"{len(rows):,} pairs to train on, {len(held_out)} held out; "
            f"a tokenizer of {len(self.tokenizer):,} tokens",
        )
        self.prompts = [row["prompt"][0]["content"] for row in held_out]
        train, _ = tokenize_pairs(Dataset.from_list(_sides(rows)), self.tokenizer)
        self.train_pairs: Dataset = train
        self.held_out_pairs, _ = tokenize_pairs(Dataset.from_list(_sides(held_out)), self.tokenizer)

    def _fine_tune(self) -> LlamaForCausalLM:
        model = sft.build_model(self.tokenizer, self.seed)
        size = f"{model.num_parameters() / 1e6:.2f}M parameters"
        self._say(2, f"a Llama of {size} from scratch, fine-tuned on all answers, good and bad")
        with progress_bars(self.console) as progress:
            bar = progress.add_task("SFT", total=None, note="")

            def on_step(step: int, steps: int, loss: float) -> None:
                progress.update(bar, completed=step, total=steps, note=f"loss {loss:.2f}")

            self.sft_log = sft.fine_tune(
                model,
                sft.sft_sequences(self.train_pairs),
                epochs=self.size.sft_epochs,
                seed=self.seed,
                on_step=on_step,
            )
        _save(model, self.tokenizer, self.output / "sft")
        result = self._evaluate(model, None)
        self.answers["SFT"] = result
        self._add("SFT", result, seconds=self.sft_log[-1]["seconds"], win_rate=0.5, kl=0.0)
        return model

    def _evaluate(
        self, model: LlamaForCausalLM, reference: LlamaForCausalLM | None
    ) -> dict[str, Any]:
        # The same prompts, but other random numbers than SFT's: ties would be correlated.
        sft_answers = self.answers.get("SFT", {})
        return evaluate(
            model,
            self.tokenizer,
            self.prompts,
            ref_model=reference,
            ref_scores=sft_answers.get("scores"),
            seed=self.seed + (reference is not None),
        )

    def _align(self, number: int, recipe: Recipe, folder: str, model: LlamaForCausalLM) -> None:
        """Trains one policy from the SFT model, looking at it now and then."""
        name = recipe.name
        note = " (too far, on purpose)" if recipe is TOO_FAR else ""
        self._say(number, f"{name}{note}: from the SFT model, which is also the reference")
        policy = copy.deepcopy(model)
        points: list[dict[str, float]] = []
        results: list[dict[str, Any]] = []

        def look(weights: dict[str, torch.Tensor], step: int) -> str:
            # A plain copy generates: the policy itself has the trainer's attention.
            snapshot = copy.deepcopy(model)
            snapshot.load_state_dict(weights)
            results[:] = [self._evaluate(snapshot, model)]
            points.append({"step": step, "kl": results[0]["kl"], "gold": results[0]["gold"]})
            return f"gold {results[0]['gold']:.2f}"

        with progress_bars(self.console) as progress:
            outcome = align(
                policy,
                self.tokenizer,
                self.train_pairs,
                self.held_out_pairs,
                recipe,
                self.size,
                look=look,
                seed=self.seed,
                output_dir=self.output / folder,
                progress=progress,
            )
        policy_weights = copy.deepcopy(model)
        policy_weights.load_state_dict(policy.state_dict())
        _save(policy_weights, self.tokenizer, self.output / folder)
        self.answers[name] = results[0]
        self.trajectories[name], self.logs[name] = points, outcome["log"]
        self._add(
            name,
            results[0],
            seconds=outcome["seconds"],
            reward_accuracy=outcome["reward_accuracy"],
        )

    def _add(self, name: str, result: dict[str, Any], **more: float) -> None:
        numbers = {key: value for key, value in result.items() if isinstance(value, float)}
        self.policies.append({"name": name, **numbers, **more})

    def _finish(self) -> dict[str, Any]:
        from fastdaa.demo.picture import draw

        self._say(self.stages, "table and picture")
        environment = report.describe_environment()
        table = report.results_table(self.policies, environment)
        self.console.print(table)
        aligned = self.policies[1:]
        if aligned:
            best = max(aligned, key=lambda policy: policy["gold"])
            before, after = self.answers["SFT"], self.answers[best["name"]]
            self.console.print(report.examples(self.prompts, before, after, best["name"]))
            self.console.print(report.over_optimisation(best, aligned[-1]))
        picture = draw(
            self.output / "demo.png",
            sft=self.policies[0],
            sft_log=self.sft_log,
            trajectories=self.trajectories,
            logs=self.logs,
            caption=", ".join(f"{name} {value}" for name, value in environment.items()),
        )
        results = {
            "policies": self.policies,
            "trajectories": self.trajectories,
            "logs": self.logs,
            "sft_log": self.sft_log,
            "environment": environment,
            "seconds": time.perf_counter() - self.start,
        }
        (self.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        report.write_table(self.output / "table.txt", table)
        self.console.print(f"picture: {picture}", soft_wrap=True)
        self.console.print(f"models, results.json, table.txt: {self.output}", soft_wrap=True)
        self.console.print(f"everything took {results['seconds']:.0f} s")
        return results


def _sides(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows]


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
