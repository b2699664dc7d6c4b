"""Eigenvalues and traces against the whole matrix: random ones, and the Hessians that autograd forms row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from detection.assignment.max_iou import MaxIouConfig
from detection.evaluation.curvature import (
    Product,
    estimate_trace,
    extreme_eigenvalues,
    flatten,
    hessian_product,
    rademacher_probes,
    random_direction,
    weighted_sum,
)
from detection.losses.box import CIoUConfig, DIoUConfig, GIoUConfig, L1Config, SmoothL1Config
from detection.losses.criterion import CriterionConfig
from detection.losses.focal import FocalConfig
from detection.losses.foreground import Foreground
from detection.losses.table import AUXILIARY, CLASSIFICATION, AuxiliaryConfig, ClassificationConfig
from detection.model.anchors import AnchorConfig, anchor_levels
from detection.types import Predictions, Target

Loss = Callable[[], Tensor]


def dense_hessian(loss: Loss, parameters: list[Tensor]) -> Tensor:
    """The whole matrix, a row for each element of the gradient."""
    gradient = flatten(torch.autograd.grad(loss(), parameters, create_graph=True))
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([flatten(row) for row in rows])


def multiply_by(matrix: Tensor) -> Product:
    return lambda v: matrix @ v


def symmetric(size: int, seed: int) -> Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


def hadamard(size: int) -> Tensor:
    """A square matrix of signs with orthogonal rows; `size` is a power of two."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def classifier(dtype: torch.dtype) -> tuple[Loss, list[Tensor]]:
    """A network of 243 parameters with cross entropy, off its minimum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)
    inputs, labels = torch.randn(40, 6).to(dtype), torch.randint(0, 3, (40,))
    return lambda: nn.functional.cross_entropy(model(inputs), labels), list(model.parameters())


class DetectorHead(nn.Module):
    """Two convolutions and a class and a box output over one 6 x 6 level, one anchor a cell."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(6, classes, 1), nn.Conv2d(6, 4, 1)

    def forward(self, images: Tensor) -> Predictions:
        features = self.trunk(images)
        logits, deltas = (layer(features).flatten(2).transpose(1, 2) for layer in (self.classes, self.boxes))
        config = AnchorConfig(sizes=(16.0,), scales=(1.0,), ratios=(1.0,))
        return Predictions((logits,), (deltas,), anchor_levels(config, (48, 48), [(6, 6)], images.device))


def detector(config: CriterionConfig) -> tuple[Loss, list[Tensor]]:
    """The real criterion on a head of 458 parameters, two images, three objects of two classes."""
    torch.manual_seed(1)
    head = DetectorHead(2)
    images = torch.randn(2, 3, 6, 6)
    objects = [[[4.0, 4, 22, 20], [20.0, 18, 40, 38]], [[10.0, 8, 26, 25]]]
    labels = [[0, 1], [1]]
    targets = [
        Target(torch.tensor(b), torch.tensor(y), torch.zeros(len(y), dtype=torch.bool))
        for b, y in zip(objects, labels, strict=True)
    ]
    criterion = config.build(2, "reference")
    matches = MaxIouConfig().build()(head(images).anchors, targets, 2)
    assert matches.num_positive.item() >= 3
    return lambda: criterion(head(images), matches).total, list(head.parameters())


CRITERIA = {
    "focal, GIoU": CriterionConfig(box=GIoUConfig()),
    "focal of gamma .5, smooth L1": CriterionConfig(classification=FocalConfig(gamma=0.5), box=SmoothL1Config()),
    "inverse focal, DIoU": CriterionConfig(classification=FocalConfig(gamma=-1.0), box=DIoUConfig()),
    "each image by itself, CIoU": CriterionConfig(box=CIoUConfig(), normaliser="image"),
}


