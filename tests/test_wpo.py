"""WPO: pairs weighted by their probability under the policy, against whole logits in fp64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from head_products import HeadProducts
from tile_budget import tiles_of

from fastdaa import LmHead, Objective, TokenSelection, custom_loss, pair_loss
from fastdaa.losses.weights import on_policy_weights

# The second pair has an empty completion, the last one is beyond the small tiles.
COUNTS = (6, 9, 3, 0, 1, 4, 12, 7)
V, D, BETA = 67, 12, 0.4
PATHS = ("single_pass", "recompute", "frozen", "score")


class Case:
    """Hidden states, a head, targets of which some are likely, and a reference."""

    def __init__(self, dtype=torch.float64, bias=False, **options):
        n = sum(COUNTS)
        self.hidden = torch.randn(n, D, dtype=torch.float64)
        self.weight = 0.4 * torch.randn(V, D, dtype=torch.float64)
        self.bias = 0.3 * torch.randn(V, dtype=torch.float64) if bias else None
        targets = torch.randint(V, (n,))
        # Pairs of likely tokens are those whose weight meets the cap.
        targets[-19:] = (self.hidden @ self.weight.T).argmax(-1)[-19:]
        self.selection = TokenSelection(torch.arange(n), targets, torch.tensor(COUNTS), COUNTS)
        self.ref = -4 * torch.rand(n, dtype=torch.float64)
        self.dtype, self.options = dtype, options

    def leaves(self, dtype, path="single_pass"):
        """Hidden states, weight and bias; the head needs no gradient on some paths."""
        trained = {"score": 0, "frozen": 1}.get(path, 3)
        return [
            None if t is None else t.to(dtype, copy=True).requires_grad_(place < trained)
            for place, t in enumerate((self.hidden, self.weight, self.bias))
        ]

    def logits(self, hidden, weight, bias):
        z = F.linear(hidden, weight, bias) * self.options.get("logit_scale", 1.0)
        cap = self.options.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        return z / self.options.get("temperature", 1.0)

    def by_hand(self, loss):
        """Losses, weights and gradients in fp64; ``loss(s_w, s_l, r_w, r_l, |w|, |l|)`` a pair."""
        leaves = self.leaves(torch.float64)
        probabilities = self.logits(*leaves).softmax(-1)
        logps = probabilities.log().gather(1, self.selection.targets[:, None])[:, 0]
        aligned = (logps - probabilities.square().sum(-1).log()).detach()
        policy, ref, means = (t.split(COUNTS) for t in (logps, self.ref, aligned))
        means = [t.mean() if t.numel() else torch.zeros(()).double() for t in means]
        losses, weights = [], []
        for i in range(0, len(COUNTS), 2):
            weights.append(min(1.0, float(torch.exp(means[i] + means[i + 1]))))
            sums = [side[j].sum() for side in (policy, ref) for j in (i, i + 1)]
            losses.append(weights[-1] * loss(*sums, *COUNTS[i : i + 2]))
        torch.stack(losses).mean().backward()
        grads = [None if t is None else t.grad for t in leaves]
        return torch.stack(losses).detach(), torch.tensor(weights, dtype=torch.float64), grads

    def run(self, objective, path="single_pass", **options):
        leaves = self.leaves(self.dtype, path)
        head = LmHead(*leaves[1:], **self.options)
        ref = self.ref.to(self.dtype)
        out = pair_loss(
            leaves[0], head, self.selection, objective, ref_token_logps=ref, impl=path, **options
        )
        if out.loss.requires_grad:
            out.loss.backward()
        return out, [None if t is None else t.grad for t in leaves]


def dpo(chosen, rejected, ref_chosen, ref_rejected, *_):
    return -F.logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected))


def ipo_norm(chosen, rejected, ref_chosen, ref_rejected, n, m):
    means = (chosen - ref_chosen) / max(n, 1) - (rejected - ref_rejected) / max(m, 1)
    return (means - 1 / (2 * BETA)) ** 2


def simpo(chosen, rejected, ref_chosen, ref_rejected, n, m):
    return -F.logsigmoid(BETA * (chosen / max(n, 1) - rejected / max(m, 1)) - 1.0)


def dpo_sft(chosen, *rest):
    pairs, chosen_tokens = len(COUNTS) // 2, sum(COUNTS[::2])
    return dpo(chosen, *rest) - 0.5 * chosen * pairs / chosen_tokens


LOSSES = {
    "dpo": (dpo, Objective.parse("dpo", beta=BETA, use_weighting=True)),
    "ipo_norm": (ipo_norm, Objective.parse("ipo_norm", beta=BETA, use_weighting=True)),
    "simpo": (simpo, Objective.parse("simpo", beta=BETA, use_weighting=True)),
    "mixture": (
        dpo_sft,
        Objective.parse(["dpo", "sft"], weights=[1.0, 0.5], beta=BETA, use_weighting=True),
    ),
}


def compare(case, loss, objective, path="single_pass", **options):
    losses, weights, expected = case.by_hand(loss)
    out, grads = case.run(objective, path, **options)
    exact = case.dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    found = [out.losses, out.pair_weights, *grads]
    for got, wanted in zip(found, [losses, weights, *expected], strict=True):
        if got is not None:
            torch.testing.assert_close(got.double(), wanted, **tolerance)
    return out


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_has_the_weights_and_gradients_of_the_formula(name, path):
    compare(Case(), *LOSSES[name], path)


@pytest.mark.parametrize("tile_rows", [5, 20])
def test_chunks_have_the_weights_of_their_own_pairs(tile_rows):
    case = Case()
    with tiles_of(2 * tile_rows, V):
        compare(case, *LOSSES["mixture"])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 0.7}, id="temperature"),
        pytest.param({"softcap": 2.0, "logit_scale": 1.5}, id="softcap"),
        pytest.param({"bias": True}, id="bias"),
    ],
)
def test_every_head_in_fp32(options):
    out = compare(Case(torch.float32, **options), *LOSSES["dpo"])
    assert out.loss.dtype == torch.float32


def test_gradients_that_are_kept_in_bf16_have_the_weights(half_factors):
    case = Case(torch.bfloat16)
    seen = half_factors(torch.bfloat16)
    weighted, grads = case.run(LOSSES["dpo"][1])
    plain, plain_grads = case.run(Objective.parse("dpo", beta=BETA))
    assert torch.bfloat16 in seen
    torch.testing.assert_close(weighted.losses, plain.losses * weighted.pair_weights)
    rows = weighted.pair_weights.repeat_interleave(torch.tensor(COUNTS).view(-1, 2).sum(1))
    expected = plain_grads[0] * rows[:, None]
    torch.testing.assert_close(grads[0].float(), expected.float(), rtol=2e-2, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.3}], ids=["wpo", "with ld_dpo"])
def test_the_other_engine_has_the_same(more):
    case = Case(torch.float32)
    objective = Objective.parse("dpo", beta=BETA, use_weighting=True, **more)
    (got, grads), (expected, plain) = (case.run(objective, engine=e) for e in ("triton", "torch"))
    torch.testing.assert_close(got.losses, expected.losses)
    torch.testing.assert_close(got.pair_weights, expected.pair_weights)
    torch.testing.assert_close(grads[:2], plain[:2])


def test_weights_by_hand():
    # p = (3/4, 1/4): the squares sum to 5/8, so the tokens are worth 6/5 and 2/5.
    hidden, weight = torch.ones(4, 1), torch.tensor([[3.0], [1.0]]).log()
    counts = (2, 0, 1, 1)
    targets = torch.tensor([0, 1, 0, 0])
    selection = TokenSelection(torch.arange(4), targets, torch.tensor(counts), counts)
    objective = Objective.parse("simpo", use_weighting=True)
    out = pair_loss(hidden, LmHead(weight), selection, objective)
    # A geometric mean over two tokens against nothing; 36/25 is capped.
    torch.testing.assert_close(out.pair_weights, torch.tensor([0.48**0.5, 1.0]))


def test_what_the_policy_is_indifferent_to_weighs_1():
    hidden, weight = torch.randn(8, 4), torch.zeros(9, 4)
    selection = TokenSelection(
        torch.arange(8), torch.randint(9, (8,)), torch.tensor([3, 1, 2, 2]), (3, 1, 2, 2)
    )
    objective = Objective.parse("simpo", use_weighting=True)
    out = pair_loss(hidden, LmHead(weight), selection, objective)
    torch.testing.assert_close(out.pair_weights, torch.ones(2), rtol=0, atol=1e-6)


def test_a_sequence_is_weighted_by_its_mean_and_a_pair_by_the_product():
    alignments = torch.tensor([-2.0, -3.0, 1.0, 5.0, 0.0, 0.0])
    lengths = torch.tensor([2, 1, 4, 5, 0, 3])
    expected = torch.tensor([-4.0, 0.0, 0.0]).exp()
    torch.testing.assert_close(on_policy_weights(alignments, lengths), expected)


def test_the_weights_change_the_loss_and_no_gradient_goes_through_them():
    case = Case()
    weighted, grads = case.run(LOSSES["dpo"][1])
    plain, plain_grads = case.run(Objective.parse("dpo", beta=BETA))
    assert plain.pair_weights is None
    torch.testing.assert_close(weighted.losses, plain.losses * weighted.pair_weights)
    assert weighted.pair_weights.min() < 0.9 and weighted.pair_weights.max() == 1
    # Rows of a pair are the plain ones times its weight: nothing else depends on the policy.
    rows = weighted.pair_weights.repeat_interleave(torch.tensor(COUNTS).view(-1, 2).sum(1))
    torch.testing.assert_close(grads[0], plain_grads[0] * rows[:, None])


def test_a_loss_that_couples_pairs_without_sorting_them_is_weighted_pair_by_pair():
    case = Case()
    weighted, _ = case.run(Objective.parse("kto", use_weighting=True), "recompute")
    plain, _ = case.run(Objective.parse("kto"), "recompute")
    torch.testing.assert_close(weighted.losses, plain.losses * weighted.pair_weights)


def test_token_losses_and_losses_of_the_caller_are_weighted_too():
    def squared(policy, ref, *, beta=0.1):
        return beta * (policy.chosen - ref.chosen - policy.rejected + ref.rejected) ** 2

    case, names = Case(), [custom_loss(squared, coupled=False), "apa"]
    weighted, _ = case.run(Objective.parse(names, use_weighting=True))
    plain, _ = case.run(Objective.parse(names))
    torch.testing.assert_close(weighted.losses, plain.losses * weighted.pair_weights)


@pytest.mark.parametrize(("trained", "units"), [(True, 3), (False, 2)], ids=["trained", "frozen"])
@pytest.mark.parametrize("more", [{}, {"use_weighting": True}], ids=["plain", "weighted"])
def test_weights_cost_no_product(trained, units, more):
    counts = (8, 8, 16, 16)
    hidden = torch.randn(48, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=trained)
    selection = TokenSelection(
        torch.arange(48), torch.randint(V, (48,)), torch.tensor(counts), counts
    )
    objective = Objective.parse("dpo", **more)
    with HeadProducts(V) as products:
        pair_loss(
            hidden, LmHead(weight), selection, objective, ref_logps=torch.zeros(4)
        ).loss.backward()
    assert products.flop == units * 2 * 48 * V * D


def test_the_objective_says_so_and_survives_a_copy():
    objective = LOSSES["mixture"][1]
    assert str(objective).endswith("0.5 * sft(), use_weighting")
    assert objective != Objective.parse(["dpo", "sft"], weights=[1.0, 0.5], beta=BETA)
    assert Objective.by_key(objective.key) == objective
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert again == objective and again.use_weighting


@pytest.mark.parametrize(
    ("losses", "value", "message"),
    [
        pytest.param(["aot"], True, "expected losses of single pairs, got aot,", id="aot"),
        pytest.param(["dpo", "aot_pair"], True, "got aot_unpaired, which sorts", id="mixture"),
        pytest.param(["dpo"], "yes", "use_weighting: expected True or False, got 'yes'", id="word"),
    ],
)
def test_what_cannot_be_weighted_is_refused(losses, value, message):
    with pytest.raises(ValueError, match=message):
        Objective.parse(losses, use_weighting=value)


def test_an_objective_wants_its_weights():
    case = Case()
    plain, _ = case.run(Objective.parse("simpo"))
    objective = Objective.parse("simpo", use_weighting=True)
    with pytest.raises(ValueError, match="expected pair_weights for the objective simpo"):
        objective(plain.policy, None)
    with pytest.raises(ValueError, match="expected no pair_weights for the objective simpo"):
        Objective.parse("simpo")(plain.policy, None, pair_weights=torch.ones(4))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["simpo", "dpo"])
def test_compiled_it_has_the_same_bits(same_compiled, name, path):
    case, objective = Case(torch.float32, bias=True, softcap=3.0), LOSSES[name][1]
    leaves, ref = case.leaves(torch.float32, path), case.ref.float()

    def loss():
        head = LmHead(*leaves[1:], **case.options)
        out = pair_loss(
            leaves[0] * 2.0, head, case.selection, objective, ref_token_logps=ref, impl=path
        )
        assert out.pair_weights is not None and not out.pair_weights.requires_grad
        # A power of two: paths multiply by it at different places.
        return out.loss * 2.0 + out.pair_weights.sum() + out.losses.sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)
