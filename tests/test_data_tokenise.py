"""Tokenisation conventions on tokenizers small enough to check by hand."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from fastdaa.data import DataError, PairCollator, PairRows, tokenize_pairs
from fastdaa.data.encode import split_sequences
from fastdaa.data.reports import TokenizeReport
from fastdaa.data.tokenise import tokenize_examples
from fastdaa.data.tokenise_prompts import tokenize_prompts

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
REFUSES_BAD = (
    "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no!') }}{% endif %}" + CHATML
)


def make_tokenizer(*, merges=(), bos=False, eos="<e>", template=CHATML):
    """One token a character, and one for each of ``merges`` (pairs of characters)."""
    special = ["<e>", "<b>", "<u>", "<a>", "<s>"]
    alphabet = "abcdefghijklmnopqrstuvwxyz .?{}\":'[]_0123456789,"
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    for merge in merges:
        vocabulary[merge] = len(vocabulary)
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", vocabulary["<b>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template
    )


def tokenized(tokenizer, rows: list[dict], **options) -> list[tuple[str, str, str]]:
    """The pairs, decoded token by token, with ``|`` between tokens."""
    result, _ = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, **options)
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        tuple("|".join(tokenizer.convert_ids_to_tokens(row[field])) for field in fields)
        for row in result
    ]


def text(prompt="pq", chosen="ab", rejected="cd", **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(prompt="pq", chosen="ab", rejected="cd", **more) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def test_text_gets_eos_unless_it_ends_with_it() -> None:
    rows = [text("p", "a", "b<e>"), text("p", "<e>a", "b")]
    assert tokenized(make_tokenizer(), rows) == [
        ("p", "a|<e>", "b|<e>"),
        ("p", "<e>|a|<e>", "b|<e>"),
    ]


def test_bos_comes_from_the_tokenizer() -> None:
    assert tokenized(make_tokenizer(bos=True), [text("p", "a", "b"), text("", "a", "b")]) == [
        ("<b>|p", "a|<e>", "b|<e>"),
        ("<b>", "a|<e>", "b|<e>"),
    ]


LOOPS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for b in m['content'] %}{{ b['text'] }}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [(CHATML, "<u>|p|\n|q|<e>|<a>"), (LOOPS, "<u>|p|q|<e>|<a>")],
    ids=["text only", "blocks"],
)
def test_text_blocks_are_text_where_the_template_has_no_blocks(template: str, prompt: str) -> None:
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["\n"])
    blocks = [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]
    row = chat(blocks, blocks[:1], blocks[1:])
    assert tokenized(tokenizer, [row]) == [(prompt, "p|<e>", "q|<e>")]


def test_chats_get_the_template_and_nothing_else() -> None:
    assert tokenized(make_tokenizer(bos=True), [chat("p", "a", "b")]) == [
        ("<u>|p|<e>|<a>", "a|<e>", "b|<e>")
    ]


def test_answers_that_hold_the_prompt_are_a_warning(caplog) -> None:
    rows = [text(), text(chosen="pqab", rejected="pqcd"), text(chosen="pqab")]
    tokenized(make_tokenizer(), rows)
    assert "In 1 of 3 pairs both answers begin with the prompt once more" in caplog.text
    assert "(the first: dataset: row 2)" in caplog.text
    caplog.clear()
    asked = {"role": "user", "content": "pq"}
    pair = chat()
    twice = {side: [asked, *pair[side]] for side in ("chosen", "rejected")}
    tokenized(make_tokenizer(), [{**pair, **twice}])
    assert "In 1 of 1 pair both answers" in caplog.text
    caplog.clear()
    tokenized(make_tokenizer(), [{**twice, "prompt": "pq"}])
    tokenized(make_tokenizer(), [twice])
    tokenized(make_tokenizer(), [text(prompt="")])
    assert "once more" not in caplog.text


def test_tokens_that_merge_across_the_boundary_move_it_for_both_sides() -> None:
    tokenizer = make_tokenizer(merges=["qa"])
    rows = [text("pq", "ab", "cd"), text("pq", "cd", "ab"), text("pq", "cc", "cd")]
    assert tokenized(tokenizer, rows) == [
        ("p", "qa|b|<e>", "q|c|d|<e>"),
        ("p", "q|c|d|<e>", "qa|b|<e>"),
        ("p|q", "c|c|<e>", "c|d|<e>"),
    ]
    _, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer)
    assert report.shortened_prompts == 2
    assert "2 prompts end where their completions' tokens diverge" in str(report)


def test_a_template_that_writes_the_prompt_differently_alone() -> None:
    template = CHATML.replace("<a>{% endif", "<a>.{% endif")
    assert tokenized(make_tokenizer(template=template), [chat("p", "a", "b")]) == [
        ("<u>|p|<e>|<a>", "a|<e>", "b|<e>")
    ]


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "x"}}]}


def test_an_answer_whose_tool_calls_the_template_leaves_out_is_a_bad_row() -> None:
    """Or an empty answer would be learnt."""
    called = {**chat("p", "a", "b"), "chosen": [CALLED]}
    rows = datasets.Dataset.from_list([chat("p", "a", "b"), called])
    with pytest.raises(DataError, match="row 2: expected a chat template with tool calls"):
        tokenize_pairs(rows, make_tokenizer())
    _, report = tokenize_pairs(rows, make_tokenizer(), on_bad_row="skip")
    assert report.kept == 1 and report.dropped == {"tool calls left out": 1}
    shown = CHATML.replace("{{ m['content'] }}", "{{ m.content or m.tool_calls[0].function.name }}")
    assert tokenized(make_tokenizer(template=shown), [called])[0][1] == "x|<e>"
    # Only where there is no content: a first row that has both decides nothing.
    both = {**called, "chosen": [{**called["chosen"][0], "content": "words"}]}
    found = tokenized(make_tokenizer(template=shown), [both, called])
    assert [row[1] for row in found] == ["w|o|r|d|s|<e>", "x|<e>"]


def test_a_second_beginning_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Of text that a chat template was put around before."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.bos_token = "<b>"
    rows = [text("<b>pq"), text("pq"), text("<b>pq")]
    assert tokenized(tokenizer, rows)[0][0] == "<b>|<b>|p|q"
    assert "In 2 of 3 pairs the text begins with '<b>', which the tokenizer" in caplog.text
    caplog.clear()
    tokenized(tokenizer, [text("pq")])
    assert not caplog.text


def test_arguments_stay_json_text_where_the_template_writes_them_as_they_are() -> None:
    template = CHATML.replace("m['content']", "m.content or m.tool_calls[0].function.arguments")
    function = {"name": "x", "arguments": '{"a":1}'}
    called = {**CALLED, "tool_calls": [{"function": function}]}
    rows = [{**chat("p", "a", "b"), "chosen": [called]}]
    assert tokenized(make_tokenizer(template=template), rows)[0][1].replace("|", "") == (
        '{"a":1}<e>'
    )


@pytest.mark.parametrize("strings_alone", [False, True])
def test_arguments_of_calls_in_json_text_are_read(strings_alone: bool) -> None:
    """OpenAI's form; most templates write an object, and would quote the text once more."""
    call = "m.tool_calls[0].function.arguments"
    shown = f"{call} + '.'" if strings_alone else f"{call} | tojson"
    template = CHATML.replace("m['content']", f"m.content or {shown}")
    for given in ('{"a":1}', {"a": 1}):
        called = {**CALLED, "tool_calls": [{"function": {"name": "x", "arguments": given}}]}
        rows = [{**chat("p", "a", "b"), "chosen": [called]}]
        if strings_alone and isinstance(given, dict):
            with pytest.raises(DataError, match="chat template accepts"):
                tokenized(make_tokenizer(template=template), rows)
            continue
        said = tokenized(make_tokenizer(template=template), rows)[0][1].replace("|", "")
        assert said == ('{"a":1}.<e>' if strings_alone else '{"a": 1}<e>')
        assert called["tool_calls"][0]["function"]["arguments"] == given


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


