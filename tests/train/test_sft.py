"""Supervised fine-tuning: the loss of completions, forms of examples, evaluation, resuming."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from fastdaa.cli import main
from fastdaa.data import DataError, load_pairs, tokenize_pairs
from fastdaa.data.collate import SequenceCollator
from fastdaa.data.examples import EXAMPLES, PROMPTS, normalise_example
from fastdaa.data.rows import SequenceRows
from fastdaa.data.tokenise import tokenize_examples
from fastdaa.data.tokenise_prompts import tokenize_prompts
from fastdaa.data.validate import BadRow
from fastdaa.train.sft import SftTrainer
from fastdaa.train.stage_config import SftConfig

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
ASK = [{"role": "user", "content": "why"}]
ANSWER = [{"role": "assistant", "content": "good"}]


@pytest.fixture
def examples(pairs):
    def build(count=8, seed=0):
        return (
            pairs(count, seed)
            .rename_column("chosen_ids", "completion_ids")
            .remove_columns("rejected_ids")
        )

    return build


@pytest.fixture
def make_sft(tmp_path, tiny_model, examples):
    def make(model=None, data=None, eval_dataset=None, processing_class=None, **options):
        settings = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "train_sampling_strategy": "sequential", "use_cpu": True, **options,
        }  # fmt: skip
        return SftTrainer(
            tiny_model() if model is None else model, SftConfig(**settings),
            examples() if data is None else data, eval_dataset, processing_class,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "why", "good", "bad", "so"]
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT
    return fast


def naive_losses(model, rows):
    """Negative log-probs of the scored completion tokens, sequence by sequence."""
    losses = []
    for row in rows:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        losses.append(-logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(losses)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "packed"},
        {"layout": "padded"},
        {"layout": "packed", "tokens_per_pack": 16},
        {"layout": "packed", "impl": "recompute"},
        {"layout": "packed", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["packed", "padded", "several packs", "recompute", "accumulation"],
)
def test_loss_and_gradients_are_the_naive_ones(make_sft, tiny_model, examples, options):
    model = tiny_model()
    expected = naive_losses(model, examples().select(range(4))).mean()
    expected.backward()
    trainer = make_sft(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for (name, moved), parameter in zip(
        trainer.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(before[name] - moved, parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_is_a_mean_over_tokens_whatever_the_batches(make_sft, tiny_model, examples):
    data = examples(7, seed=3)
    expected = naive_losses(tiny_model().double(), data).mean().item()
    for size in (2, 4):
        trainer = make_sft(eval_dataset=data, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 <= metrics["eval_mean_token_accuracy"] <= 1
        assert metrics["eval_throughput/examples_per_second"] > 0


def test_learns_and_saves_an_ordinary_model(make_sft, tmp_path, examples):
    trainer = make_sft(max_steps=40, learning_rate=3e-2, per_device_train_batch_size=8)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    got, kept = (naive_losses(m.eval(), examples()).detach() for m in (again, trainer.model))
    torch.testing.assert_close(got, kept)


def test_a_resumed_run_ends_where_the_whole_one_does(make_sft, tmp_path):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = make_sft(**options)
    whole.train()
    again = make_sft(**options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


FORMS = [
    ({"prompt": "why", "completion": " good"}, "why", " good"),
    ({"prompt": "why", "chosen": " good", "rejected": " bad"}, "why", " good"),
    ({"chosen": "why good", "rejected": "why bad"}, "why", " good"),
    ({"text": "why good"}, "", "why good"),
    ({"prompt": ASK, "completion": ANSWER}, ASK, ANSWER),
    ({"messages": [*ASK, *ANSWER]}, ASK, ANSWER),
    ({"messages": [*ASK, *ANSWER, *ASK, *ANSWER]}, [*ASK, *ANSWER, *ASK], ANSWER),
]


@pytest.mark.parametrize(
    ("record", "prompt", "completion"), FORMS,
    ids=["text", "pair", "implicit prompt", "plain", "chat", "messages", "two turns"],
)  # fmt: skip
def test_forms_of_examples(record, prompt, completion):
    assert normalise_example(record) == {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "why"}, "expected 'prompt' and 'completion'"),
        ({"prompt": "why", "completion": ""}, "'completion': expected text"),
        ({"completion": "good"}, "'prompt': expected text or messages"),
        ({"prompt": "why", "completion": ANSWER}, "expected text as in 'prompt'"),
        ({"messages": ANSWER}, "expected a question and an answer"),
        ({"messages": [*ANSWER, *ASK]}, "expected a last message from 'assistant'"),
        ({"text": ""}, "'text': expected text"),
        ([], "expected an object"),
    ],
    ids=["prompt alone", "empty", "no prompt", "mixed", "one turn", "question", "no text", "list"],
)
def test_bad_examples(record, message):
    with pytest.raises(BadRow, match=message):
        normalise_example(record)


def test_chosen_sides_are_tokenised_as_in_preference_training(tokenizer):
    pair = {"prompt": ASK, "chosen": ANSWER, "rejected": [{**ANSWER[0], "content": "bad"}]}
    source = Dataset.from_list([pair] * 2)
    pairs, _ = tokenize_pairs(load_pairs(source), tokenizer)
    examples, report = tokenize_examples(EXAMPLES.load(source), tokenizer)
    assert examples["prompt_ids"] == pairs["prompt_ids"] == [[3, 5, 2, 4]] * 2
    assert examples["completion_ids"] == pairs["chosen_ids"] == [[6, 2]] * 2
    assert report.kept == 2
    prompts, left_out = tokenize_prompts(PROMPTS.load(source), tokenizer)
    assert [prompt.ids for prompt in prompts] == pairs["prompt_ids"] and not left_out
    assert prompts[0].text == ASK


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("keep_start", ([5, 5], [6])), ("keep_end", ([5], [6, 2])), (None, ([5, 5], [6, 2]))],
    ids=["keep_start", "keep_end", "no limit"],
)
def test_truncation(tokenizer, mode, expected):
    data = Dataset.from_list([{"prompt": "why why", "completion": " good"}])
    limit = {"max_length": 3, "truncation_mode": mode} if mode else {"max_length": None}
    tokens, report = tokenize_examples(data, tokenizer, **limit)
    assert (tokens[0]["prompt_ids"], tokens[0]["completion_ids"]) == expected
    assert report.truncated == (mode is not None)


def test_plain_text_scores_all_but_its_first_token(tokenizer):
    tokens, _ = tokenize_examples(Dataset.from_list([{"text": "why so good"}]), tokenizer)
    assert tokens[0] == {"prompt_ids": [], "completion_ids": [5, 8, 6, 2]}
    pack = SequenceCollator()([SequenceRows(tokens)[0]])["packs"][0]
    assert pack["targets"].tolist() == [8, 6, 2] and pack["rows"].tolist() == [0, 1, 2]


def test_long_prompts_are_left_out_and_counted(tokenizer):
    data = Dataset.from_list([{"prompt": "why why"}, {"prompt": "why"}])
    prompts, left_out = tokenize_prompts(data, tokenizer, max_length=1)
    assert [prompt.ids for prompt in prompts] == [[5]]
    assert dict(left_out) == {"prompts of more than 1 token": 1}
    with pytest.raises(DataError, match="expected at least one prompt"):
        tokenize_prompts(data.select([0]), tokenizer, max_length=1)


def test_conversations_want_a_template(tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    data = Dataset.from_list([{"prompt": ASK, "completion": ANSWER}])
    with pytest.raises(DataError, match="expected a chat template"):
        tokenize_examples(data, plain)
    with pytest.raises(DataError, match="expected an EOS token"):
        tokenize_examples(Dataset.from_list([{"text": "why"}]), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "prefix_shared"}, "layout: expected one of"),
        ({"tokens_per_pack": 0}, "tokens_per_pack"),
        ({"data": Dataset.from_list([{"prompt_ids": [1], "completion_ids": [61]}])}, "below 61"),
        ({"data": Dataset.from_list([{"text": "why"}])}, "a tokenizer for its text"),
    ],
    ids=["layout", "budget", "token", "tokenizer"],
)
def test_errors_before_training(make_sft, options, message):
    with pytest.raises(ValueError, match=message):
        make_sft(**options)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "LoRA"])
def test_generation_ends_where_answers_do(tokenizer, tiny_model, tmp_path, capsys, peft):
    """A base model ends text with another token, behind which its answers would go on."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<s>", unk_token="<unk>", extra_special_tokens=["</s>"], chat_template=CHAT,
    )  # fmt: skip
    fast.save_pretrained(tmp_path / "base")
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "base")
    rows = [json.dumps({"prompt": ASK, "completion": ANSWER}), json.dumps({"text": "why"})]
    for name, row, ends in (("chats", rows[0], [1, 2]), ("texts", rows[1], 1)):
        (tmp_path / f"{name}.jsonl").write_text(row)
        argv = ["--use_cpu", "--max_steps=1", f"--dataset={tmp_path / name}.jsonl"]
        argv += ["--save_strategy=no", f"--model={tmp_path / 'base'}", f"--use_peft={peft}"]
        assert main(["sft", *argv, f"--output_dir={tmp_path / 'out' / name}"]) == 0
        said = capsys.readouterr().err
        assert ("answers end with '</s>'" in said) == (name == "chats")
        assert ("stop_token_ids=[2]" in said) == (name == "chats" and peft)
        if not peft:
            saved = GenerationConfig.from_pretrained(tmp_path / "out" / name)
            assert saved.eos_token_id == ends


def test_packs_repeated_for_other_ranks_do_not_count_in_an_evaluation(
    make_sft, examples, monkeypatch
):
    trainer = make_sft(eval_dataset=examples(5, seed=3), tokens_per_pack=20)
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    before = trainer.evaluate()
    monkeypatch.setattr(trainer, "_evened", lambda packs: [*packs, packs[0]])
    after = trainer.evaluate()
    assert [after[name] for name in names] == pytest.approx([before[name] for name in names])
