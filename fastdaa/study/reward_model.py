"""A reward model trained on preference pairs, and its reward of every response.

Bradley-Terry: ``-log sigmoid(r(chosen) - r(rejected))``. The reward is a linear function of the
hidden state at a response's last token. Pairs go through the backbone as they do in preference
training: packed, with the prompt of a pair computed once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from fastdaa.data import PairCollator
from fastdaa.study.language import Language
from fastdaa.study.preferences import Pairs, as_dataset
from fastdaa.study.world import World
from fastdaa.train.attention import enable_segments
from fastdaa.train.backbone import backbone_of, install_head_task, run_head_task
from fastdaa.train.reward_models import last_tokens


class RewardModel(nn.Module):
    """A causal language model whose head is replaced by one number.

    Args:
        model: starting point of the backbone; it is copied.
        seed: of the initial weights of the reward.
    """

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        enable_segments(self.model)
        install_head_task(self.model)
        # Its own logits are never computed.
        self.model.get_output_embeddings().requires_grad_(False)
        width = self.model.config.hidden_size
        self.score = nn.Linear(width, 1, bias=False)
        # Hidden states are normalised, so the weights bound the reward: from zero, with Adam's
        # small steps, it would saturate and nothing could be told apart at the top.
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.score.weight, std=width**-0.5, generator=generator)

    def forward(self, pack: dict[str, Any]) -> Tensor:
        """Rewards ``[S]`` of the sequences of a pack, chosen and rejected in turn."""
        last = last_tokens(pack)
        return run_head_task(
            self.model, pack, lambda hidden: self.score(hidden[0, last]).squeeze(-1)
        ).result


def train_reward_model(
    model: Any, world: World, pairs: Pairs, seed: int, *, epochs: int = 1
) -> RewardModel:
    """A reward model from ``model``, by Adam on batches of 16 pairs.

    The learning rate rises linearly to 1e-3 over 5 % of the steps, and then falls linearly.

    Args:
        seed: of the reward's initial weights and the order of the pairs.
    """
    reward_model = RewardModel(model, seed).train()
    rows = [{"row_id": number, **row} for number, row in enumerate(as_dataset(world, pairs))]
    collate = PairCollator("prefix_shared")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(epochs)]
    batches = [batch for order in orders for batch in order.split(16)]
    steps, warm_up = len(batches), max(1, len(batches) // 20)
    trained = [p for p in reward_model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    for batch in batches:
        (pack,) = collate([rows[number] for number in batch.tolist()])["packs"]
        rewards = reward_model(pack)
        loss = -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return reward_model.eval()


@torch.no_grad()
def response_rewards(reward_model: RewardModel, world: World) -> Tensor:
    """The reward of all responses to all prompts: fp64 ``[P, R]``.

    One walk over the tree of prefixes, as for log-probs, with one more token read at the end of
    each response.
    """
    reward_model.eval()
    language = world.language
    parts: list[Tensor] = []
    reader = _Reader(reward_model, language)
    for level in range(language.longest):
        parts.append(reader.peek(language.eos))
        if level + 1 < language.longest:
            reader.descend()
    content = range(language.prompts, language.prompts + language.tokens)
    # The longest responses end with a content token. One token at a time: they are the most.
    whole = torch.stack([reader.peek(token) for token in content], dim=-1)
    return torch.cat([*parts, whole.flatten(1)], dim=1).double()


class _Reader:
    """Keys and values of all prefixes of one length."""

    def __init__(self, reward_model: RewardModel, language: Language) -> None:
        self.language, self.score = language, reward_model.score
        self.backbone: Any = backbone_of(reward_model.model)
        self.cache = DynamicCache(config=reward_model.model.config)
        self.sequences = language.prompts
        self._read(torch.arange(language.prompts)[:, None])

    def descend(self) -> None:
        """From every prefix to its continuations by one token."""
        language = self.language
        self.cache.batch_repeat_interleave(language.tokens)
        content = torch.arange(language.prompts, language.prompts + language.tokens)
        self._read(content.repeat(self.sequences)[:, None])
        self.sequences *= language.tokens

    def peek(self, token: int) -> Tensor:
        """Rewards ``[P, prefixes]`` with ``token`` at the end of each prefix."""
        hidden = self._read(torch.full((self.sequences, 1), token))
        self.cache.crop(-1)
        return self.score(hidden[:, -1]).view(self.language.prompts, -1)

    def _read(self, ids: Tensor) -> Tensor:
        output = self.backbone(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state
