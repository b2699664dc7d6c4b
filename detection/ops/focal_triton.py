"""The focal losses as Triton kernels: one read of the logits, one write of their gradient. The only user of triton.

Every program writes its partial sums, which are then added in a fixed order: equal inputs give equal losses.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection.ops.focal_elements import FocalShape, GammaTable

SIGMOID_CONFIGS = ((1024, 4), (2048, 4), (4096, 8), (8192, 8))
"""(elements a program, warps) that are tried on the first call of each size, class count and dtype."""
SOFTMAX_CONFIGS = ((1024, 2), (2048, 4), (4096, 8))

_FAR = tl.constexpr(1e4)


@triton.jit
def _log1p_of_unit(x, PRECISE: tl.constexpr):
    """log(1 + x) for x in 0..1: x times a polynomial of least relative error (1.5e-7 in float32; the short one 9e-6).

    The hardware's logarithm is 2e-7 off absolutely, which for a small x is all of the result.
    """
    if PRECISE:
        y = 0.00523263263 * x - 0.0295049918
        y = y * x + 0.0782255497
        y = y * x - 0.136632117
        y = y * x + 0.191059907
        y = y * x - 0.248429781
        y = y * x + 0.333190963
        y = y * x - 0.499994931
        return x * (y * x + 0.99999997)
    y = 0.101221634 - 0.0238688924 * x
    y = y * x - 0.210048118
    y = y * x + 0.325206475
    y = y * x - 0.499361339
    return x * (y * x + 0.999991598)


@triton.jit
def _log_of_rest(q):
    """log(1 - q) for q in 0..0.5, as -2 atanh(r), r = q / (2 - q) <= 1/3, by its series to r^17."""
    r = q / (2.0 - q)
    s = r * r
    y = s * (1.0 / 17.0) + 1.0 / 15.0
    y = y * s + 1.0 / 13.0
    y = y * s + 1.0 / 11.0
    y = y * s + 1.0 / 9.0
    y = y * s + 1.0 / 7.0
    y = y * s + 1.0 / 5.0
    y = y * s + 1.0 / 3.0
    return -2.0 * r * (y * s + 1.0)


@triton.jit
def _exp_of_negative(x, PRECISE: tl.constexpr):
    """exp(x). The precise one carries the rounding error of x log2(e), which at x = -20 would be 2e-6 of the result."""
    if PRECISE:
        high = x * 1.4426950408889634
        # The part of x log2(e) that float32 dropped; where x is infinite there is none.
        low = tl.where(x > -1e4, tl.fma(x, 1.4426950408889634, -high) + x * 1.925963033500932e-8, 0.0)
        return tl.exp2(high) * (1.0 + 0.6931471805599453 * low)
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _outcome(s, e, log1p_e, r, gamma, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """Value and slope by the signed logit s, given e = exp(-|s|), log(1 + e) and r = 1 / (1 + e).

    KIND is a whole gamma of 0..5, or negative for any other: powers by multiplication are cheaper and more exact.
    """
    above = s >= 0
    p = tl.where(above, r, e * r)
    q = tl.where(above, e * r, r)
    loss = tl.maximum(-s, 0.0) + log1p_e
    p_log_p = tl.where(p > 0, -p * loss, 0.0)
    if KIND >= 0:
        w = tl.where(q == q, 1.0, q)
        for _ in tl.static_range(KIND):
            w = w * q
        return loss * w, w * (KIND * p_log_p - q)
    log_q = -tl.minimum(tl.maximum(s, 0.0) + log1p_e, _FAR)
    log_1_p = _log1p_of_unit(p, PRECISE)
    inverse = gamma < 0
    w = tl.exp(tl.where(inverse, -gamma * log_1_p, gamma * log_q))
    slope = tl.where(inverse, -q * (1.0 - gamma * p_log_p / (1.0 + p)), gamma * p_log_p - q)
    return loss * w, w * slope


@triton.jit
def _look_up(z, outcome, group, table, edges, J: tl.constexpr):
    """gamma[group, outcome, i], i = the edges <= z (none where z is NaN)."""
    index = tl.zeros_like(outcome)
    for j in tl.static_range(J - 1):
        index += (z >= tl.load(edges + j)).to(tl.int32)
    return tl.load(table + (group * 2 + outcome) * J + index)


@triton.jit
def _sigmoid_kernel(
    logits, gradient, labels, group, table, edges, scale, losses, counts,
    total, size_class, alpha_0, alpha_1, gamma, share,
    A, stride_n, stride_a, stride_k, out_n, out_a, out_k,
    K: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr, SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr, GROUPED: tl.constexpr, DENSE: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One run of BLOCK elements of the (N, A, K) logits in row-major order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    inside = local < total - first
    step = (first % K).to(tl.int32) + local
    row = first // K + step // K
    column = step % K
    if DENSE:
        source = first + local
        target = source
    else:
        n, a = row // A, row % A
        source = n * stride_n + a * stride_a + column * stride_k
        target = n * out_n + a * out_a + column * out_k
    z = tl.load(logits + source, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels + row, mask=inside, other=-1)
    counted = label >= 0
    positive = label == column
    factor = tl.load(scale)

    e = _exp_of_negative(-tl.abs(z), PRECISE)
    r = 1.0 / (1.0 + e)
    log1p_e = _log1p_of_unit(e, PRECISE)
    outcome = positive.to(tl.int32)
    member = tl.zeros_like(outcome)
    if GROUPED:
        member = tl.load(group + row, mask=inside, other=0).to(tl.int32)
    if TABLE:
        gamma = _look_up(z, outcome, member, table, edges, J)
    value, slope = _outcome(tl.where(positive, z, -z), e, log1p_e, r, gamma, KIND, PRECISE)
    weight = tl.where(positive, alpha_1, alpha_0)
    value = value * weight
    slope = tl.where(positive, slope, -slope) * weight
    if SMOOTH:
        if TABLE:
            gamma = _look_up(z, tl.zeros_like(outcome), member, table, edges, J)
        other, other_slope = _outcome(-z, e, log1p_e, r, gamma, KIND, PRECISE)
        value = tl.where(positive, (1.0 - share) * value + share * alpha_0 * other, value)
        slope = tl.where(positive, (1.0 - share) * slope - share * alpha_0 * other_slope, slope)

    value = tl.where(counted, value, 0.0)
    if GRADIENT:
        written = tl.where(counted, slope * factor, 0.0).to(gradient.dtype.element_ty)
        tl.store(gradient + target, written, mask=inside)
    program = tl.program_id(0)
    finite = tl.abs(value) < float("inf")
    tl.store(losses + program, tl.sum(value, 0) * factor)
    tl.store(counts + program * 2, tl.sum((positive & counted).to(tl.int32), 0))
    tl.store(counts + program * 2 + 1, tl.sum(1 - finite.to(tl.int32), 0))


@triton.jit
def _softmax_kernel(
    logits, gradient, labels, scale, losses, counts,
    rows, size_class, alpha_0, alpha_1, gamma,
    C: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK / COLUMNS rows of the (rows, C) logits, each held whole; the last of the C classes is background."""
    ROWS: tl.constexpr = BLOCK // COLUMNS if BLOCK > COLUMNS else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    mask = inside[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    label = tl.load(labels + row, mask=inside, other=-1)
    counted = label >= 0
    factor = tl.load(scale)

    z = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
    highest = tl.max(z, 1)
    highest = tl.where(inside, highest, 0.0)
    shifted = z - highest[:, None]
    e = tl.exp(shifted)
    own = column[None, :] == label[:, None]
    total = tl.sum(e, 1)
    others = tl.sum(tl.where(own, 0.0, e), 1)
    log_p = tl.sum(tl.where(own, shifted, 0.0), 1) - tl.log(total)
    q = others / total
    p = 1.0 - q
    # log p = log(1 - q): where q is small, the difference above has lost its digits.
    log_p = tl.where(q < 0.5, _log_of_rest(tl.minimum(q, 0.5)), log_p)
    ratio = tl.where(q > 0, log_p / q, -1.0)
    w = tl.where(q > 0, tl.exp(gamma * tl.log(q)), q)
    if KIND == "zero":
        w = tl.where(q == q, 1.0, q)
    weight = tl.where(label == C - 1, alpha_0, alpha_1)
    value = tl.where(counted, -log_p * w * weight, 0.0)
    if GRADIENT:
        # dL/dz_j = (own - p_j) (gamma p log p / (1 - p) - 1) (1 - p)^gamma
        coefficient = weight * w * (gamma * p * ratio - 1.0) * factor
        slope = (tl.where(own, q[:, None], -e / total[:, None])) * coefficient[:, None]
        slope = tl.where(counted[:, None], slope, 0.0)
        tl.store(gradient + offset, slope.to(gradient.dtype.element_ty), mask=mask)
    program = tl.program_id(0)
    finite = tl.abs(value) < float("inf")
    tl.store(losses + program, tl.sum(value, 0) * factor)
    tl.store(counts + program * 2, tl.sum((counted & (label < C - 1)).to(tl.int32), 0))
    tl.store(counts + program * 2 + 1, tl.sum(1 - finite.to(tl.int32), 0))