TALK = [turn("assistant", "a"), turn("user", "b"), turn("tool", "c"), turn("assistant", "d")]


def test_turns_of_others_in_an_answer_are_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [chat("p", "a", "b"), {**chat("p", "a", "b"), "rejected": TALK}]
    assert tokenized(make_tokenizer(), rows)[1][2] == "a|<e>|<u>|b|<e>|t|c|<e>|<a>|d|<e>"
    said = "In 1 of 2 pairs an answer holds turns of others than the model (the first: dataset: row"
    assert f"{said} 2)" in caplog.text
    caplog.clear()
    tokenized(make_tokenizer(), rows[:1])
    assert not caplog.text


def test_with_every_answer_the_turns_of_others_are_not_learnt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = datasets.Dataset.from_list([{"prompt": [turn("user", "p")], "completion": TALK}])
    tokenizer = make_tokenizer()
    assert len(tokenize_examples(rows, tokenizer)[0]) == 1
    assert "every_answer" in caplog.text
    caplog.clear()
    found, report = tokenize_examples(rows, tokenizer, every_answer=True)
    answers = [tokenizer.convert_ids_to_tokens(row["completion_ids"]) for row in found]
    assert answers == [["a", "<e>"], ["d", "<e>"]]
    assert report.kept == report.pairs == 2 and not caplog.text


