"""Mixture of experts: loops over tokens as oracle, the routers of known models, and the corners."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from pykern.ops.moe import (
    grouped_mm,
    moe_load_balancing_loss,
    moe_mlp,
    moe_route,
    moe_sort,
    moe_z_loss,
)

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def assert_near(result: Tensor, expected: Tensor, ulps: float = 32) -> None:
    """Within a few ulp of the largest value; NaN and infinity must match."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    bound = ulps * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(result, expected, rtol=0, atol=bound, equal_nan=True)


# --- moe_route


def best(scores: list[float], count: int) -> list[int]:
    """The ids of the largest scores, best first, ties to the lower id."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


def route_by_loop(logits: Tensor, top_k: int, **options: object) -> tuple[Tensor, Tensor]:
    """A router in plain Python floats."""
    score, renormalize = options.get("score", "softmax"), options.get("renormalize", True)
    bias, groups = options.get("selection_bias"), options.get("num_groups", 1)
    all_weights, all_ids = [], []
    for row in logits.tolist():
        top = max(row)
        exponentials = [math.exp(x - top) for x in row]
        scores = [x / sum(exponentials) for x in exponentials]
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in row]
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(row) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        count = 1 if options.get("group_score") == "max" else 2
        worth = [sum(sorted((choice[e] for e in m), reverse=True)[:count]) for m in members]
        allowed = {e for g in best(worth, options.get("top_groups", 1)) for e in members[g]}
        ids = best([c if e in allowed else -math.inf for e, c in enumerate(choice)], top_k)
        weights = [scores[e] for e in ids]
        if renormalize:
            weights = [w / sum(weights) for w in weights]
        all_weights.append([w * options.get("scale", 1.0) for w in weights])
        all_ids.append(ids)
    return torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_ids)


ROUTERS = {
    "mixtral": (8, 2, {}),
    "qwen3 without renormalisation": (16, 4, {"renormalize": False}),
    "softmax with bias": (16, 4, {"selection_bias": "random"}),
    "sigmoid": (12, 3, {"score": "sigmoid"}),
    "sigmoid, each for itself": (12, 3, {"score": "sigmoid", "renormalize": False, "scale": 0.5}),
    "deepseek-v2": (
        20,
        6,
        {"num_groups": 5, "top_groups": 3, "group_score": "max", "scale": 16.0, "renormalize": False},
    ),
    "deepseek-v3": (
        32,
        8,
        {"score": "sigmoid", "selection_bias": "random", "num_groups": 8, "top_groups": 4, "scale": 2.5},
    ),
    "a bias below zero": (8, 3, {"score": "sigmoid", "selection_bias": "below", "num_groups": 4, "top_groups": 2}),
    "groups of one": (6, 2, {"score": "sigmoid", "num_groups": 6, "top_groups": 4}),
    "every expert": (5, 5, {}),
    "one expert": (1, 1, {}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_route_is_the_loop(name: str) -> None:
    experts, top_k, options = ROUTERS[name]
    if "selection_bias" in options:
        offset = 3.0 if options["selection_bias"] == "below" else 0.0
        options = {**options, "selection_bias": random(experts) - offset}
    logits = random(41, experts) * 2
    weights, ids = moe_route(logits, top_k, **options)
    expected, expected_ids = route_by_loop(logits, top_k, **options)
    assert torch.equal(ids, expected_ids)
    assert_near(weights, expected)


def test_route_gives_fp32_for_16_bits_and_computes_in_it() -> None:
    logits = random(33, 16, dtype=torch.bfloat16)
    weights, ids = moe_route(logits, 4)
    expected, expected_ids = route_by_loop(logits, 4)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)  # bf16 logits tie often, and must tie alike
    assert_near(weights.double(), expected, ulps=4 * 2**29)


def test_mixtral_gradient_is_that_of_softmax_topk_renormalise() -> None:
    logits = random(19, 8, grad=True)
    weights, _ = moe_route(logits, 2)
    chosen = logits.softmax(-1).topk(2).values
    incoming = random(19, 2)
    (ours,) = torch.autograd.grad(weights, logits, incoming)
    (theirs,) = torch.autograd.grad(chosen / chosen.sum(-1, keepdim=True), logits, incoming)
    assert_near(ours, theirs)


def test_deepseek_v3_router_as_its_paper_says() -> None:
    logits, bias = random(29, 16, grad=True), random(16, grad=True)
    weights, ids = moe_route(
        logits, 4, score="sigmoid", selection_bias=bias, num_groups=4, top_groups=2, group_score="top2", scale=2.5
    )
    affinity = torch.sigmoid(logits)
    corrected = (affinity + bias).view(29, 4, 4)
    groups = corrected.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    allowed = F.one_hot(groups, 4).sum(1).bool()
    expected_ids = corrected.masked_fill(~allowed[..., None], -math.inf).view(29, 16).topk(4, dim=-1).indices
    gates = affinity.gather(1, expected_ids)
    expected = 2.5 * gates / gates.sum(-1, keepdim=True)
    assert torch.equal(ids, expected_ids)
    assert_near(weights, expected)
    incoming = random(29, 4)
    gradients = torch.autograd.grad(weights, (logits, bias), incoming, allow_unused=True)
    assert gradients[1] is None  # the bias steers the choice and learns nothing from the loss
    assert_near(gradients[0], torch.autograd.grad(expected, logits, incoming)[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_id(score: str) -> None:
    logits = torch.tensor([[0.0] * 6, [1.0, 2.0, 2.0, 1.0, 2.0, 0.0], [-0.0, 0.0, -0.0, 0.0, 0.0, -0.0]])
    expected = torch.tensor([[0, 1, 2, 3], [1, 2, 4, 0], [0, 1, 2, 3]])
    assert torch.equal(moe_route(logits, 4, score=score)[1], expected)
    grouped = moe_route(torch.zeros(1, 6), 2, score=score, num_groups=3, top_groups=2)[1]
    assert torch.equal(grouped, torch.tensor([[0, 1]]))


def test_the_choice_is_exact_where_scores_saturate() -> None:
    logits = torch.tensor([[40.0, 50.0, 60.0], [-200.0, -150.0, -190.0]])
    for score in ("softmax", "sigmoid"):
        weights, ids = moe_route(logits, 2, score=score)
        assert ids.tolist() == [[2, 1], [1, 2]]
        assert_near(weights.sum(-1), torch.ones(2))
        assert weights[1, 0] > 0.99


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False},
        {"score": "sigmoid"},
        {"score": "sigmoid", "renormalize": False},
        {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "group_score": "max"},
        {"num_groups": 4, "top_groups": 2},
        {"selection_bias": torch.linspace(0, 1, 8)},
    ],
    ids=str,
)
def test_nan_rows_get_distinct_ids_and_nan_weights(options: dict[str, object]) -> None:
    clean = random(4, 8, dtype=torch.float32)
    logits = clean.clone()
    logits[1, 5] = math.nan
    logits[2] = math.nan
    weights, ids = moe_route(logits, 4, **options)
    assert weights[1:3].isnan().all()
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 8 for row in ids.tolist())
    expected, expected_ids = moe_route(clean, 4, **options)
    for row in (0, 3):
        assert torch.equal(weights[row], expected[row]) and torch.equal(ids[row], expected_ids[row])


def test_replay_recomputes_the_weights_of_recorded_ids() -> None:
    logits, recorded = random(11, 8, grad=True), torch.randint(0, 8, (11, 3))
    weights, ids = moe_route(logits, 3, expert_ids=recorded, score="sigmoid", scale=2.0)
    assert ids is recorded
    scores = torch.sigmoid(logits).gather(1, recorded)
    expected = 2 * scores / scores.sum(-1, keepdim=True)
    assert_near(weights, expected)
    incoming = random(11, 3)
    gradients = [torch.autograd.grad(w, logits, incoming)[0] for w in (weights, expected)]
    assert_near(*gradients)
    again, _ = moe_route(logits, 2, expert_ids=moe_route(logits, 2)[1].int())
    assert_near(again, moe_route(logits, 2)[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_replayed_drops_have_no_weight(score: str) -> None:
    logits = random(3, 5, grad=True)
    recorded = torch.tensor([[2, -1, 0], [-1, -1, -1], [4, 1, 7]])
    weights, _ = moe_route(logits, 3, expert_ids=recorded, score=score)
    assert weights[0, 1] == 0 and weights[1].eq(0).all() and weights[2, 2] == 0
    pair, _ = moe_route(logits[:1], 2, expert_ids=torch.tensor([[2, 0]]), score=score)
    assert_near(weights[:1, [0, 2]], pair)
    (gradient,) = torch.autograd.grad(weights, logits, random(3, 3))
    assert gradient.isfinite().all() and gradient[1].eq(0).all() and gradient[0].ne(0).any()


def test_route_of_permuted_tokens_is_permuted() -> None:
    logits, order = random(37, 16, dtype=torch.float32), torch.randperm(37)
    weights, ids = moe_route(logits, 4)
    permuted_weights, permuted_ids = moe_route(logits[order], 4)
    assert torch.equal(permuted_weights, weights[order]) and torch.equal(permuted_ids, ids[order])


# --- moe_sort


@pytest.mark.parametrize("tokens,top_k,experts", [(0, 2, 4), (1, 1, 1), (1, 3, 7), (23, 2, 5), (40, 4, 61)])
def test_sort_is_the_loop_and_its_own_inverse(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.randint(-1, experts, (tokens, top_k))
    order, inverse, offs = moe_sort(ids, experts)
    flat = ids.flatten().tolist()
    expected = [i for e in (*range(experts), -1) for i, x in enumerate(flat) if x == e]
    assert order.tolist() == expected
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(len(flat)))
    assert offs.dtype == torch.int32
    assert offs.tolist() == [sum(0 <= x <= e for x in flat) for e in range(experts)]


def test_ids_out_of_range_are_dropped_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[0, 9], [-3, 2]])
    order, _, offs = moe_sort(ids, 3)
    assert order.tolist() == [0, 3, 1, 2] and offs.tolist() == [1, 1, 2]
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    with pytest.raises(ValueError, match="expert_ids: expected ids from -1 to 2, got -3"):
        moe_sort(ids, 3)
    with pytest.raises(ValueError, match="expert_ids: .* got 9"):
        moe_mlp(random(2, 4), random(3, 6, 4), random(3, 4, 3), random(2, 2), ids.clamp(min=-1))
    assert moe_sort(ids.clamp(-1, 2), 3)[2].tolist() == [1, 1, 3]


# --- grouped_mm


def test_grouped_mm_agrees_with_torch_where_torch_can() -> None:
    offs = torch.tensor([4, 4, 16, 24], dtype=torch.int32)
    for a, b, cut in (
        (random(24, 16), random(4, 16, 32), offs),
        (random(16, 24), random(24, 32), offs),
        (random(4, 16, 8), random(8, 24), offs),
        (random(4, 16, 8), random(4, 8, 24), None),
    ):
        a, b = a.float(), b.float()
        assert_near(grouped_mm(a, b, offs=cut), F.grouped_mm(a, b, offs=cut))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_experts_get_zero_gradients_and_rows_behind_are_zeros(backend: str) -> None:
    a, b = random(9, 6, grad=True), random(5, 6, 4, grad=True)
    bias = random(5, 4, grad=True)
    offs = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32)
    with pykern.backend(backend):
        out = grouped_mm(a, b, offs=offs, bias=bias)
        out.backward(random(9, 4))
    assert out[7:].eq(0).all() and out[:7].ne(0).all()
    assert a.grad[7:].eq(0).all() and a.grad[:7].ne(0).all()
    for gradient in (b.grad, bias.grad):
        assert gradient[[0, 2, 4]].eq(0).all() and gradient[[1, 3]].ne(0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_stays_in_its_group(backend: str) -> None:
    a, b = random(6, 4), random(3, 4, 2)
    a[1], b[2] = math.nan, math.nan
    a.requires_grad_(), b.requires_grad_()
    with pykern.backend(backend):
        out = grouped_mm(a, b, offs=torch.tensor([2, 4, 5], dtype=torch.int32))
        out.backward(torch.ones_like(out))
    assert out.isnan().any(1).tolist() == [False, True, False, False, True, False]
    assert a.grad.isnan().any(1).tolist() == [False, False, False, False, True, False]
    assert b.grad.isnan().flatten(1).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_indices_touch_no_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(3, 4, grad=True), random(3, 4, 2)
    offs = torch.tensor([2, 1, 50], dtype=torch.int32)
    gather, scatter = torch.tensor([0, 99, -5, 1, 1]), torch.tensor([3, 2, 0, 77, -1])
    with pykern.backend(backend):
        out = grouped_mm(a, b, offs=offs, gather=gather, scatter=scatter)
        out.sum().backward()
    nothing = torch.zeros(2, dtype=torch.float64)
    expected = torch.stack([a[0] @ b[2], nothing, a[2] @ b[0], a[0] @ b[0], nothing])
    assert_near(out, expected)
    assert a.grad[[0, 2]].ne(0).all() and a.grad[1].eq(0).all()
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    with pytest.raises(ValueError, match="offs: expected ends that rise"):
        grouped_mm(a, b, offs=offs)
    good = torch.tensor([1, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="gather: expected rows from 0 to 2, got -5"):
        grouped_mm(a, b, offs=good, gather=gather)
    with pytest.raises(ValueError, match="scatter: expected rows that differ"):
        grouped_mm(a, b, offs=good, scatter=torch.tensor([0, 0, 1]))


def test_gather_may_read_a_row_twice() -> None:
    a, b = random(3, 4, grad=True), random(2, 4, 2)
    gather = torch.tensor([1, 1, 0, 1])
    out = grouped_mm(a, b, offs=torch.tensor([1, 4], dtype=torch.int32), gather=gather)
    assert_near(out, torch.stack([a[1] @ b[0], *(a[i] @ b[1] for i in (1, 0, 1))]))
    incoming = random(4, 2)
    out.backward(incoming)
    first, second = incoming[0] @ b[0].T, incoming[1:] @ b[1].T
    assert_near(a.grad, torch.stack([second[1], first + second[0] + second[2], torch.zeros(4).double()]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_dtype_keeps_what_16_bits_would_lose(backend: str) -> None:
    a, b = random(5, 64, dtype=torch.bfloat16, grad=True), random(2, 64, 3, dtype=torch.bfloat16)
    offs = torch.tensor([2, 5], dtype=torch.int32)
    with pykern.backend(backend):
        out = grouped_mm(a, b, offs=offs, out_dtype=torch.float32)
        out.backward(torch.ones_like(out))
        rounded = grouped_mm(a, b, offs=offs)
    assert_near(out, torch.cat([a[:2].float() @ b[0].float(), a[2:].float() @ b[1].float()]))
    assert a.grad.dtype == torch.bfloat16 and a.grad.ne(0).any()
    assert torch.equal(out.bfloat16(), rounded) and not torch.equal(out, rounded.float())


# --- moe_mlp


def mlp_by_loop(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, biases: tuple[Tensor, Tensor], name: str
) -> Tensor:
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for slot, e in enumerate(ids[t].tolist()):
            if e >= 0:
                gate, up = (gate_up[e] @ x[t] + biases[0][e]).chunk(2)
                row = row + weights[t, slot] * (down[e] @ (ACTIVATIONS[name](gate) * up) + biases[1][e])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_the_loop_over_tokens(activation: str, backend: str) -> None:
    x, gate_up, down = random(7, 6, grad=True), random(5, 8, 6, grad=True), random(5, 6, 4, grad=True)
    weights, biases = random(7, 2, grad=True), (random(5, 8, grad=True), random(5, 6, grad=True))
    ids = torch.tensor([[0, 3], [3, -1], [4, 0], [-1, -1], [3, 4], [0, 4], [4, 3]])  # 1 and 2 stay empty
    leaves = (x, gate_up, down, weights, *biases)
    with pykern.backend(backend):
        out = moe_mlp(
            x, gate_up, down, weights, ids, gate_up_bias=biases[0], down_bias=biases[1], activation=activation
        )
        incoming = random(7, 6)
        gradients = torch.autograd.grad(out, leaves, incoming)
    expected = mlp_by_loop(x, gate_up, down, weights, ids, biases, activation)
    assert_near(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, incoming), strict=True):
        assert_near(ours, theirs)
    for i in (1, 2, 4, 5):
        assert gradients[i][1:3].eq(0).all() and gradients[i][3].ne(0).any()
    assert gradients[0][3].eq(0).all() and gradients[3][ids < 0].eq(0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_all_tokens_to_one_expert_is_a_dense_mlp(backend: str) -> None:
    x, gate_up, down = random(9, 6), random(4, 10, 6), random(4, 6, 5)
    ids, weights = torch.full((9, 1), 2), torch.ones(9, 1)
    gate, up = (x @ gate_up[2].T).chunk(2, -1)
    with pykern.backend(backend):
        assert_near(moe_mlp(x, gate_up, down, weights, ids), (F.silu(gate) * up) @ down[2].T)


def test_the_weight_of_a_dropped_slot_is_not_looked_at() -> None:
    x, gate_up, down = random(2, 4), random(3, 6, 4), random(3, 4, 3)
    weights = torch.tensor([[0.5, math.nan], [0.25, 0.75]], requires_grad=True)
    out = moe_mlp(x, gate_up, down, weights, torch.tensor([[1, -1], [0, 2]]))
    out.sum().backward()
    assert out.isfinite().all() and weights.grad.isfinite().all() and weights.grad[0, 1] == 0


def test_fp32_routing_weights_with_bf16_experts_keep_torchs_precision() -> None:
    """Their gradient is in fp32 but passes through 16 bits; it must be as near as torch's in the same dtypes."""
    spec = pykern.catalogue()["moe_mlp"]
    exact = (random(64, 32), random(4, 48, 32) / 6, random(4, 32, 24) / 5, random(64, 2).abs())
    exact = (*(t.bfloat16().double() for t in exact[:3]), exact[3].float().double())
    ids = torch.rand(64, 4).argsort(-1)[:, :2]
    incoming = random(64, 32, dtype=torch.bfloat16)

    def weight_gradient(function: object, args: tuple[Tensor, ...]) -> Tensor:
        weights = args[3].clone().requires_grad_()
        out = function(*args[:3], weights, ids, None, None, "silu")
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, weights, incoming.to(out.dtype))[0].double()

    mixed = (*(t.bfloat16() for t in exact[:3]), exact[3].float())
    truth = weight_gradient(spec.reference, exact)
    ours = weight_gradient(spec, mixed) - truth
    theirs = weight_gradient(spec.peers["torch"], mixed) - truth
    assert 0 < ours.norm() <= 2 * theirs.norm()
    assert theirs.norm() < 0.1 * truth.norm()


