"""Low-rank adapters against plain formulas: dropout, DoRA, 4-bit bases, an adapter for each token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykern.ops.dequantize_4bit import dequantize_4bit
from pykern.ops.lora import lora_linear
from pykern.ops.multi_lora import multi_lora_linear
from pykern.ops.quantize_4bit import quantize_4bit


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = True, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).requires_grad_(grad)


def layer(out: int = 24, n: int = 40, rank: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """weight, lora_a, lora_b, bias"""
    return (
        normal(out, n, seed=1, dtype=dtype),
        normal(rank, n, seed=2, dtype=dtype),
        normal(out, rank, seed=3, dtype=dtype),
        normal(out, seed=4, dtype=dtype),
    )


def assert_same(ours: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], eps: float = 1e-12) -> None:
    """Values and gradients, relative to their norm."""
    dy = normal(*expected.shape, seed=9, grad=False).to(ours.dtype)
    found = torch.autograd.grad(ours, leaves, dy, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, dy.to(expected.dtype))
    for got, exact in zip((ours, *found), (expected, *wanted), strict=True):
        assert exact.norm() > 0 and got.shape == exact.shape
        assert (got - exact).norm() <= eps * exact.norm()


@pytest.mark.parametrize("rank", [1, 6, 512])
def test_lora_is_the_plain_formula(rank: int) -> None:
    weight, a, b, bias = layer(rank=rank)
    x = normal(2, 5, 40, seed=5)
    y = lora_linear(x, weight, a, b, bias, scaling=0.25)
    assert_same(y, x @ (weight + 0.25 * b @ a).T + bias, (x, weight, a, b, bias))


def test_frozen_inputs_get_no_gradient() -> None:
    weight, a, b, bias = layer()
    x = normal(3, 40, seed=5, grad=False)
    y = lora_linear(x, weight.detach(), a, b, bias.detach())
    y.sum().backward()
    assert a.grad is not None and b.grad is not None
    assert weight.grad is None and bias.grad is None and x.grad is None


def kept(x: Tensor, dropout_p: float, **options: bool) -> Tensor:
    """The factor that each element of x went into the adapter with, by an adapter that is the identity."""
    n = x.shape[-1]
    eye = torch.eye(n, dtype=x.dtype)
    return lora_linear(x, torch.zeros(n, n, dtype=x.dtype), eye, eye, dropout_p=dropout_p, **options) / x


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_right_share_independently(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(512, 128)
    factors = kept(x, p)
    assert ((factors == 0) | ((factors - 1 / (1 - p)).abs() < 1e-6)).all()
    keep = (factors > 0).double()
    # Five standard deviations of a binomial's mean, over all elements and over each column.
    assert abs(keep.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
    assert ((keep.mean(0) - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / 512)).all()
    # Neighbours along both dimensions, and two calls, are uncorrelated.
    again = (kept(x, p) > 0).double()
    for one, other in ((keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1]), (keep, again)):
        correlation = ((one - (1 - p)) * (other - (1 - p))).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_dropout_is_repeatable_and_can_be_turned_off() -> None:
    x = normal(6, 40, seed=5, grad=False)
    torch.manual_seed(3)
    first = kept(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, kept(x, 0.5))
    assert (kept(x, 0.5, training=False) == 1).all()
    assert (kept(x, 0.0) == 1).all()
    assert not kept(x, 1.0).any()
    state = torch.get_rng_state()
    kept(x, 0.5, training=False)
    assert torch.equal(state, torch.get_rng_state()), "without dropout nothing is drawn"


def test_dropout_drops_by_logical_element() -> None:
    x = normal(30, 40, seed=5, grad=False)
    torch.manual_seed(3)
    packed = kept(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(packed, kept(x.T.contiguous().T, 0.5))
    torch.manual_seed(3)
    assert torch.equal(packed, kept(x.reshape(5, 6, 40), 0.5).reshape(30, 40))


def test_gradients_with_dropout() -> None:
    weight, a, b, bias = layer()
    x = normal(7, 40, seed=5)
    torch.manual_seed(3)
    mask = kept(torch.ones(7, 40, dtype=torch.float64), 0.4)
    torch.manual_seed(3)
    y = lora_linear(x, weight, a, b, bias, scaling=2.0, dropout_p=0.4)
    assert_same(y, F.linear(x, weight, bias) + 2.0 * (x * mask) @ a.T @ b.T, (x, weight, a, b, bias))


def test_dropout_under_checkpointing_and_compile() -> None:
    weight, a, b, bias = layer()
    x = normal(7, 40, seed=5)

    def forward(x: Tensor) -> Tensor:
        return lora_linear(x, weight, a, b, bias, dropout_p=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = []
    for run in (forward, lambda x: checkpoint(forward, x, use_reentrant=False), compiled):
        torch.manual_seed(5)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, a, b))))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    torch._dynamo.reset()


def peft_dora(
    x: Tensor, dropped: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """The arithmetic of PEFT's DoRA layer: the base is rescaled on what dropout leaves of x."""
    norm = (weight + scaling * b @ a).norm(dim=1).detach()
    factor = magnitude / norm
    update = (factor - 1) * F.linear(dropped, weight) + factor * (dropped @ a.T @ b.T) * scaling
    return F.linear(x, weight, bias) + update


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dora_is_pefts(p: float) -> None:
    weight, a, b, bias = layer()
    weight = weight.detach()
    x, magnitude = normal(7, 40, seed=5), normal(24, seed=6)
    torch.manual_seed(3)
    mask = kept(torch.ones(7, 40, dtype=torch.float64), p)
    torch.manual_seed(3)
    y = lora_linear(x, weight, a, b, bias, scaling=0.5, dropout_p=p, magnitude=magnitude)
    assert_same(y, peft_dora(x, x * mask, weight, a, b, bias, 0.5, magnitude), (x, a, b, bias, magnitude))