def test_tools_and_template_options_are_honoured_row_by_row() -> None:
    template = (
        "{% if tools %}{% for t in tools %}{{ t['name'] }}{% endfor %}{% endif %}"
        "{% if shout %}<s>{% endif %}" + CHATML
    )
    rows = [
        chat("p", "a", "b", tools='[{"name": "x"}]', chat_template_kwargs={"shout": True}),
        chat("p", "a", "b", tools=None, chat_template_kwargs={"shout": False}),
        chat("p", "a", "b", tools='[{"name": "y"}]', chat_template_kwargs=None),
    ]
    assert [row[0] for row in tokenized(make_tokenizer(template=template), rows)] == [
        "x|<s>|<u>|p|<e>|<a>",
        "<u>|p|<e>|<a>",
        "y|<u>|p|<e>|<a>",
    ]


def test_implicit_prompts_and_columns_of_others() -> None:
    rows = [{"chosen": "pq ab", "rejected": "pq cd", "prompt_ids": [1]}]
    assert tokenized(make_tokenizer(), rows) == [("p|q", " |a|b|<e>", " |c|d|<e>")]


def test_keep_start_cuts_completions_and_drops_long_prompts() -> None:
    rows = [text("pq", "abc", "d"), text("pqrs", "a", "b"), text("pqr", "abc", "abd")]
    tokenizer = make_tokenizer()
    assert tokenized(tokenizer, rows, max_length=4) == [
        ("p|q", "a|b", "d|<e>"),
        ("p|q|r", "a", "a"),
    ]
    _, report = tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, max_length=4)
    assert (report.pairs, report.kept, report.truncated, report.identical) == (3, 2, 3, 1)
    assert report.dropped == {"prompts of max_length tokens or more": 1}
    assert report.prompt_tokens == {"p50": 2, "p90": 2, "p99": 2, "max": 3}
    assert report.completion_tokens == {"p50": 1, "p90": 2, "p99": 2, "max": 2}
    assert report.total_tokens == 2 + 2 + 2 + 3 + 1 + 1
    assert str(report).splitlines()[0] == (
        "2 of 3 pairs kept, 1 left out: 1 prompt of max_length tokens or more; "
        "3 sequences truncated; 1 pair identical after truncation"
    )


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected", "skips"),
    [
        (text("pqr", "a", "b"), "q|r", "a|<e>", "b|<e>", (0, 0)),
        (text("pqr", "a", "bc"), "q|r", "a|<e>", "b|c|<e>", (0, 1)),
        (text("pq", "abcdef", "b"), "p|q", "d|e|f|<e>", "b|<e>", (2, 0)),
        (text("pqrs", "abcdef", "bcdefgh"), "", "d|e|f|<e>", "f|g|h|<e>", (0, 0)),
        (text("p", "a", "b"), "p", "a|<e>", "b|<e>", (0, 0)),
    ],
    ids=["same", "longer rejected", "chosen loses the prompt", "both lose it", "fits"],
)
def test_keep_end_cuts_every_sequence_by_itself(row, prompt, chosen, rejected, skips) -> None:
    tokenizer = make_tokenizer()
    options = {"max_length": 4, "truncation_mode": "keep_end"}
    assert tokenized(tokenizer, [row], **options) == [(prompt, chosen, rejected)]
    result, _ = tokenize_pairs(datasets.Dataset.from_list([row]), tokenizer, **options)
    assert (result[0]["chosen_skip"], result[0]["rejected_skip"]) == skips


def test_no_limit() -> None:
    rows = [text("p" * 2000, "a", "b")]
    result, report = tokenize_pairs(
        datasets.Dataset.from_list(rows), make_tokenizer(), max_length=None
    )
    assert len(result[0]["prompt_ids"]) == 2000
    assert report.truncated == 0


def test_completions_without_a_token_are_dropped() -> None:
    template = "{{ messages[0]['content'] }}"
    rows = [chat("p", "a", "b")]
    with pytest.raises(
        DataError, match=r"none .0 of 1 pair kept, 1 left out: 1 completion without"
    ):
        tokenized(make_tokenizer(template=template), rows)


