"""The Triton kernels' machine code, which needs no GPU: compiled for one, it must keep up with that one's memory.

Run as a program, it prints what the code of every case consists of; the tests read that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 90)
CASES = (
    ("sigmoid", "float32", 80, 2048),
    ("sigmoid", "float32", 1, 2048),
    ("sigmoid", "bfloat16", 80, 4096),
    ("sigmoid", "bfloat16", 1, 4096),
    ("softmax", "float32", 81, 512),
    ("softmax", "bfloat16", 81, 512),
)
"""(kernel, dtype, classes, elements a program), each a launch that the kernel's first call tries."""

# An H100 SXM by its data sheet: 132 multiprocessors of 4 schedulers, each starting one instruction of 32 threads a
# cycle, and 3.35 TB/s of memory. A copy reaches nine tenths of that, about.
THREAD_INSTRUCTIONS = 132 * 4 * 32 * 1.7e9
BYTES = 0.9 * 3.35e12


def compile_cases() -> list[dict[str, Any]]:
    """The cases' opcodes up to the first exit, through the launcher and Triton's own specialisation of arguments."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from detection.ops import focal_triton
    from detection.ops.focal_elements import FocalShape

    tool = triton.knobs.nvidia.cuobjdump.path
    found: list[dict[str, Any]] = []
    case: dict[str, Any] = {}

    class Device:
        """What Triton asks of a driver before it compiles."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", case["capability"], 32)

        def get_current_device(self) -> int:
            return int(case["capability"])

        def get_current_stream(self, device: int) -> int:
            return 0

    def launch(kernel: Any, configs: Any, unit: int, total: int, tensors: Any, arguments: Any, options: Any) -> Any:
        block = case["block"]
        warps = dict(configs)[block]
        sums = torch.zeros(total), torch.zeros(total, 2, dtype=torch.int32)
        given = {**options, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
        code = kernel.warmup(*tensors, *sums, *arguments, **given, grid=(1,)).asm["cubin"]
        Path("code.cubin").write_bytes(code)
        listing = subprocess.run([tool, "-sass", "code.cubin"], check=True, capture_output=True, text=True).stdout
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", listing, re.MULTILINE)
        # Behind the first exit is the count of non-finite elements, where there are any.
        found.append({**case, "elements": block // (32 * warps), "opcodes": opcodes[: opcodes.index("EXIT")]})
        return torch.zeros(()), torch.zeros(2)

    triton.runtime.driver.set_active(Device())
    focal_triton._launch = launch
    for capability in CAPABILITIES:
        for kernel, dtype, k, block in CASES:
            case = {"kernel": kernel, "capability": capability, "dtype": dtype, "classes": k, "block": block}
            logits = torch.zeros(1, 16, k, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
            labels, gradient = torch.zeros(1, 16, dtype=torch.int32), torch.empty_like(logits)
            if kernel == "sigmoid":
                focal_triton.focal_triton(logits, labels, FocalShape(0.25, 2.0), None, None, gradient)
            else:
                focal_triton.softmax_focal_triton(logits, labels, 0.25, 2.0, None, gradient)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own, whose Triton is neither interpreted nor given another driver afterwards."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is not installed")
    tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    for tool in ("ptxas", "cuobjdump"):
        if not (tools / tool).exists():
            pytest.skip(f"this triton has no {tool} for CUDA")
    folder = tmp_path_factory.mktemp("code")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    cases: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(cases) == len(CAPABILITIES) * len(CASES)
    return cases


def test_no_register_goes_to_memory(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        assert not [code for code in case["opcodes"] if code.startswith(("LDL", "STL"))], case


def test_logits_and_gradient_move_in_vectors(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        if case["kernel"] == "sigmoid":
            vectors = case["elements"] * {"float32": 4, "bfloat16": 2}[case["dtype"]] // 16
            assert case["opcodes"].count("STG.E.128") == vectors, case
            assert case["opcodes"].count("LDG.E.128") >= vectors, case


def test_memory_is_slower_than_the_instructions(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        if case["kernel"] == "sigmoid":
            moved = 2 * {"float32": 4, "bfloat16": 2}[case["dtype"]] + 4 / case["classes"]  # and a label a row
            allowed = THREAD_INSTRUCTIONS / BYTES * moved
            assert len(case["opcodes"]) / case["elements"] < allowed, (case, allowed)


if __name__ == "__main__":
    print(json.dumps(compile_cases()))