@pytest.mark.parametrize("name", ["classifier", *CRITERIA])
def test_eigenvalues_and_trace_equal_those_of_the_dense_hessian(name: str) -> None:
    """In float32, as they are measured; to 1e-3 of the value."""
    loss, parameters = classifier(torch.float32) if name == "classifier" else detector(CRITERIA[name])
    dense = dense_hessian(loss, parameters).double()
    assert 200 < len(dense) < 500
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-5 * dense.abs().max().item())
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    product = hessian_product(loss, parameters)
    found = extreme_eigenvalues(product, random_direction(len(dense), 0, parameters[0]), tolerance=1e-4)
    assert found.converged
    assert found.iterations <= 40
    assert found.largest == pytest.approx(values[-1].item(), rel=1e-3)
    assert found.smallest == pytest.approx(values[0].item(), abs=1e-3 * values.abs().max().item())
    every_axis: Iterator[Tensor] = iter(math.sqrt(len(dense)) * torch.eye(len(dense)))
    trace = estimate_trace(product, every_axis, found.basis, found.basis_trace)
    assert trace.value == pytest.approx(dense.trace().item(), rel=1e-3)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_products_equal_the_dense_hessians(keep_graph: bool) -> None:
    loss, parameters = classifier(torch.float64)
    dense = dense_hessian(loss, parameters)
    product = hessian_product(loss, parameters, keep_graph)
    for seed in range(3):
        vector = random_direction(len(dense), seed, dense)
        torch.testing.assert_close(product(vector), dense @ vector, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
def test_the_largest_eigenvalue_keeps_its_sign(shift: float) -> None:
    """All eigenvalues negative, of both signs, all positive: the largest is the rightmost, not the longest."""
    matrix = symmetric(300, 0) + shift * torch.eye(300)
    values = torch.linalg.eigvalsh(matrix)
    found = extreme_eigenvalues(multiply_by(matrix), random_direction(300, 0, matrix), 300, 1e-6)
    assert found.converged
    assert (found.largest, found.smallest) == pytest.approx((values[-1].item(), values[0].item()), rel=1e-9)
    assert max(found.residual, found.smallest_residual) < 1e-6 * values.abs().max().item()
    assert (found.largest < 0) == (shift < 0)


def test_an_eigenvalue_is_no_farther_than_the_residual() -> None:
    """Stopped early, the result says so, and how far off it can be; the residual is that of the vector in the basis."""
    matrix = symmetric(300, 1)
    values = torch.linalg.eigvalsh(matrix)
    found = extreme_eigenvalues(multiply_by(matrix), random_direction(300, 0, matrix), 6, 1e-6)
    assert not found.converged
    assert found.iterations == 6
    assert 0 < (values - found.largest).abs().min() <= found.residual
    assert found.largest < values[-1].item()
    inner = found.basis @ matrix @ found.basis.T
    assert inner.trace().item() == pytest.approx(found.basis_trace)
    vector = found.basis.T @ torch.linalg.eigh(inner)[1][:, -1]
    assert (matrix @ vector - found.largest * vector).norm().item() == pytest.approx(found.residual)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_matrix_of_low_rank_is_exhausted_after_as_many_products(rank: int) -> None:
    columns = torch.linalg.qr(symmetric(60, 2))[0][:, :rank]
    matrix = (columns * torch.arange(1.0, rank + 1)) @ columns.T
    found = extreme_eigenvalues(multiply_by(matrix), random_direction(60, 0, matrix), 40, 0.0)
    assert found.converged
    assert found.iterations == rank + 1
    assert found.largest == pytest.approx(rank, abs=1e-12)
    assert found.smallest == pytest.approx(0, abs=1e-12)


def test_equal_eigenvalues_do_not_hide_the_others() -> None:
    matrix = torch.diag(torch.tensor([7.0, 7, 7, 1, 1, -3, -3, -3], dtype=torch.float64))
    found = extreme_eigenvalues(multiply_by(matrix), random_direction(8, 0, matrix))
    assert (found.largest, found.smallest) == pytest.approx((7, -3))
    assert found.iterations == 3


def test_orthogonal_probes_give_the_trace_itself() -> None:
    """The mean of z . H z over the rows of a Hadamard matrix is the trace: the estimator's expectation, exactly."""
    matrix = symmetric(64, 3)
    plain = estimate_trace(multiply_by(matrix), iter(hadamard(64)))
    assert plain.value == pytest.approx(matrix.trace().item(), rel=1e-12)
    spectrum = extreme_eigenvalues(multiply_by(matrix), random_direction(64, 0, matrix), 9)
    assert spectrum.iterations == 9
    deflated = estimate_trace(multiply_by(matrix), iter(hadamard(64)), spectrum.basis, spectrum.basis_trace)
    assert deflated.value == pytest.approx(matrix.trace().item(), rel=1e-12)


def test_the_standard_error_is_that_of_the_estimates() -> None:
    """Over 400 repetitions: unbiased, and the reported error is their spread."""
    matrix = symmetric(50, 4)
    found = [estimate_trace(multiply_by(matrix), rademacher_probes(50, 8, s, matrix)) for s in range(400)]
    values = torch.tensor([f.value for f in found])
    spread = values.std().item()
    assert abs(values.mean().item() - matrix.trace().item()) < 4 * spread / math.sqrt(400)
    assert math.sqrt(sum(f.error**2 for f in found) / 400) == pytest.approx(spread, rel=0.1)


def test_large_eigenvalues_known_from_the_basis_leave_the_traces_error() -> None:
    """One eigenvalue of 100 among a thousand of .1: the probes' error falls, the estimate stays unbiased."""
    columns = torch.linalg.qr(symmetric(300, 5))[0]
    matrix = (columns * torch.tensor([100.0, *[0.1] * 299])) @ columns.T
    product = multiply_by(matrix)
    spectrum = extreme_eigenvalues(product, random_direction(300, 0, matrix))
    plain = estimate_trace(product, rademacher_probes(300, 20, 0, matrix))
    better = estimate_trace(product, rademacher_probes(300, 20, 0, matrix), spectrum.basis, spectrum.basis_trace)
    assert plain.error > 5
    assert better.error < 0.2
    assert abs(better.value - 129.9) < 4 * better.error + 1e-9


def test_one_probe_is_refused() -> None:
    matrix = symmetric(4, 0)
    with pytest.raises(ValueError, match="1 probes: a standard error needs two"):
        estimate_trace(multiply_by(matrix), rademacher_probes(4, 1, 0, matrix))


def test_parameters_without_curvature_have_rows_of_zeros() -> None:
    """`a` enters squared, `b` only linearly, `c` not at all."""
    a, b, c = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    product = hessian_product(lambda: a.square().sum() + b.sum(), [a, b, c])
    assert product(torch.ones(6, dtype=torch.float64)).tolist() == [2, 2, 0, 0, 0, 0]
    linear = hessian_product(lambda: b.sum(), [b])
    assert linear(torch.ones(2, dtype=torch.float64)).tolist() == [0, 0]


def test_a_sum_of_losses_has_the_sum_of_their_hessians() -> None:
    a, b = symmetric(5, 6), symmetric(5, 7)
    vector = random_direction(5, 0, a)
    joined = weighted_sum([multiply_by(a), multiply_by(b)], [0.25, 0.75])
    torch.testing.assert_close(joined(vector), (0.25 * a + 0.75 * b) @ vector)


def test_the_seed_decides_the_result() -> None:
    loss, parameters = classifier(torch.float32)
    product = hessian_product(loss, parameters)

    def measured(seed: int) -> tuple[float, float]:
        spectrum = extreme_eigenvalues(product, random_direction(243, seed, parameters[0]), 5)
        trace = estimate_trace(product, rademacher_probes(243, 3, seed, parameters[0]))
        return spectrum.largest, trace.value

    assert sum(p.numel() for p in parameters) == 243
    assert measured(0) == measured(0)
    assert measured(0) != measured(1)


def test_the_fused_loss_is_refused_rather_than_taken_for_flat() -> None:
    torch.manual_seed(1)
    head = DetectorHead(2)
    images = torch.randn(1, 3, 6, 6)
    found = head(images)
    target = Target(torch.tensor([[4.0, 4, 22, 20]]), torch.tensor([0]), torch.zeros(1, dtype=torch.bool))
    matches = MaxIouConfig().build()(found.anchors, [target], 2)
    criterion = CriterionConfig(box=L1Config()).build(2, "cpu")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        hessian_product(lambda: criterion(head(images), matches).total, list(head.parameters()))


def follows_the_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> bool:
    """H v equals the central difference of the gradient along v."""

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]

    at = logits.clone().requires_grad_()
    vector = random_direction(logits.numel(), 0, logits)
    found = hessian_product(lambda: loss(at), [at])(vector)
    step = 1e-5 * vector.view_as(logits)
    expected = ((gradient(logits + step) - gradient(logits - step)) / 2e-5).flatten()
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-9)