@pytest.mark.slow
def test_several_processes_give_the_same_rows() -> None:
    rows = [text("p" * (i % 7), "a" * (i % 5 + 1), "b") for i in range(600)]
    dataset, tokenizer = datasets.Dataset.from_list(rows), make_tokenizer()
    alone, report = tokenize_pairs(dataset, tokenizer)
    together, other = tokenize_pairs(dataset, tokenizer, num_proc=2)
    assert alone.to_list() == together.to_list()
    assert report == other


def test_the_dataset_is_in_memory_and_typed() -> None:
    result, _ = tokenize_pairs(datasets.Dataset.from_list([text()]), make_tokenizer())
    assert result.cache_files == []
    assert result.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert result.features["chosen_ids"] == datasets.List(datasets.Value("int32"))


def test_more_tokens_than_offsets_can_address_come_in_chunks(monkeypatch) -> None:
    rows = [text("p" * n, "a", "b" * (n + 3)) for n in (1, 2, 6, 1, 1)]
    dataset, tokenizer = datasets.Dataset.from_list(rows), make_tokenizer()
    whole, _ = tokenize_pairs(dataset, tokenizer)
    monkeypatch.setattr("fastdaa.data.columns._TOKENS_PER_CHUNK", 3)
    parts, _ = tokenize_pairs(dataset, tokenizer)
    assert parts.to_list() == whole.to_list()
    chunks = parts.data.column("prompt_ids").chunks
    # A row is never cut, however long it is.
    assert [chunk.value_lengths().to_pylist() for chunk in chunks] == [[1, 2], [6], [1, 1]]


def test_conversations_without_a_template_are_refused_before_any_work() -> None:
    tokenizer = make_tokenizer(template=None)
    with pytest.raises(DataError, match=r"tokenizer: expected a chat template, .* got none"):
        tokenize_pairs(datasets.Dataset.from_list([chat()]), tokenizer)


def test_text_without_an_eos_token_is_refused_but_chats_are_not() -> None:
    tokenizer = make_tokenizer(eos=None)
    with pytest.raises(DataError, match=r"tokenizer: expected an EOS token, .* got none"):
        tokenize_pairs(datasets.Dataset.from_list([text()]), tokenizer)
    assert len(tokenized(tokenizer, [chat()])) == 1


def test_an_empty_dataset() -> None:
    with pytest.raises(DataError, match="dataset: expected at least one pair, got none"):
        tokenize_pairs(datasets.Dataset.from_list([text()]).select([]), make_tokenizer())


def test_prompts_that_cannot_be_asked_are_counted() -> None:
    chats = datasets.Dataset.from_list([chat("bad"), chat("p")])
    tokenizer = make_tokenizer(template=REFUSES_BAD)
    prompts, left_out = tokenize_prompts(chats, tokenizer, on_bad_row="skip")
    assert [tokenizer.convert_ids_to_tokens(prompt.ids) for prompt in prompts] == [
        ["<u>", "p", "<e>", "<a>"]
    ]
    assert left_out == {"chat template failed": 1}
    with pytest.raises(DataError, match="row 1: expected a prompt that the chat template accepts"):
        tokenize_prompts(chats, tokenizer)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Strip()
    texts = datasets.Dataset.from_list([text(" "), text("p")])
    prompts, left_out = tokenize_prompts(texts, tokenizer)
    assert [prompt.text for prompt in prompts] == ["p"]
    assert left_out == {"prompts without a token": 1}


def test_bad_rows_of_a_dataset_made_elsewhere() -> None:
    dataset = datasets.Dataset.from_list([text(), text(chosen="cd"), text()])
    with pytest.raises(DataError, match=r"^dataset: row 2: field 'rejected': expected another"):
        tokenize_pairs(dataset, make_tokenizer())
    result, report = tokenize_pairs(dataset, make_tokenizer(), on_bad_row="skip")
    assert len(result) == report.kept == 2
    assert report.dropped == {"chosen equals rejected": 1}
    assert "(first: dataset: row 2: field 'rejected'" in str(report)


