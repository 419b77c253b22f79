"""What is added to the loss for the router's sake, and what is logged about it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops import moe_load, moe_load_balancing_loss, moe_route, moe_z_loss


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def assert_near(result: Tensor, expected: Tensor, ulps: float = 32) -> None:
    """Within a few ulp of the largest value, and not zeros."""
    bound = ulps * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    assert bound > 0
    torch.testing.assert_close(result, expected, rtol=0, atol=bound)


def test_the_load_compiles_whole() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    compiled = torch.compile(
        lambda ids: moe_load(ids, 4, attention_mask=mask[: len(ids)]), fullgraph=True, backend="aot_eager"
    )
    for tokens in (6, 4, 5):
        ids = torch.randint(4, (tokens, 2))
        found, expected = compiled(ids), moe_load(ids, 4, attention_mask=mask[:tokens])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_balanced_routing_costs_top_k() -> None:
    for score in ("softmax", "sigmoid"):
        for top_k in (1, 2, 4):
            ids = (torch.arange(8)[:, None] + torch.arange(top_k)) % 8
            logits = 5 * F.one_hot(ids[:, 0], 8).double() - 20
            assert_near(moe_load_balancing_loss(logits, ids, 8, score=score), torch.tensor(float(top_k)).double())


def test_collapsed_routing_costs_all_experts() -> None:
    logits = 100 * F.one_hot(torch.zeros(5).long(), 8).double()
    assert_near(moe_load_balancing_loss(logits, torch.zeros(5, 1).long(), 8), torch.tensor(8.0).double())


def transformers_balance(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The quantity in transformers' definition, token by token."""
    experts, tokens = logits.shape[1], [t for t in range(len(mask)) if mask[t]]
    total = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        share = sum((ids[t] == e).sum().item() for t in tokens) / len(tokens)
        total = total + share * sum(logits[t].softmax(-1)[e] for t in tokens) / len(tokens)
    return experts * total


def test_losses_leave_padding_out() -> None:
    logits = random(6, 4, grad=True)
    padded = logits.detach().clone()
    padded[[1, 4]] = math.nan
    padded.requires_grad_()
    ids, mask = moe_route(logits, 2)[1], torch.tensor([[1, 0, 1], [1, 0, 1]])
    keep = mask.flatten().bool()
    ours = moe_load_balancing_loss(padded, ids, 4, attention_mask=mask)
    expected = transformers_balance(logits, ids, keep)
    assert_near(ours, expected)
    z, expected_z = moe_z_loss(padded, attention_mask=mask.bool()), logits[keep].logsumexp(-1).square().mean()
    assert_near(z, expected_z)
    for loss, other in ((ours, expected), (z, expected_z)):
        (gradient,) = torch.autograd.grad(loss, padded)
        assert gradient[~keep].eq(0).all() and gradient[keep].ne(0).any()
        assert_near(gradient, torch.autograd.grad(other, logits)[0])


def test_losses_of_nothing_but_padding_are_zero() -> None:
    logits, mask = random(3, 4, grad=True), torch.zeros(3, dtype=torch.long)
    loss = moe_load_balancing_loss(logits, torch.zeros(3, 1).long(), 4, attention_mask=mask)
    loss = loss + moe_z_loss(logits, attention_mask=mask)
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


