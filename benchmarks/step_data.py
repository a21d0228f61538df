"""Tokenizer, model and pairs of the step benchmark, as files that all contenders load."""

from __future__ import annotations

import argparse
import math
import random
from typing import Any


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