def test_a_conversation_that_the_template_refuses_is_found() -> None:
    dataset = datasets.Dataset.from_list([chat("p"), chat("bad"), chat("q")])
    tokenizer = make_tokenizer(template=REFUSES_BAD)
    message = "dataset: row 2: expected a conversation that the chat template accepts, got "
    with pytest.raises(
        DataError, match="^" + re.escape(message) + r"TemplateError: no! \(on_bad_row"
    ):
        tokenize_pairs(dataset, tokenizer)
    result, report = tokenize_pairs(dataset, tokenizer, on_bad_row="skip")
    assert len(result) == 2
    assert report.dropped == {"chat template failed": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode: expected one of .* got 'middle'"),
        ({"max_length": 0}, "max_length: expected .* above 0, got 0"),
        ({"num_proc": 0}, "num_proc: expected .* above 0, got 0"),
        ({"on_bad_row": "log"}, "on_bad_row: expected one of .* got 'log'"),
    ],
    ids=["truncation_mode", "max_length", "num_proc", "on_bad_row"],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(datasets.Dataset.from_list([text()]), make_tokenizer(), **options)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "split"),
    [
        ([1, 2], [1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 5, 3], [1, 2, 4], 1),
        ([1, 2], [1], [1, 2, 4], 1),
        ([1, 2], [7], [1, 2], 0),
        ([], [1], [2], 0),
    ],
)
def test_split_points(prompt, chosen, rejected, split) -> None:
    pair = split_sequences(prompt, chosen, rejected)
    sides = (chosen[split:], rejected[split:])
    assert pair == (prompt[:split], sides, split < len(prompt))


def test_rows_for_a_loader() -> None:
    lists = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "ref_chosen_logps": -1.0,
         "ref_rejected_logps": -2.0, "other": "x"},
        {"prompt_ids": [], "chosen_ids": [6], "rejected_ids": [7], "ref_chosen_logps": -3.0,
         "ref_rejected_logps": -4.0, "other": "y"},
        {"prompt_ids": [8], "chosen_ids": [9], "rejected_ids": [1], "ref_chosen_logps": -5.0,
         "ref_rejected_logps": -6.0, "other": "z"},
    ]  # fmt: skip
    dataset = datasets.Dataset.from_list(lists)
    rows = PairRows(dataset)
    assert len(rows) == 3
    read = rows.__getitems__([2, 0, 2, 1])
    assert [row["row_id"] for row in read] == [2, 0, 2, 1]
    for row in read:
        for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert isinstance(row[field], np.ndarray)
            assert row[field].tolist() == lists[row["row_id"]][field]
        assert row["ref_chosen_logps"] == lists[row["row_id"]]["ref_chosen_logps"]
        assert "other" not in row
    assert rows[1]["chosen_ids"].tolist() == [6]
    assert rows.lengths()["prompt_ids"].tolist() == [2, 0, 1]
    shuffled = dataset.select([2, 0])
    assert PairRows(shuffled)[0]["prompt_ids"].tolist() == [8]
    assert PairRows(shuffled).lengths()["prompt_ids"].tolist() == [1, 2]
    batch = PairCollator()(read)
    assert batch["row_ids"].tolist() == [2, 0, 2, 1]
    with pytest.raises(ValueError, match=r"dataset: expected the columns .*got no .*'chosen_ids'"):
        PairRows(dataset.remove_columns("chosen_ids"))


@pytest.mark.parametrize(("dropped", "warned"), [(0, False), (9, False), (10, True)])
def test_that_much_is_left_out_is_a_warning(dropped, warned, caplog):
    report = TokenizeReport(pairs=100, kept=100 - dropped)
    report.dropped["prompts of max_length tokens or more"] = dropped
    logger = logging.getLogger("fastdaa.data")
    with caplog.at_level(logging.INFO, logger.name):
        report.log(logger, "train_dataset")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING"][: 1 + warned]
    assert ("10% of the pairs are left out (10 prompts of max_length" in caplog.text) == warned


def test_every_answer_is_an_example() -> None:
    turns = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    turns += [turn("user", "r"), turn("assistant", "b")]
    tokenizer = make_tokenizer()
    rows = datasets.Dataset.from_list([{"messages": turns}, {"messages": turns[1:3]}])

    def shown(**options) -> list[tuple[str, str]]:
        found, report = tokenize_examples(rows, tokenizer, **options)
        assert report.pairs == report.kept == len(found)
        fields = ("prompt_ids", "completion_ids")
        return [
            tuple("".join(tokenizer.convert_ids_to_tokens(r[f])) for f in fields) for r in found
        ]

    last = ("<s>s<e><u>q<e><a>a<e><u>r<e><a>", "b<e>")
    assert shown() == [last, ("<u>q<e><a>", "a<e>")]
    assert shown(every_answer=True) == [
        ("<s>s<e><u>q<e><a>", "a<e>"), last, ("<u>q<e><a>", "a<e>")
    ]  # fmt: skip
    # Answers of other data are left as they are.
    rows = datasets.Dataset.from_list([{"prompt": "pq", "completion": "ab"}])
    assert shown(every_answer=True) == [("pq", "ab<e>")]
