"""The fused focal loss under DistributedDataParallel: two ranks' gradients are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK = """
import sys, torch
from torch import nn
from detection.ops.focal import focal_sum
from detection.ops.focal_elements import FocalShape

def loss_of(head, images, labels):
    total = 0
    for half in (slice(0, 9), slice(9, 35)):
        logits = head(images).permute(0, 2, 3, 1).reshape(len(images), 35, 3)[:, half]
        total = total + focal_sum(logits, labels[:, half], FocalShape(0.25, 2.0), implementation="cpu").loss
    return total

store, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
head = nn.Conv2d(4, 3, 1)
images, labels = torch.randn(4, 4, 5, 7), torch.randint(-1, 4, (4, 35), dtype=torch.int32)
(loss_of(head, images, labels) / 2).backward()
wanted = [p.grad.clone() for p in head.parameters()]
head.zero_grad()
parallel = nn.parallel.DistributedDataParallel(head)
mine = slice(2 * rank, 2 * rank + 2)
with parallel.no_sync():  # accumulates, then exchanges
    (loss_of(parallel, images[mine], labels[mine]) / 2).backward()
(loss_of(parallel, images[mine], labels[mine]) / 2).backward()
for parameter, gradient in zip(head.parameters(), wanted):
    torch.testing.assert_close(parameter.grad, gradient)
torch.distributed.destroy_process_group()
"""


def test_ranks_add_up_to_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