def focal_triton(
    logits: Tensor,
    labels: Tensor,
    shape: FocalShape,
    group: Tensor | None,
    scale: Tensor | None,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss, [positive anchors, non-finite elements]) of one level; fills `gradient`, which may be `logits` itself.

    `triton` runs its interpreter instead where TRITON_INTERPRET=1 was set before the import: for tests without a GPU.
    """
    total, classes = logits.numel(), logits.shape[2]
    if total == 0:
        return logits.new_zeros((), dtype=torch.float32), torch.zeros(2, dtype=torch.int64, device=logits.device)
    kind, gamma, table, edges = _gamma(shape, logits.device)
    looked_up = isinstance(shape.gamma, GammaTable)
    out = logits if gradient is None else gradient
    weights = shape.weights
    options: dict[str, Any] = {
        "K": classes,
        "J": table.shape[-1],
        "KIND": kind,
        "TABLE": looked_up,
        "SMOOTH": shape.smoothing > 0,
        "GRADIENT": gradient is not None,
        "GROUPED": group is not None and looked_up,
        "DENSE": logits.is_contiguous() and out.is_contiguous(),
        "PRECISE": logits.dtype == torch.float32,
    }
    numbers = (total, total.bit_length(), *weights, gamma, shape.smoothing / 2, logits.shape[1])
    arguments = (*numbers, *logits.stride(), *out.stride())
    tensors = (labels.contiguous(), labels if group is None else group.contiguous(), table, edges, _one(scale, logits))
    return _launch(_sigmoid_kernel, SIGMOID_CONFIGS, 1, total, (logits, out, *tensors), arguments, options)


def softmax_focal_triton(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, scale: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, [positive anchors, non-finite rows]) of one level's softmax focal loss; fills `gradient`."""
    classes = logits.shape[-1]
    rows = logits.numel() // max(classes, 1)
    if rows == 0:
        return logits.new_zeros((), dtype=torch.float32), torch.zeros(2, dtype=torch.int64, device=logits.device)
    assert logits.is_contiguous()
    columns = triton.next_power_of_2(classes)
    weights = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)
    options = {
        "C": classes,
        "COLUMNS": columns,
        "KIND": "zero" if gamma == 0 else "any",
        "GRADIENT": gradient is not None,
    }
    tensors = (logits, logits if gradient is None else gradient, labels.contiguous(), _one(scale, logits))
    arguments = (rows, rows.bit_length(), *weights, float(gamma))
    return _launch(_softmax_kernel, SOFTMAX_CONFIGS, columns, rows * columns, tensors, arguments, options)


