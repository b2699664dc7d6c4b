"""The compiled CPU loss against the definition in float64, and what it leaves to the path without a compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detection.ops import focal_compiled
from detection.ops.focal import choose

ROOT = Path(__file__).parents[2]
CASES = """
import math, torch
from detection.ops.focal import focal_sum
from detection.ops.focal_elements import FocalShape, GammaTable, focal_elements

def check(logits, labels, shape, **options):
    z = logits.double()
    z.requires_grad_()
    wanted = focal_elements(z, labels, shape).sum() * 0.5
    (slope,) = torch.autograd.grad(wanted, z)
    x = (logits * 1).requires_grad_()
    given = x * 1 if options else x
    out = focal_sum(given, labels, shape, scale=torch.tensor(0.5), implementation="compiled", **options)
    (gradient,) = torch.autograd.grad(out.loss, x)
    half = logits.dtype != torch.float32
    assert abs(out.loss.item() / wanted.item() - 1) < 1e-6, (out.loss, wanted)
    rounded = slope.to(logits.dtype).double()
    assert (gradient.double() - rounded).norm() <= (1e-3 if half else 1e-6) * rounded.norm()
    assert ((gradient.double() - slope).abs() <= (1e-2 if half else 1e-6) * slope.abs() + 1e-35).all()
    assert (out.num_positive, out.num_nonfinite) == (((labels >= 0) & (labels < logits.shape[2])).sum(), 0)

torch.manual_seed(0)
labels = torch.randint(-1, 25, (2, 1023), dtype=torch.int32).clamp(max=20)
near, far = torch.randn(2, 1023, 20) - 4.6, torch.randn(2, 1023, 20) * 4
for gamma in (2.0, 0.5):
    check(near, labels, FocalShape(0.25, gamma))
    check(far, labels, FocalShape(-1.0, gamma))
check(torch.randn(3, 4097, 5) - 2, torch.full((3, 4097), 5, dtype=torch.int32), FocalShape(0.25, 2.0))
check(near.bfloat16(), labels, FocalShape(0.25, 2.0))

table = GammaTable(torch.rand(1, 2, 3) * 4, torch.tensor([-5.0, 0.0]))
reads = labels[:, :41], near[:, :41].contiguous()
check(reads[1], reads[0], FocalShape(0.25, 2.0))                        # small
check(near, labels, FocalShape(0.25, -1.3))                             # inverse
check(near.transpose(1, 2).contiguous().transpose(1, 2), labels, FocalShape(0.25, 2.0))  # strided
check(near, labels, FocalShape(0.25, 2.0), in_place=True)
x = near.clone().requires_grad_()
one, two = (focal_sum(x, labels, FocalShape(0.25, table), implementation=i).loss for i in ("compiled", "cpu"))
assert one == two

broken = near.clone()
labels[0, :4] = torch.tensor([20, 20, -1, 20])
broken[0, 0, 3], broken[0, 1, 3], broken[0, 2, 3], broken[0, 3, 3] = math.inf, math.nan, math.nan, -math.inf
x = broken.requires_grad_()
out = focal_sum(x, labels, FocalShape(0.25, 2.0), implementation="compiled")
(gradient,) = torch.autograd.grad(out.loss, x)
assert out.num_nonfinite == 2
assert out.loss.isnan()
assert gradient.isnan().nonzero().tolist() == [[0, 1, 3]]
assert gradient[0, 0, 3] == 0.75
"""


@pytest.mark.slow
@pytest.mark.skipif(not focal_compiled.has_compiler(), reason="no C++ compiler")
def test_equals_the_definition() -> None:
    # In a process of its own: the compiler cannot trace the shape checks that the tests wrap around every function.
    done = subprocess.run([sys.executable, "-c", CASES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(focal_compiled.shutil, "which", lambda name: "/usr/bin/" + name)
    assert choose("compiled", torch.device("cpu")) == "compiled"
    with pytest.raises(ValueError, match="cannot run"):
        choose("compiled", torch.device("cuda"))
    monkeypatch.setattr(focal_compiled.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        choose("compiled", torch.device("cpu"))
