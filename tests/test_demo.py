"""The demo: its world and gold score, its data, its tokenizer, its drawings, and a short run."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from rich.console import Console

from fastdaa.demo import report, world
from fastdaa.demo.make_pairs import (
    FLIPPED,
    PAIRS_FILE,
    Author,
    Dice,
    as_jsonl,
    make_pairs,
    read_pairs,
    write_answer,
)
from fastdaa.demo.world import gold_score, judge

BANANA = "Hello! What colour is a banana?"
FRUITS = "Name three fruits."
JUDGED = {
    "perfect": (BANANA, "Sure! A banana is yellow.", (1, 1, 1)),
    "other wording": (BANANA, "The colour of a banana is yellow. Have a nice day!", (1, 1, 1)),
    "curt": (BANANA, "A banana is yellow.", (1, 0.5, 1)),
    "wrong": (BANANA, "Sure! A banana is blue.", (0, 1, 1)),
    "about another thing": (BANANA, "Sure! A lemon is yellow.", (0, 1, 0.75)),
    "contradicts itself": (
        BANANA,
        "Sure! A banana is yellow. The colour of a banana is red.",
        (0, 1, 0.75),
    ),
    "rude": (BANANA, "Sure! A banana is yellow. Stop wasting my time.", (1, 0, 1)),
    "rambling": (BANANA, "Sure! A banana is yellow. But where was I?", (1, 1, 0.75)),
    "rambling on and on": (BANANA, "A banana is yellow." + 6 * " But where was I?", (1, 0.5, 0)),
    "gushing": (
        BANANA,
        "Sure! Of course! With pleasure! A banana is yellow.",
        (1, 0.5, 0.75),
    ),
    "unfinished": (BANANA, "Sure! A banana is yellow. But where", (1, 1, 0.75)),
    "empty": (BANANA, "", (0, 0.5, 1)),
    "list": (FRUITS, "Sure! Three fruits are plum, pear and apple.", (1, 1, 1)),
    "one too few": (FRUITS, "Sure! Three fruits are plum and apple.", (0, 1, 1)),
    "one twice": (FRUITS, "Sure! Three fruits are plum, pear and plum.", (0, 1, 1)),
    "no fruit": (FRUITS, "Sure! Three fruits are plum, pear and hammer.", (0, 1, 1)),
}


@pytest.mark.parametrize("prompt, answer, parts", JUDGED.values(), ids=JUDGED)
def test_verdicts(prompt, answer, parts):
    verdict = judge(prompt, answer)
    assert verdict == parts
    assert verdict.good == (parts == (1, 1, 1))
    assert gold_score(prompt, answer) == 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2]


def test_a_question_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="expected a question of the demo's world, got 'Why"):
        judge("Why is the sky blue?", "Sure!")


def test_every_question_has_a_perfect_answer_and_knows_it():
    perfect = Author(correct=1, courteous=1, rude=0, rambling=0)
    wrong = perfect._replace(correct=0)
    for prompt, question in world.prompts().items():
        answer = write_answer(question, perfect, Dice(0))
        assert judge(prompt, answer).good, (prompt, answer)
        assert not judge(prompt, write_answer(question, wrong, Dice(0))).correct


def test_no_two_questions_read_the_same():
    wordings = [g + w for q in world.questions() for g in world.GREETINGS for w in q.wordings]
    assert len(wordings) == len(set(wordings)) == len(world.prompts())


def test_the_shipped_pairs_are_what_the_script_makes():
    # The text, not the archive: builds of zlib compress the same text differently.
    assert gzip.decompress(PAIRS_FILE.read_bytes()) == as_jsonl(make_pairs())
    assert PAIRS_FILE.stat().st_size < 300_000


def test_labels_follow_the_gold_score_except_where_flipped():
    splits = read_pairs()
    train, held_out = splits["train"], splits["held_out"]
    for row in train + held_out:
        prompt = row["prompt"][0]["content"]
        chosen, rejected = (
            gold_score(prompt, row[s][0]["content"]) for s in ("chosen", "rejected")
        )
        assert (chosen < rejected) if row["flipped"] else (chosen > rejected)
    flipped = sum(row["flipped"] for row in train) / len(train)
    assert flipped == pytest.approx(FLIPPED, abs=0.02)
    assert not any(row["flipped"] for row in held_out)
    asked = {row["prompt"][0]["content"] for row in train}
    assert not asked & {row["prompt"][0]["content"] for row in held_out}


def test_tokenizer_keeps_text_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    from fastdaa.demo.tokenizer import END, PAD, VOCAB_SIZE, train_tokenizer

    rows = read_pairs()["train"]
    tokenizer = train_tokenizer(rows)
    assert len(tokenizer) <= VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": BANANA}, {"role": "assistant", "content": "Grüße, it is."}]
    for each in (tokenizer, again):
        ids = each.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert each.decode(ids) == each.apply_chat_template(chat, tokenize=False)
    assert len(tokenizer.tokenize(" banana")) == 1
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


@pytest.fixture(scope="module")
def small():
    """A tokenizer, tokenised pairs and an untrained model."""
    from datasets import Dataset

    from fastdaa.data import tokenize_pairs
    from fastdaa.demo import sft
    from fastdaa.demo.tokenizer import train_tokenizer

    rows = read_pairs()["train"]
    tokenizer = train_tokenizer(rows)
    sides = [{s: row[s] for s in ("prompt", "chosen", "rejected")} for row in rows[:32]]
    pairs, _ = tokenize_pairs(Dataset.from_list(sides), tokenizer)
    return tokenizer, pairs, sft.build_model(tokenizer)


def test_sft_loss_is_the_completions_cross_entropy(small):
    from fastdaa.demo import sft

    _, pairs, model = small
    batch = sft.sft_sequences(pairs)[:5]
    ids, positions, targets = sft._collate(batch)
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)[positions]
        ours = logps.gather(1, targets[:, None]).sum()
        alone = torch.stack(
            [
                model(input_ids=torch.tensor([tokens]), labels=_labels(tokens, prompt)).loss
                * (len(tokens) - prompt)
                for tokens, prompt in batch
            ]
        ).sum()
    assert -ours.item() == pytest.approx(alone.item(), rel=1e-5)


def _labels(tokens, prompt):
    return torch.tensor([[-100] * prompt + tokens[prompt:]])


def test_sft_learns_and_is_repeatable(small):
    import copy

    from fastdaa.demo import sft

    _, pairs, model = small
    logs = [
        sft.fine_tune(copy.deepcopy(model), sft.sft_sequences(pairs), epochs=3, batch_size=16)
        for _ in range(2)
    ]
    first, second = ([row["loss"] for row in log] for log in logs)
    assert first == second
    assert first[-1] < first[0] - 1


def test_evaluation_of_equal_models_finds_no_distance(small):
    from fastdaa.demo.evaluation import evaluate

    tokenizer, _, model = small
    first = evaluate(model, tokenizer, [BANANA, FRUITS], max_new_tokens=8)
    again = evaluate(
        model, tokenizer, [BANANA, FRUITS], max_new_tokens=8, ref_model=model,
        ref_scores=first["scores"],
    )  # fmt: skip
    assert again["answers"] == first["answers"]
    assert again["win_rate"] == 0.5
    assert again["kl"] == 0.0
    assert 1 <= again["length"] <= 8


def test_evaluation_measures_the_exact_divergence(small):
    """Against a row at a time, no padding, and token by token."""
    import copy

    from fastdaa.demo import evaluation

    tokenizer, _, model = small
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    ids, mask = evaluation._encode(tokenizer, [BANANA, FRUITS])
    answer = torch.arange(10, 22).reshape(2, 6)
    scored = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    kl = evaluation._kl(other, model, torch.cat([ids, answer], 1), mask, scored)
    total = 0.0
    for row, length in enumerate((6, 3)):
        prompt = ids[row, mask[row].bool()]
        text = torch.cat([prompt, answer[row, :length]])[None]
        with torch.no_grad():
            p, q = (m(input_ids=text).logits.log_softmax(-1)[0] for m in (other, model))
        start = len(prompt) - 1
        total += (p.exp() * (p - q))[start : start + length].sum().item()
    assert kl == pytest.approx(total / 2, rel=1e-4)


POLICIES = [
    {"name": "SFT", "gold": 0.72, "good": 0.41, "win_rate": 0.5, "kl": 0.0, "length": 17.2,
     "seconds": 31.0},
    {"name": "SLiC, beta 0.05", "gold": 0.913, "good": 0.8, "win_rate": 0.71, "kl": 14.2,
     "reward_accuracy": 0.93, "length": 14.0, "seconds": 19.6},
]  # fmt: skip


def test_the_table_shows_every_number_once():
    console = Console(width=80, record=True)
    console.print(report.results_table(POLICIES, {"device": "cpu (made up)", "torch": "9.9"}))
    text = console.export_text()
    slic = next(line for line in text.splitlines() if "SLiC" in line)
    assert slic.split()[3:] == ["0.913", "80%", "71%", "14.20", "93%", "14.0", "20"]
    assert "device cpu (made up), torch 9.9" in text
    sft = next(line for line in text.splitlines() if line.split()[:1] == ["SFT"])
    assert sft.split()[5] == "–"  # noqa: RUF001


def test_over_optimisation_is_told_only_where_there_is_some():
    best = POLICIES[1]
    far = best | {"name": "DPO, beta 0.01", "gold": 0.75, "kl": 8.4}
    assert report.over_optimisation(best, best) == ""
    text = report.over_optimisation(best, far)
    assert "DPO, beta 0.01 moved 8.4 nats" in text and "ranks 93%" in text and "0.750" in text


def test_examples_show_the_largest_gain_first():
    before = {"answers": ["bad", "so so"], "scores": [0.1, 0.5]}
    after = {"answers": ["fine", "good"], "scores": [0.2, 1.0]}
    console = Console(width=100, record=True)
    console.print(report.examples(["First?", "Second?"], before, after, "DPO", count=1))
    text = console.export_text()
    assert "Second?" in text and "good" in text
    assert "First?" not in text


def test_the_picture_is_drawn(tmp_path):
    from matplotlib.image import imread

    from fastdaa.demo.picture import draw

    path = draw(
        tmp_path / "demo.png",
        sft={"gold": 0.72},
        sft_log=[{"step": s, "loss": 5 / s} for s in range(1, 40)],
        trajectories={"DPO": [{"kl": 1.0, "gold": 0.8}, {"kl": 4.0, "gold": 0.9}], "IPO": []},
        logs={"DPO": [{"step": s, "accuracy": 0.5 + s / 100} for s in range(1, 40)], "IPO": []},
        caption="made up",
    )
    height, width, _ = imread(path).shape
    assert width > 1000 and height > 500


def test_smoothing_averages_the_past():
    from fastdaa.demo.picture import smooth

    assert smooth([2.0, 4.0, 6.0, 8.0], share=0.5) == [2.0, 3.0, 5.0, 7.0]


def test_a_glimpse_of_the_whole_demo(tmp_path):
    from fastdaa.demo.run import main

    results = main(tmp_path, losses=("slic",), fast=True)
    names = [policy["name"] for policy in results["policies"]]
    assert names == ["SFT", "SLiC, beta 0.2", "DPO, beta 0.01"]
    for name in ("demo.png", "results.json", "table.txt", "sft/model.safetensors",
                 "slic/model.safetensors"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "results.json").read_text())["policies"] == results["policies"]


def test_an_unknown_loss_is_refused_at_once(tmp_path):
    from fastdaa.demo.run import main

    with pytest.raises(ValueError, match="losses: expected some of dpo, ipo, slic, got 'ppo'"):
        main(tmp_path, losses=("ppo",))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_a_message(tmp_path, monkeypatch, capsys):
    from fastdaa.demo import run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run._Demo, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        run.main(tmp_path)
    assert stop.value.code == 130
    assert "Stopped" in capsys.readouterr().out
