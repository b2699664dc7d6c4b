"""The curvature of a loss: products with its Hessian, the Hessian's extreme eigenvalues, its trace.

Everything works on flat vectors and on a function that multiplies one by the Hessian, so that no matrix is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Hessian times vector: (n,) -> (n,)."""

PROBES = 10
ITERATIONS = 40
TOLERANCE = 1e-2

# A remainder this much smaller than the matrix is rounding: the Lanczos basis spans an invariant subspace.
_BREAKDOWN = {torch.float32: 1e-6, torch.float64: 1e-14}


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The two ends of a Hessian's spectrum."""

    largest: float
    """The largest eigenvalue with its sign: negative where the loss curves downwards in every direction."""
    smallest: float
    """The smallest value found: the smallest eigenvalue is this or lower, negative off a minimum."""
    residual: float
    """|H v - largest v| for the unit vector v found: some eigenvalue lies no farther than this from `largest`."""
    smallest_residual: float
    """Likewise of `smallest`, which may belong to an eigenvalue inside the spectrum."""
    iterations: int
    """Products that the basis took."""
    converged: bool
    """Both residuals are within the tolerance. It vouches for `largest`; an end much nearer to 0 may be missed."""
    basis: Float[Tensor, "k n"]
    """Orthonormal rows that nearly contain the eigenvectors of the spectrum's ends."""
    basis_trace: float
    """The Hessian's trace on the space of the basis."""


@dataclass(frozen=True, slots=True)
class Trace:
    """An unbiased estimate of a Hessian's trace."""

    value: float
    error: float
    """Standard error of `value` over the probes."""
    probes: int


def curvature_numbers(
    product: Product, parameters: Sequence[Tensor], probes: int = PROBES
) -> dict[str, float | int | bool]:
    """The ends of a Hessian's spectrum and its trace, of a loss as a function of all `parameters`.

    eigenvalue: the largest eigenvalue, residual: how far off it is at most; smallest: a value that the smallest one
    does not exceed, with its residual; converged: both residuals are below a hundredth of the largest size; trace and
    trace_error: an estimate and its standard error.
    """
    size, like = sum(p.numel() for p in parameters), parameters[0].detach()
    ends = extreme_eigenvalues(product, random_direction(size, 0, like), ITERATIONS, TOLERANCE)
    trace = estimate_trace(product, rademacher_probes(size, probes, 1, like), ends.basis, ends.basis_trace)
    return {
        "eigenvalue": ends.largest,
        "residual": ends.residual,
        "smallest": ends.smallest,
        "smallest_residual": ends.smallest_residual,
        "iterations": ends.iterations,
        "converged": ends.converged,
        "trace": trace.value,
        "trace_error": trace.error,
        "probes": trace.probes,
        "parameters": size,
    }


def hessian_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor], keep_graph: bool = True) -> Product:
    """The function v -> H v of `loss` as a function of all `parameters`, flattened and joined in their order.

    `loss` is evaluated once and its graph kept; without `keep_graph` anew for every product, in less memory.
    Source: Pearlmutter 1994, as the gradient of the gradient's inner product with v.
    """
    sizes = [p.numel() for p in parameters]
    kept = _gradient(loss(), parameters) if keep_graph else None

    def product(vector: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        gradient = _gradient(loss(), parameters) if kept is None else kept
        pieces = [v.view_as(p) for v, p in zip(torch.split(vector, sizes), parameters, strict=True)]
        # A parameter that the loss is linear in has a gradient without a graph.
        pairs = [(g, v) for g, v in zip(gradient, pieces, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(vector)
        rows = torch.autograd.grad(
            [g for g, _ in pairs],
            list(parameters),
            [v for _, v in pairs],
            retain_graph=kept is not None,
            materialize_grads=True,
        )
        return flatten(rows)

    return product


def weighted_sum(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The product with the weighted sum of several Hessians."""

    def product(vector: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        total = torch.zeros_like(vector)
        for part, weight in zip(products, weights, strict=True):
            total.add_(part(vector), alpha=weight)
        return total

    return product


def flatten(tensors: Sequence[Tensor]) -> Float[Tensor, "n"]:
    """All elements in one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def extreme_eigenvalues(
    product: Product, start: Float[Tensor, "n"], iterations: int = 40, tolerance: float = 1e-2
) -> Spectrum:
    """The ends of the spectrum of the symmetric matrix that `product` multiplies by.

    Lanczos from `start` (any vector with a share in the eigenvectors looked for, a random one has it), every new vector
    orthogonalised twice against all before. Stops when both residuals are below `tolerance` times the largest
    eigenvalue's size, or after `iterations`. An eigenvalue's error is of the order of its residual squared, divided by
    the distance to its neighbour. Memory: `iterations` vectors.
    Source: Golub and Van Loan, Matrix Computations, section 10.3; Parlett, The Symmetric Eigenvalue Problem, 13.2.
    """
    size = len(start)
    most = min(iterations, size)
    basis = start.new_empty((most, size))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for k in range(1, most + 1):
        remainder = product(basis[k - 1])
        diagonal.append(float(remainder @ basis[k - 1]))
        for _ in range(2):
            remainder = remainder - basis[:k].T @ (basis[:k] @ remainder)
        beside.append(float(remainder.norm()))
        values, vectors = _tridiagonal(diagonal, beside[:-1])
        scale = float(values.abs().max())
        if k == size or beside[-1] <= _BREAKDOWN[start.dtype] * scale:
            beside[-1] = 0.0
        # The rest of H times a vector of the basis is along the next one, which only the basis's last vector reaches.
        low, high = (beside[-1] * vectors[-1, [0, -1]].abs()).tolist()
        converged = max(low, high) <= tolerance * scale
        if converged or k == most:
            break
        basis[k] = remainder / beside[-1]
    return Spectrum(
        largest=float(values[-1]),
        smallest=float(values[0]),
        residual=high,
        smallest_residual=low,
        iterations=k,
        converged=converged,
        basis=basis[:k],
        basis_trace=math.fsum(diagonal),
    )


def estimate_trace(
    product: Product,
    probes: Iterator[Float[Tensor, "n"]],
    basis: Float[Tensor, "k n"] | None = None,
    basis_trace: float = 0.0,
) -> Trace:
    """The trace of the symmetric matrix that `product` multiplies by: the mean of z . H z over the probes z.

    With an orthonormal `basis`, on whose space the trace is known, the probes only measure what is orthogonal to it:
    the few large eigenvalues, which make up most of the estimate's variance, then have none.
    Errors: ValueError for fewer than two probes. Source: Hutchinson 1990; Meyer et al. 2021 (Hutch++) for the basis.
    """
    samples = []
    for probe in probes:
        rest = probe if basis is None else probe - basis.T @ (basis @ probe)
        samples.append(float(rest @ product(rest)))
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} probes: a standard error needs two")
    values = torch.tensor(samples, dtype=torch.float64)
    return Trace(basis_trace + float(values.mean()), float(values.std()) / math.sqrt(len(samples)), len(samples))


def rademacher_probes(size: int, count: int, seed: int, like: Tensor) -> Iterator[Float[Tensor, "n"]]:
    """`count` vectors of independent signs, the same on every device; in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
        yield signs.to(like).mul_(2).sub_(1)


def random_direction(size: int, seed: int, like: Tensor) -> Float[Tensor, "n"]:
    """A normally distributed vector, the same on every device; in the dtype and on the device of `like`."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(like)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(parameters), create_graph=True, materialize_grads=True)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors as columns, in float64."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
