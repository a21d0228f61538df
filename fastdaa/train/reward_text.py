"""What a reward model with a tokenizer of its own reads of a prompt and an answer."""

from __future__ import annotations

from typing import Any


def reward_ids(
    tokenizer: Any,
    prompt: str | list[dict[str, Any]],
    answer: str,
    *,
    finished: bool = True,
    joined: bool = False,
) -> list[int]:
    """Token ids as reward models are trained on.

    A chat template renders a conversation, or a text prompt as a user's turn. Without a template,
    prompt and answer are joined, with EOS behind them. An answer that was cut off ends with its own
    text, as one that is truncated in training does.

    Args:
        tokenizer: the reward model's.
        prompt: as in the data: text, or the messages of a conversation.
        finished: the answer was not cut off.
        joined: text prompts are joined with their answers, template or not.

    Raises:
        ValueError: a conversation and no chat template, or the template failed.
    """
    if isinstance(prompt, str) and (joined or tokenizer.chat_template is None):
        eos = tokenizer.eos_token or ""
        text = prompt + answer + ("" if not finished or answer.endswith(eos) else eos)
        return _tokens(tokenizer, text, add_special_tokens=True)
    if tokenizer.chat_template is None:
        raise ValueError(
            "expected a chat template in its tokenizer, since the prompts are conversations, got "
            "none"
        )
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [*turns, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        # A template is a program and can fail in any way.
        raise ValueError(f"its chat template failed: {first_line(error)}") from error
    if not finished:
        # Templates may strip what they write.
        shown = answer.rstrip()
        text = text[: text.rfind(shown) + len(shown)] if shown in text else text
    # The template has written its special tokens already.
    return _tokens(tokenizer, text, add_special_tokens=False)


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tokens(tokenizer: Any, text: str, **options: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return ids
