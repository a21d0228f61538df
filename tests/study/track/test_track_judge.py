"""External judges: both orders, position bias, and everything that can go wrong."""

from __future__ import annotations

import shlex
import sys
import time

import pytest

from fastdaa.study.track.judge import JudgeCommand, read_verdicts
from fastdaa.study.track.scoring import ScorerError

LOOP = "import sys, json\nfor line in sys.stdin:\n    q = json.loads(line)\n"
SAY = "    print(json.dumps({'id': q['id'], 'winner': w}))\n"


@pytest.fixture
def judge(tmp_path):
    """``judge(code)``: a judge that runs Python code."""

    def make(code, timeout=20.0):
        path = tmp_path / "judge.py"
        path.write_text(code)
        return JudgeCommand(shlex.join([sys.executable, "-S", str(path)]), timeout)

    return make


@pytest.fixture
def samples(make_sample):
    answers = [("long answer", "short"), ("no", "longer"), ("same", "same"), ("ab", "cd")]
    return [make_sample(a, r, number=i) for i, (a, r) in enumerate(answers)]


def test_the_longer_answer_wins_in_both_orders(judge, samples):
    longer = "    a, b = len(q['first']), len(q['second'])\n"
    longer += "    w = 'first' if a > b else 'second' if b > a else 'tie'\n"
    scores = judge(LOOP + longer + SAY)(samples)
    assert scores.values == [1.0, 0.0, 0.5, 0.5]
    assert scores.columns == {"judge_first_rate": 0.5, "judge_consistency": 1.0}


def test_a_preference_for_a_place_cancels_and_is_reported(judge, samples):
    scores = judge(LOOP + "    w = 'first'\n" + SAY)(samples)
    assert scores.values == [0.5] * 4
    assert scores.columns == {"judge_first_rate": 1.0, "judge_consistency": 0.0}


def test_half_a_preference(judge, samples):
    """Ties in one order, a win for the policy in the other: three quarters."""
    code = LOOP + "    w = 'tie' if q['id'] % 2 == 0 else 'second'\n" + SAY
    scores = judge(code)(samples)
    assert scores.values == [0.75] * 4
    assert scores.columns == {"judge_first_rate": 0.25, "judge_consistency": 0.0}


def test_answers_in_any_order_and_the_prompt_is_there(judge, samples):
    code = "import sys, json\nquestions = [json.loads(line) for line in sys.stdin]\n"
    code += "for q in reversed(questions):\n    assert q['prompt'] == 'p'\n"
    code += "    w = 'first' if q['id'] == 0 else 'second' if q['id'] == 1 else 'tie'\n" + SAY
    assert judge(code)(samples).values == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param("print('hello')", "line 1 of its output: expected .* got 'hello'", id="text"),
        pytest.param(
            LOOP + "    w = 'A'\n" + SAY, "got the winner 'A'", id="another winner"
        ),
        pytest.param(
            LOOP + "    w = 'tie'\n    q['id'] = 99\n" + SAY, "an id from 0 to 7, got 99", id="id"
        ),
        pytest.param(
            LOOP + "    w = 'tie'\n    q['id'] = 0\n" + SAY, "got two for 0", id="twice"
        ),
        pytest.param(
            LOOP + "    w = 'tie'\n    if q['id'] == 3: continue\n" + SAY,
            "expected 8 verdicts, got 7; the first without one has the id 3", id="missing",
        ),
        pytest.param("", "expected 8 verdicts, got 0", id="silent"),
        pytest.param(
            "import sys\nsys.exit('no key\\nin the environment')",
            "exit code 1: in the environment", id="exit code",
        ),
        pytest.param(
            "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')", "expected UTF-8", id="bytes"
        ),
    ],
)  # fmt: skip
def test_bad_judges(judge, samples, code, message):
    with pytest.raises(ScorerError, match=message):
        judge(code)(samples)


def test_a_judge_that_takes_too_long_is_ended(judge, samples):
    began = time.monotonic()
    with pytest.raises(ScorerError, match=r"expected an answer within 0\.3 s"):
        judge("import time\ntime.sleep(60)", timeout=0.3)(samples)
    assert time.monotonic() - began < 10


def test_a_judge_that_does_not_read(judge, make_sample):
    many = [make_sample("x" * 2000, number=i) for i in range(200)]
    with pytest.raises(ScorerError, match="expected 400 verdicts, got 0"):
        judge("pass")(many)


@pytest.mark.parametrize("command", ["", "no-such-judge --fast", "'unclosed"])
def test_no_program(command):
    with pytest.raises(ScorerError, match="judge: expected a"):
        JudgeCommand(command)


def test_timeout_above_zero():
    with pytest.raises(ValueError, match="judge_timeout"):
        JudgeCommand(sys.executable, 0.0)


def test_verdicts_of_blank_lines():
    text = '\n{"id": 0, "winner": "second", "why": "shorter"}\n\n'
    assert read_verdicts(text, 1) == [0.0]
