"""Times a step's softmax loss with a background class: ours, its definition, and torch's cross entropy.

Run: python -m tools.bench.softmax_focal --out tools/bench/results/softmax_focal.jsonl    (on a GPU: --device cuda)
All compute cross entropy (gamma 0, no alpha); "ours, gamma 2" does more, against the same peer. Forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.ops.focal import choose
from detection.ops.softmax_focal import softmax_focal_rows, softmax_focal_sum
from tools.bench.focal import IMAGES, POSITIVES
from tools.bench.harness import DTYPES, arguments, compare, forward_and_backward, report

CASES = ((80, 20_000, "float32"), (80, 20_000, "bfloat16"), (20, 50_000, "float32"), (20, 2_000, "float32"))


def make_level(classes: int, anchors: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits that spread by 1 around a background of probability .99, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, anchors, classes + 1, generator=generator)
    logits[..., classes] += torch.tensor(99.0 * classes).log()
    labels = torch.full((IMAGES, anchors), classes, dtype=torch.int32)
    labels[:, : anchors // 200] = -1
    labels[:, -POSITIVES:] = (torch.arange(POSITIVES) % classes).int()
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


def candidates(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    scale = torch.tensor(1 / (IMAGES * POSITIVES), device=logits.device)
    ours = choose("auto", logits.device)

    def fused(gamma: float) -> Tensor:
        return softmax_focal_sum(logits, labels, alpha=-1.0, gamma=gamma, scale=scale, implementation=ours).loss

    def torchs() -> Tensor:
        flat = labels.flatten().long()
        return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="sum") * scale

    return {
        "ours": lambda: fused(0.0),
        "ours, gamma 2": lambda: fused(2.0),
        "definition": lambda: softmax_focal_rows(logits, labels, -1.0, 0.0).sum() * scale,
        "torch": torchs,
    }


def time_case(case: tuple[int, int, str], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    classes, anchors, name = case
    logits, labels = make_level(classes, anchors, DTYPES[name], device)
    exact = logits.detach().double().requires_grad_()
    wanted = softmax_focal_rows(exact, labels, -1.0, 0.0).sum() / (IMAGES * POSITIVES)
    (slope,) = torch.autograd.grad(wanted, exact)
    tolerance = 1e-5 if name == "float32" else 3e-2  # torch rounds the loss, too

    def check(candidate: str, loss: object) -> None:
        if candidate == "ours, gamma 2":
            return
        assert isinstance(loss, Tensor)
        assert logits.grad is not None
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=tolerance, atol=0.0)
        assert (logits.grad.double() - slope).norm() < tolerance * slope.norm(), candidate

    def run(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: forward_and_backward(logits, loss)

    runs = {key: run(loss) for key, loss in candidates(logits, labels).items()}
    rows = compare(runs, "torch", repeats=repeats, check=check)
    return [{**row, "classes": classes, "anchors": anchors * IMAGES, "dtype": name} for row in rows]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    for case in CASES:
        print(f"K={case[0]}+1  A={IMAGES} x {case[1]}  {case[2]}", flush=True)
        report("softmax_focal", time_case(case, torch.device(options.device), options.repeats), options.out)


if __name__ == "__main__":
    main()
