"""Completions by vLLM in this process, with the policy's weights of the moment.

Thin, and not run on any machine of ours so far: the calls are those of vLLM's offline interface.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.online.generation import Sampling, check_sampling
from fastdaa.online.types import Completions
from fastdaa.train.adapters import is_adapted
from fastdaa.train.backbone import causal_lm


class VllmRollouts:
    """A :class:`~fastdaa.online.types.RolloutSource` by vLLM on the same GPU.

    The engine starts from ``path`` and gets the policy's weights before every call. Its log-probs
    are not used: policy and reference score what it wrote.

    Args:
        path: folder or hub id of the policy as it is at the start.
        sampling: how completions are drawn.
        memory: share of the GPU that the engine may use.
        options: further arguments of ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: a number out of range.
    """

    def __init__(
        self, path: str, sampling: Sampling, *, memory: float = 0.3, **options: Any
    ) -> None:
        check_sampling(sampling)
        # The engine has to live in this process: its weights are written from here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "rollouts: expected vllm, which is not installed; use transformers, or install it "
                "as its own documentation says"
            ) from error
        self.sampling = sampling
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=path, gpu_memory_utilization=memory, enable_prefix_caching=False, **options
        )

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        """One completion of every prompt. Every prompt has a seed of its own."""
        self._load(model)
        sampling = self.sampling
        # Not neighbours of `seed`, which are those of other iterations.
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
        settings = [
            self._vllm.SamplingParams(
                n=1, temperature=sampling.temperature, top_p=1.0, top_k=-1,
                max_tokens=sampling.max_new_tokens, seed=own,
                stop_token_ids=list(sampling.end_ids), ignore_eos=False,
            )
            for own in seeds
        ]  # fmt: skip
        asked = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        outputs = self._engine.generate(asked, settings, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        ids = [torch.tensor(list(answer.token_ids), dtype=torch.int64) for answer in answers]
        ended = [len(row) > 0 and int(row[-1]) in sampling.end_ids for row in ids]
        return Completions(ids, torch.tensor(ended, dtype=torch.bool))

    def _load(self, model: nn.Module) -> None:
        """The policy's weights into the engine; adapters are merged meanwhile."""
        runner: Any = self._engine.llm_engine.model_executor.driver_worker.model_runner
        if not is_adapted(model):
            runner.model.load_weights(iter(causal_lm(model).state_dict().items()))
            return
        peft: Any = model
        peft.merge_adapter()
        try:
            runner.model.load_weights(_merged(causal_lm(model)))
        finally:
            peft.unmerge_adapter()


def _merged(core: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names that they have without adapters."""
    for name, value in core.state_dict().items():
        if "lora_" not in name:
            yield name.replace(".base_layer", ""), value
