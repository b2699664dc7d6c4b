"""The focal loss of one pyramid level, summed: one entry, and the choice of what computes it.

The element function is in `focal_elements`, the fused versions in `focal_cpu` and `focal_triton`. Those write the
gradient while they read the logits; their backward only scales it, and they cannot be differentiated twice.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from detection.ops.focal_compiled import focal_compiled, has_compiler
from detection.ops.focal_cpu import focal_cpu
from detection.ops.focal_elements import FocalShape, GammaTable, focal_elements

Implementation = Literal["auto", "reference", "cpu", "compiled", "triton"]

_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? table, Tensor? edges, Tensor? group, Tensor? scale, "
    "float alpha, float gamma, float smoothing, bool with_gradient, bool compiled) -> (Tensor, Tensor, Tensor)"
)


class FocalSum(NamedTuple):
    """What one pass over a level's logits yields."""

    loss: Float[Tensor, ""]
    """float32 (float64 for float64 logits): summed over the elements of all anchors that are not ignored."""
    num_positive: Int[Tensor, ""]
    """Anchors with a class of their own."""
    num_nonfinite: Int[Tensor, ""]
    """Elements whose loss is NaN or infinite."""


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """The implementation that a build for `device` uses: the fused one for "auto", else the one named.

    "compiled" is a CPU's fused one made by torch.compile: faster, after some seconds of compiling, with a C++ compiler.
    Errors: ValueError where the implementation cannot run on the device.
    """
    fused: Implementation = "reference"
    if device.type in ("cpu", "cuda"):
        fused = "triton" if device.type == "cuda" else "cpu"
    if implementation == "auto":
        return fused
    if implementation == "compiled" and device.type == "cpu":
        if not has_compiler():
            raise ValueError("implementation 'compiled' needs a C++ compiler (g++ or clang++): use 'auto'")
        return implementation
    if implementation not in ("reference", fused):
        raise ValueError(f"implementation {implementation!r} cannot run on {device.type!r}: use 'auto' or 'reference'")
    return implementation


def focal_sum(
    logits: Float[Tensor, "N A K"],
    labels: Integer[Tensor, "N A"],
    shape: FocalShape,
    *,
    group: Integer[Tensor, "N A"] | None = None,
    scale: Float[Tensor, ""] | None = None,
    implementation: Implementation = "reference",
    in_place: bool = False,
) -> FocalSum:
    """The summed loss of one level, times `scale`, with the numbers of positive anchors and of non-finite elements.

    Labels: class of a positive anchor, K for a negative one, -1 for an ignored one.
    A fused implementation keeps the gradient in the logits' dtype; a `scale` given here (1 / normaliser, say) is in it
    already, where a later factor costs another pass. `in_place` writes it over the logits: no extra memory, but their
    values are gone, and neither torch.compile nor a second use of the logits is possible.
    """
    if implementation == "reference" or logits.dtype == torch.float64:
        return _reference(logits, labels, shape, group, scale)
    gamma, edges, scalar = _flatten(shape)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    arguments = (labels, gamma, edges, group, scale, shape.alpha, scalar, shape.smoothing)
    compiled = implementation == "compiled"
    if in_place and with_gradient:
        loss, counts = _InPlace.apply(logits, *arguments)
    else:
        loss, _, counts = _fused(logits, *arguments, with_gradient, compiled)
    return FocalSum(loss, counts[0], counts[1])


def _reference(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None, scale: Tensor | None
) -> FocalSum:
    elements = focal_elements(logits, labels, shape, group)
    loss = elements.sum() if scale is None else elements.sum() * scale
    positive = (labels >= 0) & (labels < logits.shape[-1])
    return FocalSum(loss, positive.sum(), (~elements.detach().isfinite()).sum())


def _flatten(shape: FocalShape) -> tuple[Tensor | None, Tensor | None, float]:
    """(table, edges, scalar): custom operators take tensors and numbers, not our types."""
    if isinstance(shape.gamma, GammaTable):
        return shape.gamma.gamma, shape.gamma.edge_logit, 0.0
    return None, None, shape.gamma


def _compute(
    logits: Tensor,
    gradient: Tensor | None,
    labels: Tensor,
    table: Tensor | None,
    edges: Tensor | None,
    group: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    gamma: float,
    smoothing: float,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, counts); fills `gradient`. Dispatches on the logits' device."""
    shape = FocalShape(alpha, gamma if table is None or edges is None else GammaTable(table, edges), smoothing)
    if logits.device.type == "cuda":
        from detection.ops.focal_triton import focal_triton  # heavy, and absent where there is no CUDA

        return focal_triton(logits, labels, shape, group, scale, gradient)
    compute = focal_compiled if compiled else focal_cpu
    found = compute(logits, labels, shape, group, 1.0 if scale is None else scale.item(), gradient)
    return torch.tensor(found.loss), torch.tensor([found.positive, found.nonfinite])


@torch.library.custom_op("detection::focal", mutates_args=(), schema=_SCHEMA)
def _fused(
    logits: Tensor,
    labels: Tensor,
    table: Tensor | None,
    edges: Tensor | None,
    group: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    gamma: float,
    smoothing: float,
    with_gradient: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(logits) if with_gradient else None
    loss, counts = _compute(logits, gradient, labels, table, edges, group, scale, alpha, gamma, smoothing, compiled)
    return loss, logits.new_empty(0) if gradient is None else gradient, counts


@_fused.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    table: Tensor | None,
    edges: Tensor | None,
    group: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    gamma: float,
    smoothing: float,
    with_gradient: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=torch.float32), gradient, logits.new_empty(2, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx: Any, loss_gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 10
    if loss_gradient is None:
        return (None, *none)
    (gradient,) = ctx.saved_tensors
    return (scale_gradient(gradient, loss_gradient), *none)


_fused.register_autograd(_scale_gradient, setup_context=_save)


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """The saved gradient times the upstream one; itself where that is 1 and asking costs nothing.

    Errors: RuntimeError for a second derivative, which a saved gradient cannot give.
    """
    if torch.compiler.is_compiling():
        return gradient * factor
    if torch.is_grad_enabled():
        raise RuntimeError("the fused focal loss cannot be differentiated twice: build it with 'reference'")
    if factor.device.type == "cpu" and factor.item() == 1:  # on a GPU, asking would wait for the device
        return gradient
    return gradient * factor


class _InPlace(torch.autograd.Function):
    """The fused loss with its gradient in the logits' memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        memory = logits.detach()
        loss, counts = _compute(memory, memory, *arguments)
        ctx.gradient = memory
        ctx.mark_non_differentiable(counts)
        return loss, counts

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (scale_gradient(ctx.gradient, loss_gradient), *(None,) * 8)
