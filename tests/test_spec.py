"""The spec engine: what no single declaration can show."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

import pykern
from pykern import ops
from pykern.ops._spec import OpSpec, define, define_backward
from pykern.testing import checks

SCALE = "spec_test::scale(Tensor x, float factor, *, str? backend=None) -> (Tensor y)"


@pytest.fixture(scope="module")
def scale() -> Iterator[OpSpec]:
    """An op with a backend that refuses large factors, and one that is never available."""
    yield define(
        SCALE,
        reference=lambda x, factor: x * factor,
        fake=lambda x, factor: x.new_empty(x.shape),
        backends={"picky": lambda x, factor: x.contiguous() * factor, "cuda": lambda x, factor: x * factor},
        supports={"picky": lambda x, factor: "factors above 10 are too much" if factor > 10 else None},
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_first_backend_that_supports_the_call_serves_it(scale: OpSpec, x: torch.Tensor) -> None:
    scale.served.clear()
    assert torch.equal(scale(x, 2.0), x * 2)
    assert torch.equal(scale(x, 20.0), x * 20)
    assert scale.served == {"picky": 1, "reference": 1}


def test_explain_runs_nothing_and_gives_reasons(scale: OpSpec, x: torch.Tensor) -> None:
    scale.served.clear()
    explanation = pykern.explain("spec_test::scale", x, 20.0)
    assert explanation.chosen == "reference"
    assert explanation.reasons["picky"] == "factors above 10 are too much"
    assert "CUDA tensors" in explanation.reasons["cuda"]
    assert "not picky: factors above 10" in str(explanation)
    assert not scale.served


def test_explain_takes_what_the_public_function_takes(x: torch.Tensor) -> None:
    explanation = pykern.explain("layer_norm", x.double(), (8,))
    assert explanation.op == "pykern::layer_norm"
    assert explanation.chosen == "reference"
    with pytest.raises(ValueError, match="op: expected one of .*layer_norm"):
        pykern.explain("nonesuch", x)


def test_forced_backend_that_cannot_serve_raises_with_the_reason(scale: OpSpec, x: torch.Tensor) -> None:
    with pykern.backend("picky"), pytest.raises(pykern.BackendError, match="'picky' .*factors above 10"):
        scale(x, 20.0)
    with pykern.backend("cuda"), pytest.raises(pykern.BackendError, match="serves CUDA tensors, not cpu"):
        scale(x, 2.0)


def test_backend_holds_until_changed_and_blocks_restore_it(scale: OpSpec, x: torch.Tensor) -> None:
    pykern.backend("reference")
    try:
        with pykern.backend("picky"):
            scale.served.clear()
            scale(x, 2.0)
            assert scale.served == {"picky": 1}
        scale(x, 2.0)
        assert scale.served == {"picky": 1, "reference": 1}
    finally:
        pykern.backend(None)
    with pytest.raises(TypeError, match="name: expected a backend's name or None, got int"):
        pykern.backend(3)


def test_environment_forces_a_backend() -> None:
    code = (
        "import torch, pykern; pykern.ops.layer_norm(torch.ones(2, 4), (4,));"
        "print(pykern.catalogue()['layer_norm'].served)"
    )
    environment = {"PATH": "", "PYKERN_BACKEND": "reference"}
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert result.stdout.strip() == "{'reference': 1}", result.stderr


def test_declaring_twice_is_refused(scale: OpSpec) -> None:
    with pytest.raises(ValueError, match="spec_test::scale is declared already"):
        define(SCALE, reference=lambda x, factor: x, fake=lambda x, factor: x)


def test_schema_without_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must end in '\*, str\? backend=None'"):
        define("spec_test::other(Tensor x) -> (Tensor y)", reference=lambda x: x, fake=lambda x: x)


def test_reference_that_returns_its_input_is_copied(x: torch.Tensor) -> None:
    spec = define(
        "spec_test::identity(Tensor x, *, str? backend=None) -> (Tensor y, Tensor z)",
        reference=lambda x: (x, x.t()),
        fake=lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[::-1])),
    )
    y, z = spec(x)
    assert y.data_ptr() != x.data_ptr() and z.data_ptr() not in (x.data_ptr(), y.data_ptr())
    assert z.is_contiguous() and torch.equal(z, x.t())


def test_one_tensor_for_two_arguments_gets_both_gradients() -> None:
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 6, dtype=torch.float64)
    got = torch.autograd.grad(ops.layer_norm(x, (6,), values, values).square().sum(), values)[0]
    expected = torch.autograd.grad(torch.layer_norm(x, (6,), values, values).square().sum(), values)[0]
    assert torch.allclose(got, expected, rtol=1e-12)


def test_backward_op_has_a_formula_of_its_own() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    weight, dy = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            rstd = torch.ops.pykern.rms_norm(x, weight, 1e-5, 0.0, False)[1]
        return torch.ops.pykern.rms_norm_backward(dy, x, weight, 1e-5, 0.0, False, rstd, [True, True])

    assert gradcheck(backward, [t.requires_grad_() for t in (dy, x, weight)])


def test_a_hand_written_backward_may_differentiate_something_simpler() -> None:
    backward = define_backward(
        "spec_test::half_sum_backward(Tensor? dy, Tensor s, bool[1] output_mask, *, str? backend=None) -> (Tensor da)",
        primal=lambda s: s * 0.5,
        wrt=("s",),
    )
    spec = define(
        "spec_test::half_sum(Tensor a, Tensor b, *, str? backend=None) -> (Tensor y, Tensor s)",
        reference=lambda a, b: ((a + b) * 0.5, a + b),
        fake=lambda a, b: (a.new_empty(a.shape), a.new_empty(a.shape)),
        backward=backward,
        tied={"b": "a"},
    )
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, s = spec(a, b)
    assert not s.requires_grad
    assert gradcheck(lambda a, b: spec(a, b)[0], [a, b])
    assert all(torch.equal(g, torch.full((3,), 0.5, dtype=torch.float64)) for g in torch.autograd.grad(y.sum(), [a, b]))


def test_sizes_known_only_at_run_time_trace() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x[x[:, 0] > 0], (8,), weight)

    x, weight = torch.randn(16, 8), torch.randn(8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), function(x, weight))


def test_changing_lengths_compile_a_bounded_number_of_times() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w: ops.layer_norm(x, (8,), w), fullgraph=True, backend=counter)
    for rows in (2, 3, 5, 7, 11, 13):
        compiled(torch.randn(rows, 8), torch.randn(8))
    assert counter.frame_count == 2


def test_compiled_through_inductor_equals_eager(x: torch.Tensor) -> None:
    weight = torch.randn(8, requires_grad=True)
    compiled = torch.compile(lambda x, w: ops.layer_norm(torch.sin(x), (8,), w).square().sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(x, weight), weight)[0]
    expected = torch.autograd.grad(ops.layer_norm(torch.sin(x), (8,), weight).square().sum(), weight)[0]
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_activation_checkpointing_repeats_the_op(x: torch.Tensor) -> None:
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(ops.layer_norm(leaf, (8,)).square().sum(), leaf)[0]
    again = torch.utils.checkpoint.checkpoint(lambda t: ops.layer_norm(t, (8,)).square(), leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), leaf)[0], plain)


def test_flop_counter_uses_the_cost(x: torch.Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        ops.layer_norm(x, (8,))
    assert counter.get_total_flops() == pykern.catalogue()["layer_norm"].cost(x, None, None, 1e-5)[0]


def test_normalized_shape_of_several_dimensions(x: torch.Tensor) -> None:
    x, weight, bias = x.view(4, 2, 4), torch.randn(2, 4), torch.randn(2, 4)
    expected = torch.nn.functional.layer_norm(x, (2, 4), weight, bias)
    assert torch.allclose(ops.layer_norm(x, (2, 4), weight, bias), expected, atol=1e-6)
    normed, summed = ops.add_layer_norm(x, x, (2, 4), weight, bias)
    assert torch.equal(summed, x + x) and normed.shape == x.shape
    with pytest.raises(ValueError, match=r"normalized_shape: expected the last dimensions of .* got \(3, 4\)"):
        ops.layer_norm(x, (3, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \(2, 4\) as normalized_shape, got \(8,\)"):
        ops.layer_norm(x, (2, 4), torch.randn(8))


def test_an_op_in_a_file_outside_the_package_gets_its_tests(tmp_path: Path) -> None:
    source = textwrap.dedent("""
        import torch
        from pykern.ops._spec import Sample, define

        def samples(kind, make):
            yield Sample("ragged", (make(3, 5), 2.0))

        define(
            "mypkg::triple(Tensor x, float factor, *, str? backend=None) -> (Tensor y)",
            reference=lambda x, factor: x * (3.0 * factor),
            fake=lambda x, factor: x.new_empty(x.shape),
            backends={"fast": lambda x, factor: FAST},
            samples=samples,
        )
    """)
    good, bad = tmp_path / "good_op.py", tmp_path / "bad_op.py"
    good.write_text(source.replace("FAST", "x.contiguous() * (3.0 * factor)"))
    bad.write_text(source.replace("FAST", "x.contiguous() * (3.1 * factor)"))
    for path, code in ((good, 0), (bad, 1)):
        result = subprocess.run(
            [sys.executable, "-m", "pykern.cli", "check", str(path)], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == code, result.stdout + result.stderr
        assert "mypkg::triple" in result.stdout and "accuracy" in result.stdout
    assert "relative error" in result.stdout


def test_a_backend_added_later_is_chosen(x: torch.Tensor) -> None:
    spec = define(
        "spec_test::later(Tensor x, *, str? backend=None) -> (Tensor y)",
        reference=lambda x: x + 1,
        fake=lambda x: x.new_empty(x.shape),
    )
    spec(x)
    spec.add_backend("mine", lambda x: x.contiguous() + 1, lambda x: "no vectors" if x.dim() == 1 else None)
    spec(x)
    spec(x[0])
    assert spec.served == {"reference": 2, "mine": 1}
    with pytest.raises(ValueError, match="spec_test::later has a backend 'mine' already"):
        spec.add_backend("mine", lambda x: x)


def test_residual_of_another_width_under_autocast() -> None:
    linear, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        normed, summed = ops.add_rms_norm(linear(x), x, (8,), torch.ones(8))
        branch = linear(x)
    assert branch.dtype == torch.bfloat16 and summed.dtype == torch.float32
    assert torch.equal(summed, branch + x) and torch.equal(normed, ops.rms_norm(summed, (8,), torch.ones(8)))
    with pytest.raises(TypeError, match="residual: expected dtype torch.bfloat16, got torch.float32"):
        ops.add_rms_norm(branch, x, (8,))


def test_autocast_holds_inside_func_transforms() -> None:
    query = torch.randn(1, 2, 4, 8)
    seen = []

    def loss(q: torch.Tensor) -> torch.Tensor:
        out = ops.attention(q, query, query)
        seen.append(out.dtype)
        return out.float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        torch.func.grad(loss)(query)
        loss(query)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_tangents_pass_through_a_backward() -> None:
    x, dy = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    y = ops.layer_norm(x, (8,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dy, dy.cos())
        gradient = torch.autograd.grad(y, x, dual, retain_graph=True)[0]
        tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    expected = torch.autograd.grad(y, x, dy.cos())[0]  # the gradient is linear in dy
    assert (tangent - expected).norm() <= 1e-6 * expected.norm()


def test_an_offset_that_wraps_is_noticed() -> None:
    def wrapping(x: torch.Tensor) -> torch.Tensor:
        offsets = [i * x.stride(0) + torch.arange(x.shape[1]) for i in range(x.shape[0])]
        low = torch.stack(offsets).to(torch.int32).long() % 2**31  # what 32 bits leave of them
        return x.as_strided((2**31,), (1,))[low] if x.stride(0) > 100 else x.clone()

    spec = define(
        "pykern_test::wrapping(Tensor x, *, str? backend=None) -> (Tensor y)",
        reference=lambda x: x.clone(),
        fake=lambda x: x.new_empty(x.shape),
        backends={"cpu": wrapping},
    )
    x = torch.randn(3, 5)
    checks.check_far(spec, "reference", [x])
    with pytest.raises(AssertionError, match="strided arguments change the result"):
        checks.check_far(spec, "cpu", [x])
