"""The focal losses as Triton kernels: one read of the logits, one write of their gradient. The only user of triton.

Every program writes its partial sums, which are then added in a fixed order: in one process, equal inputs give equal
losses. Another may tune the programs to another size, and the loss differs by its rounding; the gradient does not.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection.ops.focal_elements import FocalShape, GammaTable

SIGMOID_CONFIGS = ((1024, 4), (2048, 4), (4096, 4))
"""(elements a program, warps) that are tried on the first call of each size, class count and dtype; smallest first."""
SOFTMAX_CONFIGS = ((512, 1), (1024, 1), (2048, 4))

_FAR = tl.constexpr(1e4)


@triton.jit
def _log2_of_1_and(x, PRECISE: tl.constexpr):
    """log2(1 + x) for x in 0..1: x times a polynomial of least relative error (1.5e-7 in float32; the short one 9e-6).

    The hardware's logarithm is 2e-7 off absolutely, which for a small x is all of the result.
    """
    if PRECISE:
        y = 0.00754909315 * x - 0.0425667054
        y = y * x + 0.112855613
        y = y * x - 0.197118478
        y = y * x + 0.27564118
        y = y * x - 0.358408413
        y = y * x + 0.48069295
        y = y * x - 0.721340207
        return x * (y * x + 1.442695)
    y = 0.146031949 - 0.0344355327 * x
    y = y * x - 0.303035378
    y = y * x + 0.469173769
    y = y * x - 0.720426127
    return x * (y * x + 1.44268292)


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
def _exp_of_minus(z, bits, PRECISE: tl.constexpr):
    """exp(-|z|), bits = z log2(e). The precise one carries the rounding error of that, at z = 20 2e-6 of the result."""
    if PRECISE:
        near = tl.minimum(tl.abs(z), _FAR, propagate_nan=tl.PropagateNan.ALL)  # infinity has no rounding error
        high = near * 1.4426950408889634
        low = tl.fma(near, 1.4426950408889634, -high) + near * 1.925963033500932e-8
        return tl.exp2(-high) * (1.0 - 0.6931471805599453 * low)
    return tl.exp2(-tl.abs(bits))


@triton.jit
def _outcome(s, e, log2_1_e, gamma, weight, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """Value in bits and slope, times weight, by the signed logit s in bits, given e = 2^-|s| and log2(1 + e).

    KIND is a whole gamma of 0..5, or negative for any other: powers by multiplication are cheaper and more exact.
    """
    loss = tl.maximum(-s, 0.0) + log2_1_e
    other = tl.maximum(s, 0.0) + log2_1_e  # of the other outcome: -log2(q)
    if PRECISE:
        # 1 / (1 + e), without the checks of its range that a division is compiled to.
        r = tl.rsqrt((1.0 + e) * (1.0 + e))
        p = tl.where(s >= 0, r, e * r)
        q = tl.where(s >= 0, e * r, r)
    else:
        q = tl.exp2(-other)
        p = 1.0 - q
    p_loss = p * tl.minimum(loss, _FAR)
    w = weight
    if KIND >= 0:
        for _ in tl.static_range(KIND):
            w = w * q
        return loss * w, -w * (KIND * 0.6931471805599453 * p_loss + q)
    inverse = gamma < 0
    w *= tl.exp2(-gamma * tl.where(inverse, _log2_of_1_and(p, PRECISE), tl.minimum(other, _FAR)))
    term = gamma * 0.6931471805599453 * p_loss
    slope = -tl.where(inverse, q * (1.0 + term / (1.0 + p)), term + q)
    return loss * w, w * slope


@triton.jit
def _look_up(z, outcome, group, table, edges, J: tl.constexpr):
    """gamma[group, outcome, i], i = the edges <= z (none where z is NaN)."""
    index = tl.zeros_like(outcome)
    for j in tl.static_range(J - 1):
        index += (z >= tl.load(edges + j)).to(tl.int32)
    return tl.load(table + (group * 2 + outcome) * J + index)


@triton.jit(do_not_specialize=["size_class"])
def _sigmoid_kernel(
    logits, gradient, labels, group, table, edges, scale, losses, counts,
    total, size_class, alpha_0, alpha_1, gamma, share,
    A, stride_n, stride_a, stride_k, out_n, out_a, out_k,
    K: tl.constexpr, RUN: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, GROUPED: tl.constexpr, DENSE: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK elements of the (N, A, K) logits in row-major order, as runs of RUN of one row's elements."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(total - first, BLOCK).to(tl.int32)
    start = (tl.arange(0, BLOCK // RUN) * RUN)[:, None]
    lane = tl.arange(0, RUN)[None, :]
    step = (first % K).to(tl.int32) + start
    row, column = step // K, step % K
    labels += first // K
    label = tl.load(labels + row, mask=start < left, other=-1)
    if K % RUN == 0:
        inside = start < left
    else:  # a run may end in the next row
        inside = start + lane < left
        following = tl.load(labels + row + 1, mask=start + K - column < left, other=-1)
        ended = lane >= K - column
        row += ended.to(tl.int32)
        label = tl.where(ended, following, label)
        column = tl.where(ended, column - K, column)
    counted = label >= 0
    own = label - column
    positive = own == lane
    if DENSE:
        source = first + (start + lane)
        target = source
    else:
        n, a = (first // K + row) // A, (first // K + row) % A
        source = n * stride_n + a * stride_a + (column.to(tl.int64) + lane) * stride_k
        target = n * out_n + a * out_a + (column.to(tl.int64) + lane) * out_k
    z = tl.load(logits + source, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(counted, z, 0.0)
    program = tl.program_id(0)
    hits = (own >= 0) & (own < RUN) if K % RUN == 0 else positive
    tl.store(counts + program * 2, tl.sum(hits.to(tl.int32)))

    bits = z * 1.4426950408889634
    e = _exp_of_minus(z, bits, PRECISE)
    log2_1_e = _log2_of_1_and(e, PRECISE)
    outcome = positive.to(tl.int32)
    member = tl.zeros_like(outcome)
    if GROUPED:
        member += tl.load(group + first // K + row, mask=inside, other=0).to(tl.int32)
    if TABLE:
        gamma = _look_up(z, outcome, member, table, edges, J)
    factor = tl.load(scale)
    weight_0 = tl.where(counted, alpha_0 * factor, 0.0)
    weight_1 = alpha_1 * factor * (1.0 - share)
    weight = tl.where(positive, weight_1, weight_0)
    value, slope = _outcome(tl.where(positive, bits, -bits), e, log2_1_e, gamma, weight, KIND, PRECISE)
    slope = tl.where(positive, slope, -slope)
    if SMOOTH:
        if TABLE:
            gamma = _look_up(z, tl.zeros_like(outcome), member, table, edges, J)
        other, other_slope = _outcome(-bits, e, log2_1_e, gamma, share * weight_0, KIND, PRECISE)
        value = tl.where(positive, value + other, value)
        slope = tl.where(positive, slope - other_slope, slope)

    if GRADIENT:
        tl.store(gradient + target, slope.to(gradient.dtype.element_ty), mask=inside)
    loss = tl.sum(value) * 0.6931471805599453
    tl.store(losses + program, loss)
    if not tl.abs(loss) < float("inf"):  # else the count stays zero
        finite = tl.abs(value) < float("inf")
        tl.store(counts + program * 2 + 1, tl.sum(1 - finite.to(tl.int32)))


@triton.jit(do_not_specialize=["size_class"])
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
    e = tl.exp2(shifted * 1.4426950408889634)
    own = column[None, :] == label[:, None]
    total = tl.sum(e, 1)
    others = tl.sum(tl.where(own, 0.0, e), 1)
    log_p = tl.sum(tl.where(own, shifted, 0.0), 1) - tl.log(total)
    inverse = 1.0 / total
    q = others * inverse
    p = 1.0 - q
    # log p = log(1 - q): where q is small, the difference above has lost its digits.
    log_p = tl.where(q < 0.5, _log_of_rest(tl.minimum(q, 0.5)), log_p)
    ratio = tl.where(q > 0, log_p / q, -1.0)
    w = tl.where(label == C - 1, alpha_0, alpha_1)
    if KIND >= 0:
        for _ in tl.static_range(KIND):
            w = w * q
    else:
        w *= tl.where(q > 0, tl.exp2(gamma * tl.log2(q)), q)
    value = tl.where(counted, -log_p * w, 0.0)
    if GRADIENT:
        # dL/dz_j = (own - p_j) (gamma p log p / (1 - p) - 1) (1 - p)^gamma
        coefficient = w * (gamma * p * ratio - 1.0) * factor
        slope = (tl.where(own, q[:, None], -e * inverse[:, None])) * coefficient[:, None]
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
    dense = logits.is_contiguous() and out.is_contiguous()
    vector = 16 // logits.element_size()  # what one memory access of a thread holds
    options: dict[str, Any] = {
        "K": classes,
        "RUN": gcd(classes, vector) if classes % 4 == 0 else vector if classes > vector else 1,
        "J": table.shape[-1],
        "KIND": kind,
        "TABLE": looked_up,
        "SMOOTH": shape.smoothing > 0,
        "GRADIENT": gradient is not None,
        "GROUPED": group is not None and looked_up,
        "DENSE": dense,
        "PRECISE": logits.dtype == torch.float32,
    }
    # A kernel is compiled anew where an integer's divisibility by 16 changes, also one that it does not read.
    layout = (0,) * 7 if dense else (logits.shape[1], *logits.stride(), *out.stride())
    arguments = (total, total.bit_length(), *shape.weights, gamma, shape.smoothing / 2, *layout)
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
    options = {
        "C": classes,
        "COLUMNS": columns,
        "KIND": _whole(gamma),
        "GRADIENT": gradient is not None,
    }
    tensors = (logits, logits if gradient is None else gradient, labels.contiguous(), _one(scale, logits))
    arguments = (rows, rows.bit_length(), *FocalShape(alpha, gamma).weights, float(gamma))
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
            in_place = options["GRADIENT"] and tensors[0].data_ptr() == tensors[1].data_ptr()
            # Triton 3.10 will not contract a * b + c to one instruction unless asked.
            launch = _tuned(kernel, configs, in_place)[grid]
            launch(*tensors, losses, counts, *arguments, **options, enable_fp_fusion=True)
    else:
        kernel[grid](*tensors, losses, counts, *arguments, **options, BLOCK=configs[0][0])
    return losses.sum(dtype=torch.float64).float(), counts.sum(0)


@lru_cache(maxsize=4)
def _tuned(kernel: Any, configs: tuple[tuple[int, int], ...], in_place: bool) -> Any:
    """The kernel with its launch measured once per size class. Trials must not destroy logits that share the memory of
    the gradient (a copy of them is the price), nor leave sums of an earlier, wider launch behind."""
    choices = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in configs]
    keys = (
        ["size_class", "K", "KIND", "TABLE", "GRADIENT"]
        if kernel is _sigmoid_kernel
        else ["size_class", "C", "GRADIENT"]
    )
    restored = ["gradient"] if in_place else []
    return triton.autotune(choices, key=keys, restore_value=restored, reset_to_zero=["losses", "counts"])(kernel)


def _gamma(shape: FocalShape, device: torch.device) -> tuple[int, float, Tensor, Tensor]:
    """(kind, scalar gamma, table, edges); the tensors stand for nothing where gamma is a scalar."""
    if isinstance(shape.gamma, GammaTable):
        table = shape.gamma.gamma.to(device, torch.float32).contiguous()
        return -1, 0.0, table, shape.gamma.edge_logit.to(device, torch.float32).contiguous()
    nothing = torch.empty(1, device=device)
    return _whole(shape.gamma), float(shape.gamma), nothing, nothing


def _whole(gamma: float) -> int:
    """gamma where it is one of 0..5, else -1."""
    return int(gamma) if gamma in range(6) else -1


def _one(scale: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), device=like.device) if scale is None else scale.float()
