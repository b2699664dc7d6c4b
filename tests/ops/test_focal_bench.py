"""The focal benchmark runs where little is installed, and measures memory as it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "beartype", "timm", "pytest", "albumentations", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from tools.bench.focal import SHAPE, candidates, exact, make_scene, peak_memory
from tools.bench.harness import forward_and_backward

scene = make_scene(20, 5_000, "float32", -4.6, 0.1, torch.device("cpu"))
losses = candidates(scene)
for name in ("ours", "definition", "torchvision"):
    loss = forward_and_backward(scene.logits, losses[name])
    torch.testing.assert_close(loss.double(), exact(scene)[0], rtol=1e-5, atol=0.0)
    print(f"{name} {peak_memory(lambda: forward_and_backward(scene.logits, losses[name]), scene):.2f}")
"""


def test_runs_without_the_projects_other_dependencies() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    memory = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert memory.keys() == {"ours", "definition", "torchvision"}  # and nothing that the profiler says
    assert float(memory["ours"]) < 2 < 8 < float(memory["torchvision"])