def test_dora_at_its_start_changes_nothing_and_survives_an_empty_row() -> None:
    weight, a, b, bias = (t.detach() for t in layer())
    weight[3] = 0
    magnitude = weight.norm(dim=1).requires_grad_()
    b = torch.zeros_like(b).requires_grad_()
    x = normal(7, 40, seed=5)
    y = lora_linear(x, weight, a, b, bias, magnitude=magnitude)
    assert (y - F.linear(x, weight, bias)).norm() <= 1e-6 * y.norm()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), (x, b, magnitude)))


def test_dora_magnitude_must_fit() -> None:
    weight, a, b, _ = layer()
    for wrong in (torch.ones(()), torch.ones(24, 1), torch.ones(40)):
        with pytest.raises(ValueError, match=r"magnitude: expected shape \(24,\), got"):
            lora_linear(normal(2, 40, seed=5), weight, a, b, magnitude=wrong)
    with pytest.raises(TypeError, match="magnitude: expected dtype torch.float64 or torch.float32, got torch.int64"):
        lora_linear(normal(2, 40, seed=5), weight, a, b, magnitude=torch.ones(24, dtype=torch.int64))
    with pytest.raises(ValueError, match="magnitude: expected device cpu as the input, got meta"):
        lora_linear(normal(2, 40, seed=5), weight, a, b, magnitude=torch.ones(24, device="meta"))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_fp32_adapter_on_a_16_bit_base(base: torch.dtype) -> None:
    weight, _, _, bias = layer(dtype=base)
    _, a, b, _ = layer(dtype=torch.float32)
    x = normal(7, 40, seed=5, dtype=base)
    y = lora_linear(x, weight.detach(), a, b, bias.detach(), scaling=0.5)
    assert y.dtype == base
    dy = normal(7, 24, seed=9, dtype=base, grad=False)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    assert dx.dtype == base and da.dtype == db.dtype == torch.float32
    wide = dy.double() @ b.double()
    assert (da - 0.5 * wide.T @ x.double()).norm() <= 1e-5 * da.norm(), (
        "an fp32 adapter's gradient is rounded to 16 bits"
    )


@pytest.mark.parametrize(
    "options", [{}, {"double_quant": True}, {"quant_type": "fp4"}, {"quant_type": "int4", "symmetric": False}]
)
def test_4bit_base_is_the_dequantised_one(options: dict) -> None:
    weight, a, b, bias = layer(dtype=torch.float32)
    packed = quantize_4bit(weight, blocksize=32, **options)
    x, magnitude = normal(7, 40, seed=5, dtype=torch.float32), normal(24, seed=6, dtype=torch.float32)
    for extra in ({}, {"magnitude": magnitude}, {"dropout_p": 0.5}):
        torch.manual_seed(3)
        y = lora_linear(x, packed, a, b, bias, scaling=0.5, **extra)
        torch.manual_seed(3)
        expected = lora_linear(x, dequantize_4bit(packed), a, b, bias, scaling=0.5, **extra)
        assert_same(y, expected, (x, a, b, bias, *([magnitude] if "magnitude" in extra else [])), eps=1e-6)


