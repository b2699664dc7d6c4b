"""Times a step's classification loss: ours, its definition, torchvision's head, and torch.compile of its formula.

Run: python -m tools.bench.focal --repeats 7 --out tools/bench/results/focal.jsonl
On a GPU: python -m tools.bench.focal --device cuda --out FILE    (tests the kernels there first, then times them)
It needs torch, torchvision, jaxtyping and, on a GPU, triton; the kernels' tests also pytest.
Every candidate computes the same loss and gradient, checked against the definition in float64 before timing. `copies`
is its time in multiples of one read and one write of the logits, measured in the same rounds; `cpu_ratio` compares
processor time, which a busy machine disturbs less. Peak extra memory includes the gradient.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import sigmoid_focal_loss

from detection.ops.focal import choose, focal_sum
from detection.ops.focal_compiled import has_compiler
from detection.ops.focal_elements import FocalShape, focal_elements
from tools.bench.harness import DTYPES, arguments, compare, forward_and_backward, report

ROOT = Path(__file__).resolve().parents[2]
SHAPE = FocalShape(0.25, 2.0)
IMAGES = 4
POSITIVES = 40  # an image, so that torchvision's mean over images of each image's own normaliser is the batch's

# (classes, anchors an image, dtype, mean and spread of the logits). -4.6 is the prior bias of a head; it starts within
# .1 of it, spreads to about 1 as it learns, and 3 around -3 is a head that has gone wrong.
CASES = (
    (80, 20_000, "float32", -4.6, 0.1),
    (80, 20_000, "float32", -4.6, 1.0),
    (80, 20_000, "float32", -3.0, 3.0),
    (80, 20_000, "bfloat16", -4.6, 0.1),
    (80, 2_000, "float32", -4.6, 0.1),
    (20, 50_000, "float32", -4.6, 0.1),
    (20, 2_000, "float32", -4.6, 0.1),
    (1, 200_000, "float32", -4.6, 0.1),
    (1, 2_000, "float32", -4.6, 0.1),
)
CUDA_CASES = tuple(  # the large ones first: each is written down when it is done
    (k, a, dtype, -4.6, 1.0)
    for a in (200_000, 100_000, 20_000, 2_000)
    for k in (80, 20, 1)
    for dtype in ("float32", "bfloat16", "float16")
)


@dataclass(frozen=True, eq=False)
class Scene:
    """One level's logits and what to learn, in our form and in torchvision's."""

    logits: Tensor
    labels: Tensor
    matched: list[Tensor]
    targets: list[dict[str, Tensor]]
    scale: Tensor


def make_scene(k: int, anchors: int, dtype: str, mean: float, spread: float, device: torch.device) -> Scene:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, anchors, k, generator=generator) * spread + mean
    matched = torch.full((IMAGES, anchors), -1)
    labels = torch.full((IMAGES, anchors), k, dtype=torch.int32)
    classes = torch.arange(POSITIVES) % k
    for n in range(IMAGES):
        order = torch.randperm(anchors, generator=generator)
        ignored = order[POSITIVES : POSITIVES + anchors // 200]
        matched[n, order[:POSITIVES]] = torch.arange(POSITIVES)
        labels[n, order[:POSITIVES]] = classes.int()
        matched[n, ignored], labels[n, ignored] = -2, -1
    scale = torch.tensor(1 / (IMAGES * POSITIVES), device=device)
    targets = [{"labels": classes.to(device)} for _ in range(IMAGES)]
    return Scene(
        logits.to(device, DTYPES[dtype]).requires_grad_(),
        labels.to(device),
        list(matched.to(device)),
        targets,
        scale,
    )


def candidates(scene: Scene) -> dict[str, Callable[[], Tensor]]:
    """Name -> the loss. The compiled formula gets torchvision's one-hot targets for free where its head builds them."""
    k = scene.logits.shape[-1]
    head = RetinaNetClassificationHead(8, 1, k)
    classes = torch.arange(k, device=scene.logits.device)
    ours = choose("auto", scene.logits.device)

    def formula(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        one_hot = (labels[..., None] == classes).to(logits.dtype)
        loss: Tensor = sigmoid_focal_loss(logits, one_hot, reduction="none")
        return (loss * (labels >= 0)[..., None]).sum() * scale

    compiled = torch.compile(formula, dynamic=False)

    def fused() -> Tensor:
        return focal_sum(scene.logits, scene.labels, SHAPE, scale=scene.scale, implementation=ours).loss

    def one_pass() -> Tensor:
        return focal_sum(scene.logits, scene.labels, SHAPE, scale=scene.scale, implementation="compiled").loss

    choices = {"ours, compiled": one_pass} if ours == "cpu" and has_compiler() else {}
    return {
        "ours": fused,
        **choices,
        "definition": lambda: focal_sum(scene.logits, scene.labels, SHAPE, scale=scene.scale).loss,
        "torchvision": lambda: head.compute_loss(scene.targets, {"cls_logits": scene.logits}, scene.matched),
        "torch.compile": lambda: compiled(scene.logits, scene.labels, scene.scale),
    }


def exact(scene: Scene) -> tuple[Tensor, Tensor]:
    logits = scene.logits.detach().double().requires_grad_()
    loss = focal_elements(logits, scene.labels, SHAPE).sum() * scene.scale
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def time_case(case: tuple[int, int, str, float, float], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    scene = make_scene(*case, device)
    losses = candidates(scene)
    target = torch.empty_like(scene.logits)
    copy = {"copy": lambda: target.copy_(scene.logits.detach())}
    wanted_loss, wanted = exact(scene)
    tolerance = 1e-5 if scene.logits.dtype == torch.float32 else 3e-2

    def check(name: str, output: object) -> None:
        if name == "copy":
            return
        assert isinstance(output, Tensor)
        assert scene.logits.grad is not None
        torch.testing.assert_close(output.double(), wanted_loss, rtol=tolerance, atol=0.0)
        error = (scene.logits.grad.double() - wanted).norm() / wanted.norm()
        assert error < tolerance, (name, error)

    rows = []
    for phase in ("forward", "backward", "both"):
        runs = {name: _phase(phase, scene, loss) for name, loss in losses.items()}
        timed_rows = compare({**runs, **copy}, "torchvision", repeats=repeats, check=check if phase == "both" else None)
        processor = {name: _processor_seconds(run, repeats) for name, run in {**runs, **copy}.items()}
        for row in timed_rows:
            name = row["candidate"]
            row |= _figures(name, timed_rows, processor, device) | {"phase": phase}
            if phase == "both" and name != "copy":
                row["extra_memory"] = peak_memory(runs[name], scene)
        rows += timed_rows
    k, anchors, dtype, mean, spread = case
    return [
        {**row, "classes": k, "anchors": anchors * IMAGES, "dtype": dtype, "logits": f"{mean}±{spread}"} for row in rows
    ]


def _phase(phase: str, scene: Scene, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    if phase == "forward":
        return loss_of
    if phase == "both":
        return lambda: forward_and_backward(scene.logits, loss_of)
    loss = loss_of()
    return lambda: torch.autograd.grad(loss, scene.logits, retain_graph=True)


def _processor_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor time of one call, over all threads."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _figures(
    name: str, rows: list[dict[str, Any]], processor: dict[str, float], device: torch.device
) -> dict[str, float]:
    """The row's ratios to the copy and the compiled peer; on a GPU, the share of the copy's bandwidth it reaches."""
    medians = {row["candidate"]: row["median_s"] for row in rows}
    figures = {"copies": medians[name] / medians["copy"], "to_compile": medians[name] / medians["torch.compile"]}
    if device.type == "cuda":
        return {**figures, "copy_bandwidth": medians["copy"] / medians[name]}
    return {
        **figures,
        "cpu_copies": processor[name] / processor["copy"],
        "cpu_ratio": processor[name] / processor["torchvision"],
        "cpu_to_compile": processor[name] / processor["torch.compile"],
    }


def peak_memory(run: Callable[[], object], scene: Scene) -> float:
    """Most bytes held at once above what was held before, over the bytes of the logits."""
    scene.logits.grad = None
    size = scene.logits.numel() * scene.logits.element_size()
    if scene.logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / size
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / size


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries write to the terminal beneath Python, as the profiler does."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, "wb") as nowhere:
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


def test_on_the_device() -> None:
    """The kernels' tests, on the GPU; raises where one fails. Without pytest, timing still checks every candidate."""
    if find_spec("pytest") is None:
        print("pytest is not installed: the kernels' tests are left out", flush=True)
        return
    files = [str(ROOT / "tests" / "ops" / name) for name in ("test_focal.py", "test_softmax_focal.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", *files]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "FOCAL_ON_CUDA": "1"}, check=True)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", type=int, default=None, help="only the first so many sizes")
    parser.add_argument("--no-tests", action="store_true", help="on a GPU: do not run the kernels' tests first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not options.no_tests:
        test_on_the_device()
    for case in (CUDA_CASES if device.type == "cuda" else CASES)[: options.cases]:
        print(f"K={case[0]}  A={IMAGES} x {case[1]}  {case[2]}  logits {case[3]} +- {case[4]}", flush=True)
        report("focal", time_case(case, device, options.repeats), options.out)


if __name__ == "__main__":
    main()