@pytest.mark.parametrize("config", CLASSIFICATION, ids=lambda c: c.model_fields["kind"].default)
def test_every_classification_loss_can_be_differentiated_twice(config: type[ClassificationConfig]) -> None:
    """By its logits, against differences of its gradient. Box quality is a constant."""
    outputs = 4 if config.activation == "softmax" else 3
    logits = torch.randn(2, 8, outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([[0, 3, 3, -1, 2, 3, 1, 3], [3, 3, 1, 0, -1, 3, 3, 2]], dtype=torch.int32)
    quality = (torch.linspace(0.1, 0.9, 6, dtype=torch.float64),) if config.uses_quality else ()
    module = config().build(3, "reference")
    scale = torch.tensor(0.5, dtype=torch.float64)
    assert follows_the_gradient(lambda z: module(z, labels, scale, *quality), logits)


@pytest.mark.parametrize("config", AUXILIARY, ids=lambda c: c.model_fields["kind"].default)
def test_every_calibration_term_can_be_differentiated_twice(config: type[AuxiliaryConfig]) -> None:
    logits = 2 * torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = torch.tensor([[0, 3, 1, 2, 2, 3, 1, 0, 3, 1, -1, 2]], dtype=torch.int32)
    positive = (labels[0] >= 0) & (labels[0] < 3)
    iou = torch.linspace(0.2, 0.9, int(positive.sum()))
    module = config().build(3)

    def loss(z: Tensor) -> Tensor:
        rows = z[0, positive]
        own = labels[0, positive].long()
        return module(Foreground(rows, rows.sigmoid(), own, iou, ((z, labels),), "sigmoid"))

    assert follows_the_gradient(loss, logits)