def test_sigmoid_balance_cannot_be_gamed_by_small_scores() -> None:
    """Normalised probabilities see only differences between experts, however small the sigmoids are."""
    logits, ids = random(16, 8), torch.randint(0, 8, (16, 2))
    low = moe_load_balancing_loss(logits.float() - 150, ids, 8, score="sigmoid")
    assert_near(low, moe_load_balancing_loss(logits.float() - 150, ids, 8), ulps=256)


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
def test_balance_of_several_layers_is_that_of_transformers(padded: bool) -> None:
    modeling = pytest.importorskip("transformers").models.mixtral.modeling_mixtral
    layers = [torch.randn(2 * 9, 6, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 9).long()
    if padded:
        mask[0, 5:] = mask[1, :2] = 0
    theirs = modeling.load_balancing_loss_func(tuple(layers), 6, 2, mask if padded else None)
    logits = torch.cat(layers)
    ids = moe_route(logits, 2)[1]
    every = mask.repeat(3, 1) if padded else None
    ours = moe_load_balancing_loss(logits, ids, 6, attention_mask=every)
    assert_near(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        assert_near(a, b)


def deepseek_balance(logits: Tensor, ids: Tensor, top_k: int) -> Tensor:
    """Equations 17 to 20 of DeepSeek-V3 with a coefficient of 1, for one sequence, expert by expert."""
    experts, total = logits.shape[1], torch.zeros((), dtype=torch.float64)
    scores = logits.sigmoid()
    for e in range(experts):
        fraction = experts / (top_k * len(logits)) * (ids == e).sum().item()
        total = total + fraction * sum(s[e] / s.sum() for s in scores) / len(logits)
    return total


def test_balance_per_sequence_is_that_of_deepseek_v3() -> None:
    logits = random(3 * 7, 8, grad=True)
    ids = moe_route(logits, 2, score="sigmoid")[1]
    ours = moe_load_balancing_loss(logits, ids, 8, score="sigmoid", num_sequences=3)
    pairs = zip(logits.chunk(3), ids.chunk(3), strict=True)
    expected = 2 * torch.stack([deepseek_balance(*pair, 2) for pair in pairs]).mean()
    assert_near(ours, expected)
    assert_near(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(expected, logits)[0])
    whole = moe_load_balancing_loss(logits, ids, 8, score="sigmoid")
    assert abs(whole - ours) > 1e-3  # what balances over the batch need not balance within a sequence


def test_padding_and_sequences_of_nothing_else_count_for_nothing() -> None:
    kept = [random(5, 4), random(2, 4)]
    logits = torch.full((3, 6, 4), math.nan, dtype=torch.float64)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for row, sequence in zip((0, 2), kept, strict=True):
        logits[row, -len(sequence) :] = sequence
        mask[row, -len(sequence) :] = True
    logits = logits.flatten(0, 1).requires_grad_()
    ids = moe_route(logits.detach(), 2)[1]
    ours = moe_load_balancing_loss(logits, ids, 4, attention_mask=mask, num_sequences=3)
    alone = [moe_load_balancing_loss(x, moe_route(x, 2)[1], 4) for x in kept]
    assert_near(ours, torch.stack(alone).mean())
    (gradient,) = torch.autograd.grad(ours, logits)
    assert gradient[~mask.flatten()].eq(0).all() and gradient[mask.flatten()].ne(0).any(1).all()


def test_the_load_is_counted() -> None:
    ids = torch.tensor([[0, 2], [2, 3], [2, -1], [9, 0]])
    load = moe_load(ids, 5)
    assert load.counts.tolist() == [2, 0, 3, 1, 0]
    torch.testing.assert_close(load.fractions, torch.tensor([2, 0, 3, 1, 0]) / 6)
    torch.testing.assert_close(load.max_violation, torch.tensor(3 / (6 / 5) - 1))
    masked = moe_load(ids.int(), 5, attention_mask=torch.tensor([[1, 0], [0, 1]]))
    assert masked.counts.tolist() == [2, 0, 1, 0, 0]


def test_the_load_of_a_balanced_router_and_of_nothing() -> None:
    balanced = moe_load(torch.arange(12).view(6, 2) % 4, 4)
    assert balanced.counts.tolist() == [3] * 4 and balanced.max_violation == 0
    nothing = moe_load(torch.empty(0, 2, dtype=torch.long), 4)
    assert nothing.counts.tolist() == nothing.fractions.tolist() == [0] * 4 and nothing.max_violation == 0


def test_a_bad_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.zeros(3, 2).long()
    with pytest.raises(TypeError, match="expert_ids: expected dtype int64 or int32"):
        moe_load(ids.float(), 4)
    with pytest.raises(ValueError, match="num_experts: expected at least one, got 0"):
        moe_load(ids, 0)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3,\), got \(4,\)"):
        moe_load(ids, 4, attention_mask=torch.ones(2, 2))
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    with pytest.raises(ValueError, match="expert_ids: expected ids from -1 to 3, got 4"):
        moe_load(ids + 4, 4)
