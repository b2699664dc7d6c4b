"""The fused focal loss against its definition in float64; the same cases for every implementation that can run.

test_focal_triton.py runs this file again for the Triton kernel: TRITON_INTERPRET=1 or FOCAL_ON_CUDA=1 select it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.ops.focal import Implementation, choose
from detection.ops.focal_cpu import _choose, _grouped, focal_cpu, plan_of
from detection.ops.focal_elements import FocalShape, GammaTable, focal_elements, focal_values_and_gradients

FILES = Path(__file__).parents[1] / "data" / "files"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = os.environ.get("FOCAL_ON_CUDA") == "1"
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
BACKENDS = ["triton"] if INTERPRETED or ON_CUDA else ["cpu", "cpu, small"]

GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.3, 5.0, -1.3]
# The gradient against the exact one rounded to its dtype. The interpreter drops the low bits of a bfloat16 instead.
BF16_NORM = 8e-3 if INTERPRETED else 1e-3
# The slope has the third power of exp2's error, which numpy brings to 1e-7 with some processors' vector code.
FP32_ELEMENT = 1.5e-6 if INTERPRETED else 1e-6
TOLERANCES = {  # dtype: (loss, gradient in norm, gradient per element)
    torch.float32: (1e-6, 1e-6, FP32_ELEMENT),
    torch.bfloat16: (1e-5, BF16_NORM, 1e-2),
    torch.float16: (1e-5, 1e-3, 1e-2),
}


def fused(
    backend: str,
    logits: Tensor,
    labels: Tensor,
    shape: FocalShape,
    group: Tensor | None = None,
    scale: float = 1.0,
    gradient: Tensor | None = None,
) -> tuple[float, Tensor, list[int]]:
    """(loss, gradient, [positive, non-finite])."""
    if gradient is None:
        gradient = torch.full_like(logits, torch.nan)
    if backend != "triton":
        # Small levels take the exact formula; the cases of "cpu" take the blocks' whatever their size.
        with pytest.MonkeyPatch.context() as patch:
            if backend == "cpu":
                patch.setattr("detection.ops.focal_cpu._SMALL", 0)
            found = focal_cpu(logits, labels, shape, group, scale, gradient)
        return found.loss, gradient, [found.positive, found.nonfinite]
    from detection.ops.focal_triton import focal_triton

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    z = logits.to(DEVICE)
    out = z if gradient is logits else torch.full_like(z, torch.nan)
    assert z.stride() == logits.stride()
    total, counts = focal_triton(z, labels.to(DEVICE), shape, move(group), torch.tensor(scale, device=DEVICE), out)
    gradient.copy_(out)
    return total.item(), gradient, counts.tolist()


def exact(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None = None, scale: float = 1.0
) -> tuple[float, Tensor]:
    """Loss and gradient by autograd through the definition in float64."""
    if isinstance(shape.gamma, GammaTable):
        table = GammaTable(shape.gamma.gamma.double(), shape.gamma.edge_logit.double())
        shape = FocalShape(shape.alpha, table, shape.smoothing)
    z = logits.detach().double().requires_grad_()
    loss = focal_elements(z, labels, shape, group).sum() * scale
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.item(), gradient


def compare(
    gradient: Tensor, wanted: Tensor, loss: float, wanted_loss: float, dtype: torch.dtype, slack: float = 1.0
) -> None:
    loss_tolerance, norm_tolerance, tolerance = TOLERANCES[dtype]
    assert loss == pytest.approx(wanted_loss, rel=loss_tolerance, abs=1e-30)
    rounded = wanted.to(dtype).double()
    assert (gradient.double() - rounded).norm() <= norm_tolerance * rounded.norm()
    error = gradient.double() - wanted
    # Half types flush what is below their range; float32 loses nothing here but true zeros.
    smallest = {torch.float32: 1e-35, torch.bfloat16: 1e-35, torch.float16: 6.2e-5}[dtype]
    allowed = slack * tolerance * wanted.abs() + smallest
    assert (error.abs() <= allowed).all(), (error.abs() / wanted.abs().clamp(min=1e-35)).max()


def level(n: int, a: int, k: int, mean: float = -3.0, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which some per cent are positive and some ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, a, k, generator=generator) * spread + mean
    labels = torch.full((n, a), k, dtype=torch.int32)
    draw = torch.rand(n, a, generator=generator)
    classes = torch.randint(0, k, (n, a), generator=generator, dtype=torch.int32)
    labels = torch.where(draw < 0.1, classes, labels)
    return logits, labels.masked_fill_(draw > 0.9, -1)


def random_table(groups: int, ranges: int, seed: int = 0) -> GammaTable:
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.randn(ranges - 1, generator=generator) * 2 - 2).sort().values
    return GammaTable(torch.rand(groups, 2, ranges, generator=generator) * 7 - 2, edges)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_equals_the_definition(backend: str, gamma: float, alpha: float) -> None:
    for spread, mean in ((0.2, -4.6), (1.0, -4.6), (4.0, 0.0)):
        logits, labels = level(2, 41, 20, mean, spread)
        shape = FocalShape(alpha, gamma)
        loss, gradient, counts = fused(backend, logits, labels, shape, scale=0.37)
        wanted_loss, wanted = exact(logits, labels, shape, scale=0.37)
        # One rounding of p is 1 + gamma of its power, and the kernel's exp(gamma log q) has one of the exponent too.
        slack = max(1.0, (1 + gamma) / 3) * (4 if backend == "triton" and gamma not in range(6) else 1)
        compare(gradient, wanted, loss, wanted_loss, torch.float32, slack)
        assert counts == [int(((labels >= 0) & (labels < 20)).sum()), 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("a", "k"), [(1, 1), (41, 1), (1023, 1), (1, 41), (41, 3), (1023, 2), (37, 80)])
def test_odd_sizes_and_dtypes(backend: str, dtype: torch.dtype, a: int, k: int) -> None:
    logits, labels = level(2, a, k, seed=a)
    logits = logits.to(dtype)
    shape = FocalShape(0.25, 2.0)
    loss, gradient, _ = fused(backend, logits, labels, shape)
    wanted_loss, wanted = exact(logits, labels, shape)
    compare(gradient, wanted, loss, wanted_loss, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("base", [None, 2.0])
def test_tables_equal_a_scalar_loop(backend: str, grouped: bool, smoothing: float, base: float | None) -> None:
    logits, labels = level(2, 41, 7)
    table = random_table(2, 6)
    if base is not None:
        table.gamma[:, :, 0] = base
    group = (torch.arange(82).view(2, 41) % 2).to(torch.int8) if grouped else None
    loss, gradient, _ = fused(backend, logits, labels, FocalShape(0.25, table, smoothing), group)

    wanted_loss, wanted = 0.0, torch.zeros_like(logits, dtype=torch.float64)
    for n, a, k in np.ndindex(2, 41, 7):
        z, label, g = logits[n, a, k].item(), int(labels[n, a]), 0 if group is None else int(group[n, a])
        index = sum(z >= edge for edge in table.edge_logit.tolist())
        if label < 0:
            continue
        share = smoothing / 2
        outcomes = [(1, 1 - share), (0, share)] if label == k else [(0, 1.0)]
        for outcome, part in outcomes:
            scalar = FocalShape(0.25, table.gamma[g, outcome, index].item())
            one = torch.full((1, 1, 1), z, dtype=torch.float64)
            value, slope = focal_values_and_gradients(one, torch.tensor([[1 - outcome]]), scalar)
            wanted_loss += part * value.item()
            wanted[n, a, k] += part * slope.item()
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edges", [[-torch.inf, 0.0], [-2.0, torch.inf], [-1.0, -1.0], [-torch.inf, torch.inf]])
def test_edges_may_be_infinite_or_equal(backend: str, edges: list[float]) -> None:
    logits, labels = level(1, 41, 5)
    logits.view(-1)[:3] = torch.tensor([-1.0, torch.nextafter(torch.tensor(-1.0), torch.tensor(-2.0)), 0.0])
    table = GammaTable(torch.tensor([[[2.0, 0.5, 3.0], [1.0, -1.0, 0.0]]]), torch.tensor(edges))
    shape = FocalShape(0.25, table)
    loss, gradient, _ = fused(backend, logits, labels, shape)
    wanted_loss, wanted = exact(logits, labels, shape)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_far_logits_stay_finite(backend: str, gamma: float) -> None:
    z = torch.tensor([-1e4, -100.0, -50.0, -20.0, 0.0, 20.0, 50.0, 100.0, 1e4])
    logits = z.view(1, -1, 1).expand(2, -1, 1).contiguous()
    labels = torch.tensor([[0] * 9, [1] * 9], dtype=torch.int32)
    shape = FocalShape(0.25, gamma)
    loss, gradient, counts = fused(backend, logits, labels, shape)
    wanted_loss, wanted = exact(logits, labels, shape)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5, atol=1e-30)
    assert counts[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_infinite_logits_have_their_limits(backend: str, gamma: float) -> None:
    logits = torch.tensor([torch.inf, -torch.inf]).view(1, 2, 1)
    right, wrong = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    loss, gradient, counts = fused(backend, logits, right, FocalShape(0.25, gamma))
    assert (loss, gradient.abs().max().item(), counts) == (0.0, 0.0, [1, 0])
    loss, gradient, counts = fused(backend, logits, wrong, FocalShape(0.25, gamma))
    assert loss == torch.inf
    assert counts == [1, 2]
    assert gradient.flatten().tolist() == pytest.approx([0.75, -0.25])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [2.0, 0.0, -1.0])
def test_a_nan_is_reported_and_stays_where_it_is(backend: str, gamma: float) -> None:
    logits, labels = level(2, 41, 20)
    labels[1, 5], labels[1, 6] = 20, -1
    logits[1, 5, 3] = torch.nan
    logits[1, 6, 3] = torch.nan  # of an ignored anchor: nobody reads it
    loss, gradient, counts = fused(backend, logits, labels, FocalShape(0.25, gamma))
    assert np.isnan(loss)
    assert counts[1] == 1
    assert gradient[1, 5, 3].isnan()
    assert gradient.isnan().sum() == 1
    table = GammaTable(torch.tensor([[[2.0, 1.0], [2.0, 1.0]]]), torch.tensor([-1.0]))
    loss, gradient, counts = fused(backend, logits, labels, FocalShape(0.25, table))
    assert np.isnan(loss)
    assert counts[1] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_add_up(backend: str) -> None:
    shape = FocalShape(0.25, 2.0)
    for logits in (torch.zeros(2, 0, 5), torch.zeros(0, 3, 5)):
        labels = torch.zeros(logits.shape[:2], dtype=torch.int32)
        assert fused(backend, logits, labels, shape)[::2] == (0.0, [0, 0])
    logits, _ = level(2, 41, 5)
    loss, gradient, counts = fused(backend, logits, torch.full((2, 41), -1, dtype=torch.int32), shape)
    assert (loss, gradient.abs().max().item(), counts) == (0.0, 0.0, [0, 0])
    negatives = torch.full((2, 41), 5, dtype=torch.int32)
    loss, gradient, counts = fused(backend, logits, negatives, shape)
    compare(gradient, exact(logits, negatives, shape)[1], loss, exact(logits, negatives, shape)[0], torch.float32)
    assert counts == [0, 0]
    table = FocalShape(0.25, random_table(2, 4))
    assert fused(backend, logits, torch.full((2, 41), -1, dtype=torch.int32), table)[1].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views_need_no_copy(backend: str, dtype: torch.dtype) -> None:
    shape = FocalShape(0.25, 2.0)
    logits, labels = level(2, 42, 5)
    channels_last = logits.to(dtype).view(2, 6, 7, 5).permute(0, 3, 1, 2)
    channels_first = channels_last.contiguous()
    wanted_loss, wanted = exact(logits.to(dtype), labels, shape)
    for image in (channels_last, channels_first):
        view = image.permute(0, 2, 3, 1).view(2, 42, 5)
        assert view.data_ptr() == image.data_ptr()
        loss, gradient, _ = fused(backend, view, labels, shape)
        assert gradient.stride() == view.stride()
        compare(gradient, wanted, loss, wanted_loss, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [FocalShape(0.25, 2.0), FocalShape(0.25, random_table(1, 4), 0.1)])
def test_the_gradient_may_overwrite_the_logits(backend: str, shape: FocalShape) -> None:
    for spread in (0.3, 3.0):
        logits, labels = level(2, 41, 20, -4.0, spread)
        loss, gradient, _ = fused(backend, logits, labels, shape)
        again, same, _ = fused(backend, logits, labels, shape, gradient=logits)
        assert again == loss
        assert same is logits
        assert torch.equal(same, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_inputs_give_equal_sums(backend: str) -> None:
    logits, labels = level(2, 1023, 3)
    assert len({fused(backend, logits, labels, FocalShape(0.25, 2.0))[0] for _ in range(3)}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2.0), (0.25, 0.0), (0.5, 1.5), (-1.0, 2.0), (0.25, 5.0), (0.25, 0.5)]
)
def test_reproduces_torchvision(backend: str, alpha: float, gamma: float) -> None:
    oracle = np.load(FILES / "sigmoid_focal.npz")
    logits = torch.from_numpy(oracle["sfl__logits"])[None]
    labels = torch.from_numpy(oracle["sfl__labels_1based"])[None] - 1
    labels = torch.where(labels < 0, logits.shape[-1], labels).int()
    name = f"sfl__tv_a{alpha:g}_g{gamma}"
    values = torch.from_numpy(oracle[f"{name}_loss"])
    mine = focal_elements(logits, labels, FocalShape(alpha, gamma))[0]
    torch.testing.assert_close(mine, values, rtol=2e-6, atol=1e-6)
    loss, gradient, _ = fused(backend, logits, labels, FocalShape(alpha, gamma))
    assert loss == pytest.approx(values.double().sum().item(), rel=1e-5)
    theirs = torch.from_numpy(oracle[f"{name}_grad"])
    known = ~theirs.isnan()  # torchvision's own is NaN at saturated logits for gamma < 1
    assert known.all() == (gamma != 0.5)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[0][known], theirs[known], rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_CUDA, reason="run by test_focal_triton.py")
def test_offsets_past_two_to_the_31() -> None:
    rows = 2**31 // 80 + 1000
    logits = torch.full((1, rows, 80), -4.0, device="cuda", dtype=torch.bfloat16)
    labels = torch.full((1, rows), 80, device="cuda", dtype=torch.int32)
    labels[0, -1] = 79
    logits[0, -1, 79] = 3.0
    from detection.ops.focal_triton import focal_triton

    loss, counts = focal_triton(logits, labels, FocalShape(-1.0, 2.0), None, None, logits)
    one = focal_elements(torch.full((1, 1), -4.0), torch.tensor([1]), FocalShape(-1.0, 2.0)).item()
    assert loss.item() == pytest.approx(one * (rows * 80 - 1), rel=1e-5)
    assert counts.tolist() == [1, 0]
    wanted = exact(torch.full((1, 1, 1), 3.0), torch.zeros(1, 1, dtype=torch.int32), FocalShape(-1.0, 2.0))[1].item()
    assert logits[0, -1, 79].item() == pytest.approx(wanted, rel=1e-2)


if "cpu" in BACKENDS:

    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_reference_gradients_of_both_orders(gamma: float, smoothing: float) -> None:
        logits, labels = level(1, 5, 3)
        shape = FocalShape(0.25, gamma, smoothing)
        z = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: focal_elements(z, labels, shape), z)
        assert torch.autograd.gradgradcheck(lambda z: focal_elements(z, labels, shape), z)
        _, slope = focal_values_and_gradients(z.detach(), labels, shape)
        torch.testing.assert_close(slope, exact(logits, labels, shape)[1], rtol=1e-10, atol=1e-14)

    def test_choose_names_what_runs() -> None:
        cpu, cuda, other = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
        assert [choose("auto", d) for d in (cpu, cuda, other)] == ["cpu", "triton", "reference"]
        assert [choose("reference", d) for d in (cpu, cuda, other)] == ["reference"] * 3
        refused: list[tuple[Implementation, torch.device]] = [("triton", cpu), ("cpu", cuda), ("cpu", other)]
        for name, device in refused:
            with pytest.raises(ValueError, match="cannot run"):
                choose(name, device)

    def test_blocks_add_up_to_the_whole() -> None:
        for spread, mean in ((0.1, -4.6), (1.0, -4.6), (3.0, -3.0)):
            logits, labels = level(2, 11_000, 20, mean, spread)  # several blocks, a remainder, and rows over each limit
            wanted_loss, wanted = exact(logits, labels, FocalShape(0.25, 2.0))
            for out in (None, logits):  # only a gradient of its own lends its memory to the blocks
                loss, gradient, _ = fused("cpu", logits, labels, FocalShape(0.25, 2.0), gradient=out)
                compare(gradient, wanted, loss, wanted_loss, torch.float32)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
    @pytest.mark.parametrize("p", [0.0309, 0.105, 0.2, 0.31, 0.49, 0.9, 0.97, 0.99])
    def test_every_formula_is_right_to_the_top_of_its_reach(gamma: float, p: float) -> None:
        # All elements there: errors of one sign would add up.
        logits = torch.logit(torch.tensor(p)) - torch.linspace(0, 0.01, 33_000).view(1, -1, 3)
        labels = torch.full((1, 11_000), 3, dtype=torch.int32)
        loss, gradient, _ = fused("cpu", logits, labels, FocalShape(0.25, gamma))
        wanted_loss, wanted = exact(logits, labels, FocalShape(0.25, gamma))
        compare(gradient, wanted, loss, wanted_loss, torch.float32, max(1.0, (1 + gamma) / 3))

    def test_a_level_that_its_sample_does_not_show() -> None:
        logits, labels = level(1, 1024, 128, -4.6, 0.1)
        shape = FocalShape(0.25, 2.0)
        logits[0, torch.arange(1024) % 16 != 0] += 8.0
        formula = _choose(_grouped(logits[0]), plan_of(shape, 1.0))
        assert formula is not None
        assert formula.limit > 4
        loss, gradient, _ = fused("cpu", logits, labels, shape)
        wanted_loss, wanted = exact(logits, labels, shape)
        compare(gradient, wanted, loss, wanted_loss, torch.float32)

    @pytest.mark.parametrize("dense", [True, False])
    def test_single_elements_above_a_blocks_reach_are_exact(dense: bool) -> None:
        logits, labels = level(2, 40_000, 3, -4.6, 0.1)
        labels[:, ::100] = 3
        logits[:, ::100, 1] = torch.linspace(-2, 60, 400)  # some above every formula's limit, in all of several blocks
        logits[1, 300, 2], logits[1, 301, 0], labels[1, 301] = torch.nan, torch.nan, -1
        if not dense:
            logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
        loss, gradient, counts = fused("cpu", logits, labels, FocalShape(0.25, 2.0))
        assert np.isnan(loss)
        assert counts[1] == 1
        assert gradient.isnan().nonzero().tolist() == [[1, 300, 2]]
        logits[1, 300, 2], gradient[1, 300, 2] = -4.6, 0.0
        wanted_loss, wanted = exact(logits, labels, FocalShape(0.25, 2.0))
        wanted[1, 300, 2] = 0.0
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=1e-35)
        assert fused("cpu", logits, labels, FocalShape(0.25, 2.0))[0] == pytest.approx(wanted_loss, rel=1e-6)
