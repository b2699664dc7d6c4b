"""The fused focal loss inside torch: autograd, torch.compile, autocast, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detection.ops.focal import focal_sum
from detection.ops.focal_elements import FocalShape, GammaTable

SHAPE = FocalShape(0.25, 2.0)
ROOT = Path(__file__).parents[2]


def level(n: int = 2, a: int = 37, k: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, a, k, generator=generator) - 2
    labels = torch.randint(-1, k + 1, (n, a), generator=generator, dtype=torch.int32)
    return logits.requires_grad_(), labels


def gradient_of(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    (gradient,) = torch.autograd.grad(focal_sum(logits, labels, SHAPE, **options).loss, logits)  # type: ignore[arg-type]
    return gradient


def test_graphs_can_be_kept_and_gradients_accumulated() -> None:
    logits, labels = level()
    once = gradient_of(logits, labels, implementation="cpu")
    loss = focal_sum(logits, labels, SHAPE, implementation="cpu").loss
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, times * once)
    focal_sum(logits, labels, SHAPE, implementation="cpu").loss.backward()
    torch.testing.assert_close(logits.grad, 4 * once)
    torch.testing.assert_close(gradient_of(logits, labels, implementation="cpu"), once, rtol=0, atol=0)


def test_a_scale_and_a_later_factor_are_the_same() -> None:
    logits, labels = level()
    inside = focal_sum(logits, labels, SHAPE, scale=torch.tensor(0.125), implementation="cpu").loss
    outside = focal_sum(logits, labels, SHAPE, implementation="cpu").loss * 0.125
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(torch.autograd.grad(inside, logits), torch.autograd.grad(outside, logits))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    logits, labels = level()
    wanted = focal_sum(logits, labels, SHAPE, implementation="cpu")
    with torch.no_grad():
        quiet = focal_sum(logits, labels, SHAPE, implementation="cpu")
    assert quiet.loss.grad_fn is None
    assert quiet.loss == wanted.loss
    assert not wanted.num_positive.requires_grad


def test_second_derivatives_are_refused_by_name() -> None:
    logits, labels = level()
    loss = focal_sum(logits, labels, SHAPE, implementation="cpu").loss
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, logits, create_graph=True)
    (slope,) = torch.autograd.grad(focal_sum(logits, labels, SHAPE).loss, logits, create_graph=True)
    assert torch.autograd.grad(slope.sum(), logits)[0].isfinite().all()


def test_in_place_equals_out_of_place_behind_a_convolution() -> None:
    torch.manual_seed(0)
    head = torch.nn.Conv2d(4, 6, 1)
    image = torch.randn(2, 4, 5, 7).to(memory_format=torch.channels_last)
    labels = torch.randint(-1, 4, (2, 70), dtype=torch.int32)
    gradients = []
    for in_place in (False, True):
        logits = head(image).permute(0, 2, 3, 1).reshape(2, 70, 3)
        before = logits.detach().clone()
        loss = focal_sum(logits, labels, SHAPE, implementation="cpu", in_place=in_place).loss
        assert torch.equal(logits.detach(), before) is not in_place
        head.zero_grad()
        (3 * loss).backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    logits, labels = level()
    logits = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = focal_sum(logits, labels, SHAPE, implementation="cpu")
    assert out.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(2 * out.loss, logits)
    assert gradient.dtype == dtype


def test_operator_passes_torchs_own_checks() -> None:
    logits, labels = level()
    table = GammaTable(torch.rand(1, 2, 3) * 4, torch.tensor([-1.0, 0.0]))
    for extra in ((None, None), (table.gamma, table.edge_logit)):
        arguments = (logits, labels, *extra, None, torch.tensor(0.5), 0.25, 2.0, 0.0, True, False)
        torch.library.opcheck(
            torch.ops.detection.focal.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


COMPILED = """
import torch
from detection.ops.focal import focal_sum
from detection.ops.focal_elements import FocalShape

def loss_of(logits, labels):
    shape = FocalShape(0.25, 2.0)
    return focal_sum(logits * 2, labels, shape, scale=torch.tensor(0.5), implementation="cpu").loss.sin()

logits = (torch.randn(2, 37, 5) - 2).requires_grad_()
labels = torch.randint(-1, 6, (2, 37), dtype=torch.int32)
compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
wanted, loss = loss_of(logits, labels), compiled(logits, labels)
torch.testing.assert_close(loss, wanted)
torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, logits))
"""


def test_compiles_into_one_graph() -> None:
    # In a process of its own: the compiler cannot trace the shape checks that the tests wrap around every function.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