def test_permuting_tokens_and_experts_changes_nothing_else() -> None:
    x, gate_up, down = random(13, 6), random(5, 8, 6), random(5, 6, 4)
    weights, ids = moe_route(random(13, 5), 2)
    out = moe_mlp(x, gate_up, down, weights, ids)
    order, experts = torch.randperm(13), torch.randperm(5)
    assert_near(moe_mlp(x[order], gate_up, down, weights[order], ids[order]), out[order])
    renamed = experts.argsort()[ids]
    assert_near(moe_mlp(x, gate_up[experts], down[experts], weights, renamed), out)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    x, logits = random(tokens, 6, grad=True), random(tokens, 4, grad=True)
    gate_up, down = random(4, 8, 6, grad=True), random(4, 6, 4, grad=True)
    weights, ids = moe_route(logits, 2, renormalize=False)
    out = moe_mlp(x, gate_up, down, weights, ids)
    loss = out.sum() + moe_load_balancing_loss(logits, ids, 4) + moe_z_loss(logits)
    loss.backward()
    assert out.shape == (tokens, 6) and loss.isfinite()
    for leaf in (x, logits, gate_up, down):
        assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all()
        assert leaf.grad.ne(0).any() == (tokens > 0)


def test_second_derivatives_of_a_layer_with_biases_drops_and_empty_experts() -> None:
    ids = torch.tensor([[0, 3], [3, -1], [0, 3]])

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return moe_mlp(x, w1, w2, weights, ids, gate_up_bias=b1, down_bias=b2, activation="gelu")

    shapes = ((3, 4), (4, 6, 4), (4, 4, 3), (3, 2), (4, 6), (4, 4))
    leaves = tuple(random(*shape, grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(layer, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


def test_mixed_devices_are_refused_by_name() -> None:
    x, logits, ids = random(4, 6), random(4, 3), torch.zeros(4, 2, dtype=torch.long)
    gate_up, down, offs = random(3, 8, 6), random(3, 6, 4), torch.tensor([1, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="down: expected device cpu .*got meta"):
        moe_mlp(x, gate_up, down.to("meta"), random(4, 2), ids)
    with pytest.raises(ValueError, match="offs: expected device cpu .*got meta"):
        grouped_mm(x, gate_up.mT, offs=offs.to("meta"))
    with pytest.raises(ValueError, match="selection_bias: expected device cpu .*got meta"):
        moe_route(logits, 2, selection_bias=random(3).to("meta"))
    with pytest.raises(ValueError, match="expert_ids: expected device cpu .*got meta"):
        moe_load_balancing_loss(logits, ids.to("meta"), 3)


# --- together


def test_a_whole_layer_compiles_in_one_graph_for_every_token_count() -> None:
    gate_up, down = random(4, 12, 8, dtype=torch.float32, grad=True), random(4, 8, 6, dtype=torch.float32, grad=True)
    router = random(4, 8, dtype=torch.float32, grad=True)

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, router)
        weights, ids = moe_route(logits, 2, score="sigmoid", num_groups=2, top_groups=2)
        order, inverse, offs = moe_sort(ids, 4)
        rows = grouped_mm(x, gate_up.mT, offs=offs, gather=order // 2)
        mlp = moe_mlp(x, gate_up, down, weights, ids) + rows[inverse].view(-1, 2, 12).sum((1, 2)).unsqueeze(1)
        return mlp, moe_load_balancing_loss(logits, ids, 4, score="sigmoid") + moe_z_loss(logits)

    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    leaves = (gate_up, down, router)
    for tokens in (6, 11, 3, 29, 2):
        x = random(tokens, 8, dtype=torch.float32)
        results = []
        for function in (compiled, layer):
            out, loss = function(x)
            results.append((out, loss, *torch.autograd.grad(out.square().sum() + loss, leaves)))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
    assert len(graphs) <= 2, "a new token count compiles anew"
    torch._dynamo.reset()
