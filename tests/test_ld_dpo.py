"""LD-DPO: what only the longer completion has counts ``ld_alpha``, in policy and reference."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from head_products import HeadProducts
from tile_budget import tiles_of

from fastdaa import FusedLinearPairLoss, LmHead, Objective, TokenSelection, custom_loss, pair_loss
from fastdaa.losses.weights import desensitized, tail_tokens

# Longer rejected, longer chosen, an empty completion, equal lengths.
COUNTS = (3, 8, 9, 4, 5, 0, 6, 6)
V, D, BETA, ALPHA = 67, 12, 0.4, 0.3
PATHS = ("single_pass", "recompute", "frozen", "score")


class Case:
    """Hidden states, a head, targets and a reference, in fp64."""

    def __init__(self):
        n = sum(COUNTS)
        self.hidden = torch.randn(n, D, dtype=torch.float64)
        self.weight = 0.4 * torch.randn(V, D, dtype=torch.float64)
        targets = torch.randint(V, (n,))
        self.selection = TokenSelection(torch.arange(n), targets, torch.tensor(COUNTS), COUNTS)
        self.ref = -4 * torch.rand(n, dtype=torch.float64)

    def by_hand(self, loss, alpha):
        """Losses and gradients; ``loss(policy, ref, plain, lengths)`` of a pair, two sums each."""
        hidden, weight = (t.clone().requires_grad_() for t in (self.hidden, self.weight))
        logps = (hidden @ weight.T).log_softmax(-1)
        logps = logps.gather(1, self.selection.targets[:, None])[:, 0]
        policy, ref = logps.split(COUNTS), self.ref.split(COUNTS)
        losses = []
        for i in range(0, len(COUNTS), 2):
            lengths = COUNTS[i : i + 2]
            shared = min(lengths)
            sums = [
                [t[:shared].sum() + alpha * t[shared:].sum() for t in side[i : i + 2]]
                for side in (policy, ref)
            ]
            losses.append(loss(*sums, [t.sum() for t in policy[i : i + 2]], lengths))
        torch.stack(losses).mean().backward()
        return torch.stack(losses).detach(), hidden.grad, weight.grad

    def run(self, objective, path="single_pass", dtype=torch.float64, **options):
        trained = {"score": 0, "frozen": 1}.get(path, 2)
        hidden, weight = (
            t.to(dtype, copy=True).requires_grad_(place < trained)
            for place, t in enumerate((self.hidden, self.weight))
        )
        out = pair_loss(
            hidden, LmHead(weight), self.selection, objective, impl=path,
            **{"ref_token_logps": self.ref.to(dtype), **options},
        )  # fmt: skip
        if out.loss.requires_grad:
            out.loss.backward()
        return out, hidden.grad, weight.grad


def dpo(policy, ref, *_):
    return -F.logsigmoid(BETA * (policy[0] - ref[0] - policy[1] + ref[1]))


def ipo_norm(policy, ref, _, lengths):
    means = [(s - r) / max(n, 1) for s, r, n in zip(policy, ref, lengths, strict=True)]
    return (means[0] - means[1] - 1 / (2 * BETA)) ** 2


def dpo_sft(policy, ref, plain, lengths):
    # As in TRL, the likelihood of the chosen completion is that of all its tokens.
    return dpo(policy, ref) - 0.5 * plain[0] * len(COUNTS) / 2 / sum(COUNTS[::2])


def parse(loss, alpha=ALPHA, **options):
    return Objective.parse(loss, beta=BETA, ld_alpha=alpha, **options)


LOSSES = {
    "dpo": (dpo, parse("dpo")),
    "ipo_norm": (ipo_norm, parse("ipo_norm")),
    "mixture": (dpo_sft, parse(["dpo", "sft"], weights=[1.0, 0.5])),
}


def compare(case, loss, objective, path="single_pass", alpha=ALPHA, **options):
    expected = case.by_hand(loss, alpha)
    out, *grads = case.run(objective, path, **options)
    exact = options.get("dtype", torch.float64) == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for got, wanted in zip([out.losses, *grads], expected, strict=True):
        if got is not None:
            torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_has_the_values_and_gradients_of_the_formula(name, path):
    compare(Case(), *LOSSES[name], path)


def test_in_fp32():
    compare(Case(), *LOSSES["mixture"], dtype=torch.float32)


@pytest.mark.parametrize("tile_rows", [10, 40])
def test_chunks_have_the_tails_of_their_own_pairs(tile_rows):
    with tiles_of(tile_rows, V):
        compare(Case(), *LOSSES["mixture"])


def test_at_0_nothing_of_the_tail_is_read():
    case = Case()
    compare(case, dpo, parse("dpo", 0), alpha=0.0)
    _, rows, _ = case.run(parse("dpo", 0))
    tail = tail_tokens(case.selection.lengths, sum(COUNTS))
    assert tail.sum() == 5 + 5 + 5 and (rows[tail] == 0).all() and (rows[~tail] != 0).any(1).all()


def test_at_1_it_is_the_plain_loss():
    case = Case()
    got, *grads = case.run(parse("dpo", 1))
    expected, *plain = case.run(Objective.parse("dpo", beta=BETA))
    assert torch.equal(got.losses, expected.losses)
    for grad, wanted in zip(grads, plain, strict=True):
        assert torch.equal(grad, wanted)
    changed, *_ = case.run(parse("dpo"))
    assert (changed.losses != expected.losses).tolist() == [True, True, True, False]


def test_which_tokens_are_the_tail():
    lengths = torch.tensor([1, 3, 2, 2, 2, 0])
    expected = [False, False, True, True, False, False, False, False, True, True]
    tail = tail_tokens(lengths, 10)
    assert tail.tolist() == expected
    got = desensitized(torch.full((10,), -2.0), tail, 0.25)
    assert got.tolist() == [-0.5 if behind else -2.0 for behind in expected]
    assert tail_tokens(torch.zeros(2, dtype=torch.int64), 0).shape == (0,)


def test_equal_policy_and_reference_have_a_margin_of_exactly_0():
    case = Case()
    plain, *_ = case.run(Objective.parse("dpo"), "score")
    out, *_ = case.run(parse("dpo"), "single_pass", ref_token_logps=plain.token_logps)
    torch.testing.assert_close(out.losses, torch.full((4,), 2.0).double().log(), rtol=0, atol=0)


def test_it_goes_with_weighted_pairs():
    case = Case()
    both, *_ = case.run(parse("dpo", use_weighting=True))
    tails, *_ = case.run(parse("dpo"))
    weighted, *_ = case.run(Objective.parse("dpo", use_weighting=True))
    # The weights are those of all tokens.
    torch.testing.assert_close(both.pair_weights, weighted.pair_weights)
    torch.testing.assert_close(both.losses, tails.losses * weighted.pair_weights)


def test_a_loss_of_the_caller_is_given_weighted_sums_if_it_reads_a_reference():
    seen = {}

    def compares(policy, ref):
        seen["compares"] = policy.chosen.detach()
        return policy.chosen - ref.chosen

    def alone(policy, ref):
        seen["alone"] = policy.chosen.detach()
        return -policy.chosen

    losses = [custom_loss(compares), custom_loss(alone, needs_ref=False)]
    out, *_ = Case().run(Objective.parse(losses, ld_alpha=0), "recompute")
    logps = out.token_logps.split(COUNTS)
    torch.testing.assert_close(seen["alone"], out.policy.chosen)
    expected = torch.stack([logps[i][: min(COUNTS[i : i + 2])].sum() for i in (0, 2, 4, 6)])
    torch.testing.assert_close(seen["compares"], expected)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_it_costs_no_product(trained):
    counts = (8, 24, 16, 16)
    hidden, ref = torch.randn(64, D, requires_grad=True), torch.zeros(64)
    weight = torch.randn(V, D, requires_grad=trained)
    selection = TokenSelection(
        torch.arange(64), torch.randint(V, (64,)), torch.tensor(counts), counts
    )
    with HeadProducts(V) as products:
        out = pair_loss(hidden, LmHead(weight), selection, parse("dpo"), ref_token_logps=ref)
        out.loss.backward()
    assert products.flop == (3 if trained else 2) * 2 * 64 * V * D


def test_the_module_takes_it():
    case, labels = Case(), torch.randint(V, (4, 9))
    labels[:2, :5] = -100
    hidden, ref_hidden = torch.randn(2, 4, 9, D, dtype=torch.float64)
    losses = [
        FusedLinearPairLoss("dpo", **more)(
            hidden, case.weight, labels, ref_hidden_states=ref_hidden, ref_weight=case.weight
        ).loss
        for more in ({}, {"ld_alpha": 1.0}, {"ld_alpha": 0.5})
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.filterwarnings("ignore")
def test_a_graph_has_the_same_bits(same_compiled):
    case = Case()
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))

    def loss():
        head = LmHead(weight)
        return pair_loss(
            hidden, head, case.selection, LOSSES["mixture"][1], ref_token_logps=case.ref
        ).loss

    same_compiled(torch.compile(loss, backend="eager", fullgraph=True), loss, [hidden, weight])


def test_the_objective_says_so_and_survives_a_copy():
    objective = parse("dpo", 1)
    assert str(objective).endswith("length_norm=False), ld_alpha=1.0")
    assert objective != Objective.parse("dpo", beta=BETA) and objective == parse("dpo", 1.0)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert Objective.by_key(objective.key) == objective
    assert objective.needs_ref_tokens and not Objective.parse("dpo").needs_ref_tokens


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True], ids=str)
def test_values_that_cannot_be_are_refused(alpha):
    with pytest.raises(ValueError, match=r"ld_alpha: expected a number in \[0, 1\] or None, got"):
        Objective.parse("dpo", ld_alpha=alpha)


@pytest.mark.parametrize(
    ("losses", "shown"),
    [("simpo", "simpo"), (["sft", "orpo"], "sft, orpo"), ("apa", "apa_pairs")],
    ids=str,
)
def test_losses_without_a_sequence_reference_are_refused(losses, shown):
    with pytest.raises(ValueError, match=f"reference, got {shown}$"):
        Objective.parse(losses, ld_alpha=0.5)


def test_sums_of_the_reference_alone_are_refused():
    case = Case()
    sums = torch.zeros(len(COUNTS), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"ref_token_logps: expected \[41\] for dpo.*, got None"):
        case.run(parse("dpo"), ref_logps=sums, ref_token_logps=None)
    plain, *_ = case.run(Objective.parse("dpo"))
    with pytest.raises(ValueError, match="expected unweighted for the objective dpo"):
        parse("dpo")(plain.policy, plain.policy)