def test_4bit_base_compiles() -> None:
    weight, a, b, bias = layer(dtype=torch.float32)
    x = normal(7, 40, seed=5, dtype=torch.float32)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, quantize_4bit(weight, double_quant=True), a, b, bias, magnitude=bias.abs() + 1)

    torch._dynamo.reset()
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(weight, x)
    assert_same(y, step(weight, x), (x, a, b, bias), eps=1e-6)
    torch._dynamo.reset()


def adapters(count: int = 3, out: int = 24, n: int = 40, rank: int = 4) -> tuple[Tensor, Tensor]:
    return normal(count, rank, n, seed=12), normal(count, out, rank, seed=13)


def by_token(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, ids: Tensor, bias: Tensor, scaling: Tensor) -> Tensor:
    rows = []
    for token, i in zip(x, ids.tolist(), strict=True):
        row = weight @ token + bias
        rows.append(row + scaling[i] * (b[i] @ (a[i] @ token)) if 0 <= i < len(a) else row)
    return torch.stack(rows)


def test_multi_lora_is_a_loop_over_tokens() -> None:
    weight, _, _, bias = layer()
    (a, b), x, scaling = adapters(), normal(9, 40, seed=5), normal(3, seed=14)
    ids = torch.tensor([2, -1, 0, 0, 1, -7, 2, 3, 1 << 40])
    y = multi_lora_linear(x, weight, a, b, ids, bias, scaling=scaling)
    assert_same(y, by_token(x, weight, a, b, ids, bias, scaling), (x, weight, a, b, bias, scaling))


def test_multi_lora_of_one_adapter_is_lora() -> None:
    weight, a, b, bias = layer()
    x = normal(2, 5, 40, seed=5)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    y = multi_lora_linear(x, weight, a[None], b[None], ids, bias, scaling=0.5)
    assert_same(y, lora_linear(x, weight, a, b, bias, scaling=0.5), (x, weight, a, b, bias))
    assert torch.equal(y, multi_lora_linear(x, weight, a[None], b[None], ids.reshape(-1), bias, scaling=0.5))


def test_multi_lora_smaller_ranks_are_padded() -> None:
    weight, a, b, bias = layer(rank=6)
    x, ids = normal(5, 40, seed=5), torch.zeros(5, dtype=torch.int64)
    padded = F.pad(a, (0, 0, 0, 10))[None], F.pad(b, (0, 10))[None]
    assert_same(multi_lora_linear(x, weight, *padded, ids, bias), lora_linear(x, weight, a, b, bias), (x, a, b))


def test_a_broken_adapter_reaches_only_its_own_tokens() -> None:
    weight, _, _, bias = layer()
    ids = torch.tensor([0, 1, 2, -1, 1])
    for broken in ("a", "b"):
        a, b = (t.detach().clone() for t in adapters())
        (a if broken == "a" else b)[1, 0, 0] = math.nan
        a, b, x = a.requires_grad_(), b.requires_grad_(), normal(5, 40, seed=5)
        y = multi_lora_linear(x, weight, a, b, ids, bias)
        healthy = ids != 1
        assert y[healthy].isfinite().all() and y[~healthy].isnan().any()
        dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
        assert dx[healthy].isfinite().all()
        assert all(g[i].isfinite().all() and g[i].any() for g in (da, db) for i in (0, 2))


def test_multi_lora_checks_ids_on_the_host_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, *_ = layer()
    (a, b), x = adapters(), normal(3, 40, seed=5)
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    multi_lora_linear(x, weight, a, b, torch.tensor([-1, 0, 2]))
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"adapter_ids: expected ids from -1 to 2, got {wrong}"):
            multi_lora_linear(x, weight, a, b, torch.tensor([0, wrong, 1]))


def test_multi_lora_on_a_4bit_base() -> None:
    weight, _, _, bias = layer()
    packed = quantize_4bit(weight, blocksize=32, double_quant=True)
    (a, b), x = adapters(), normal(5, 40, seed=5)
    ids = torch.tensor([1, -1, 0, 2, 2])
    y = multi_lora_linear(x, packed, a, b, ids, bias, scaling=0.5)
    expected = multi_lora_linear(x, dequantize_4bit(packed), a, b, ids, bias, scaling=0.5)
    assert_same(y, expected, (x, a, b, bias))
