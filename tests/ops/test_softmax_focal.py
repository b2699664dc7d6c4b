"""The softmax focal loss with a background class: its definition, the CPU path and the Triton kernel."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from detection.ops.softmax_focal import softmax_focal_rows, softmax_focal_sum

ON_CUDA = os.environ.get("FOCAL_ON_CUDA") == "1"
TRITON = os.environ.get("TRITON_INTERPRET") == "1" or ON_CUDA


def level(n: int, a: int, classes: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(n, a, classes, generator=generator) * spread
    return logits, torch.randint(-1, classes, (n, a), generator=generator, dtype=torch.int32)


def fused(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor, list[int]]:
    if TRITON:
        from detection.ops.focal_triton import softmax_focal_triton

        z = logits.to("cuda" if ON_CUDA else "cpu")
        gradient = torch.full_like(z, torch.nan)
        loss, counts = softmax_focal_triton(z, labels.to(z.device), alpha, gamma, None, gradient)
        return loss.cpu(), gradient.cpu(), counts.tolist()
    z = logits.clone().requires_grad_()
    out = softmax_focal_sum(z, labels, alpha=alpha, gamma=gamma, implementation="cpu")
    (gradient,) = torch.autograd.grad(out.loss, z)
    return out.loss, gradient, [int(out.num_positive), int(out.num_nonfinite)]


@pytest.mark.parametrize("alpha", [-1.0, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [2, 21, 81])
def test_equals_the_definition(alpha: float, gamma: float, classes: int) -> None:
    for spread in (0.5, 8.0):
        logits, labels = level(2, 41, classes, spread)
        z = logits.double().requires_grad_()
        wanted = softmax_focal_rows(z, labels, alpha, gamma).sum()
        (slope,) = torch.autograd.grad(wanted, z)
        loss, gradient, counts = fused(logits, labels, alpha, gamma)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert (gradient - slope).norm() <= 2e-6 * slope.norm()
        assert (gradient[labels < 0] == 0).all()
        assert counts == [int(((labels >= 0) & (labels < classes - 1)).sum()), 0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_rows_stay_finite(gamma: float) -> None:
    logits = torch.tensor([[[100.0, 0.0, -100.0], [-100.0, 0.0, 100.0], [0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]]])
    labels = torch.tensor([[0, 0, 1, -1]], dtype=torch.int32)
    loss, gradient, counts = fused(logits, labels, -1.0, gamma)
    assert loss.item() == pytest.approx(200 + (2 / 3) ** gamma * 1.0986123, rel=1e-6)
    assert gradient.isfinite().all()
    assert counts == [3, 0]
    labels[0, 3] = 2
    loss, gradient, counts = fused(logits, labels, -1.0, gamma)
    assert loss.isnan()
    assert counts == [3, 1]
    assert gradient.isnan().any(-1).tolist() == [[False, False, False, True]]


def test_no_anchor_is_no_loss() -> None:
    for shape in ((2, 0, 4), (0, 3, 4)):
        logits = torch.zeros(shape)
        assert fused(logits, torch.zeros(shape[:2], dtype=torch.int32), 0.25, 2.0)[0].item() == 0


if not TRITON:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_blocks_add_up_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, labels = level(2, 41, 7)
        logits = logits.to(dtype)
        z = logits.double().requires_grad_()
        wanted = softmax_focal_rows(z, labels, 0.25, 2.0).sum()
        (slope,) = torch.autograd.grad(wanted, z)
        for size in ("_BLOCK", "_SCRATCH_BLOCK"):
            monkeypatch.setattr(f"detection.ops.softmax_focal.{size}", 64)
        loss, gradient, counts = fused(logits, labels, 0.25, 2.0)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert gradient.dtype == dtype
        rounded = slope.to(dtype).double()
        assert (gradient - rounded).norm() <= {torch.float32: 2e-6}.get(dtype, 1e-3) * rounded.norm()
        assert counts[1] == 0

    def test_is_cross_entropy_at_gamma_zero() -> None:
        logits, labels = level(2, 41, 7)
        wanted = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten().long(), ignore_index=-1, reduction="sum"
        )
        assert fused(logits, labels, -1.0, 0.0)[0].item() == pytest.approx(wanted.item(), rel=1e-6)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_the_definition_has_two_derivatives(gamma: float) -> None:
        logits, labels = level(1, 5, 4)
        z = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: softmax_focal_rows(z, labels, 0.25, gamma), z)
        assert torch.autograd.gradgradcheck(lambda z: softmax_focal_rows(z, labels, 0.25, gamma), z)

    def test_scale_is_in_the_gradient() -> None:
        logits, labels = level(2, 41, 7)
        z = logits.requires_grad_()
        scaled = softmax_focal_sum(z, labels, alpha=0.25, gamma=2.0, scale=torch.tensor(0.5), implementation="cpu")
        (half,) = torch.autograd.grad(2 * scaled.loss, z)
        torch.testing.assert_close(half, fused(logits.detach(), labels, 0.25, 2.0)[1])