def _launch(
    kernel: Any,
    configs: tuple[tuple[int, int], ...],
    unit: int,
    total: int,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Runs a kernel over `total` elements, a whole number of `unit`s a program, and adds up what the programs found."""
    device = tensors[0].device
    programs = triton.cdiv(total, max(configs[0][0], unit))
    losses = torch.zeros(programs, device=device)
    counts = torch.zeros(programs, 2, dtype=torch.int32, device=device)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(total, max(meta["BLOCK"], unit)),)

    if device.type == "cuda":
        with torch.cuda.device(device):
            _tuned(kernel, configs)[grid](*tensors, losses, counts, *arguments, **options)
    else:
        kernel[grid](*tensors, losses, counts, *arguments, **options, BLOCK=configs[0][0])
    return losses.sum(dtype=torch.float64).float(), counts.sum(0)


@lru_cache(maxsize=4)
def _tuned(kernel: Any, configs: tuple[tuple[int, int], ...]) -> Any:
    """The kernel with its launch measured once per size class. Trials must not destroy logits that share the memory of
    the gradient, nor leave sums of an earlier, wider launch behind."""
    choices = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in configs]
    keys = (
        ["size_class", "K", "KIND", "TABLE", "GRADIENT"]
        if kernel is _sigmoid_kernel
        else ["size_class", "C", "GRADIENT"]
    )
    return triton.autotune(choices, key=keys, restore_value=["gradient"], reset_to_zero=["losses", "counts"])(kernel)


def _gamma(shape: FocalShape, device: torch.device) -> tuple[int, float, Tensor, Tensor]:
    """(kind, scalar gamma, table, edges); the tensors stand for nothing where gamma is a scalar."""
    if isinstance(shape.gamma, GammaTable):
        table = shape.gamma.gamma.to(device, torch.float32).contiguous()
        return -1, 0.0, table, shape.gamma.edge_logit.to(device, torch.float32).contiguous()
    nothing = torch.empty(1, device=device)
    gamma = float(shape.gamma)
    return int(gamma) if gamma in (0, 1, 2, 3, 4, 5) else -1, gamma, nothing, nothing


def _one(scale: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), device=like.device) if scale is None else scale.float()
