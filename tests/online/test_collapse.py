"""The monitor: what it says, when, and that it says it once."""

from __future__ import annotations

import pytest

from fastdaa.online.collapse import CollapseMonitor


def _metrics(entropy: float = 2.0, top: float = 0.5, kl: float = 0.0) -> dict[str, float]:
    return {
        "policy/token_entropy": entropy, "policy/max_prob": top, "objective/kl": kl,
        "ref/token_entropy": 2.0,
    }  # fmt: skip


def test_a_healthy_run_is_no_news() -> None:
    monitor = CollapseMonitor()
    assert [monitor.look(_metrics(2 - 0.1 * i, kl=0.3 * i)) for i in range(10)] == [[]] * 10
    assert not monitor.collapsed


def test_entropy_below_a_tenth_of_the_references_is_said_once() -> None:
    monitor = CollapseMonitor()
    monitor.look(_metrics())
    assert monitor.look(_metrics(entropy=0.21)) == []
    (sentence,) = monitor.look(_metrics(entropy=0.19))
    assert sentence == "collapse: entropy 0.19 nats a token, below 10% of the reference's 2"
    assert monitor.look(_metrics(entropy=0.18)) == []
    assert monitor.collapsed
    assert monitor.look(_metrics()) == []
    assert not monitor.collapsed
    assert len(monitor.look(_metrics(entropy=0.1))) == 1


def test_certainty_counts_only_if_it_is_new() -> None:
    monitor = CollapseMonitor()
    monitor.look(_metrics(top=0.6))
    (sentence,) = monitor.look(_metrics(top=0.995))
    assert "probability 0.9950 on average (0.60 in the first rollouts)" in sentence
    certain = CollapseMonitor()
    assert certain.look(_metrics(top=0.995)) == []
    assert certain.look(_metrics(top=0.995)) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.0, 0.9, False), (0.5, 1.6, True), (4.0, 5.9, False), (4.0, 6.1, True), (6.0, 1.0, False)],
    ids=["small", "jump", "large-but-usual", "large-jump", "fall"],
)
def test_jumps_of_kl(before: float, after: float, said: bool) -> None:
    monitor = CollapseMonitor()
    monitor.look(_metrics(kl=before))
    found = monitor.look(_metrics(kl=after))
    assert bool(found) is said
    if said:
        expected = f"KL jumped from {before:.2f} to {after:.2f} nats a sequence in one iteration"
        assert found == [expected]
    assert not monitor.collapsed


def test_it_goes_on_after_a_resume() -> None:
    monitor, again = CollapseMonitor(), CollapseMonitor()
    monitor.look(_metrics(kl=1.0))
    monitor.look(_metrics(entropy=0.1, kl=1.0))
    again.load_state_dict(monitor.state_dict())
    assert again == monitor
    assert again.look(_metrics(entropy=0.1, kl=9.0)) == monitor.look(_metrics(entropy=0.1, kl=9.0))
