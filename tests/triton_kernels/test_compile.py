"""Every kernel compiles to a cubin for every capability, within triton_kernels/budgets.toml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tomllib

from qkernels.triton_kernels.compile import count_barriers

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB
BUDGETS = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "triton_kernels" / "budgets.toml").read_text()
)["budget"]

_SCRIPT = """
import dataclasses, json, sys
from qkernels.triton_kernels.compile import compile_all
records = compile_all(int(sys.argv[1]), only_sample=sys.argv[2] == "sample")
print(json.dumps([dataclasses.asdict(record) for record in records]))
"""

_LAUNCHED_SCRIPT = """
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from qkernels.triton_kernels.compile import source_of
from qkernels.triton_kernels.specializations import specializations
backend = CUDABackend(GPUTarget("cuda", 90, 32))
for spec in specializations(90):
    kernel, _, arguments, options = spec.launch
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, options = binder(**arguments, **options, debug=False)
    _, types, constants, attributes = kernel._pack_args(
        backend, options, bound, specialized, options
    )
    source = source_of(spec.launch)
    assert source.signature == types, (spec.name, source.signature, types)
    assert source.constants == constants, (spec.name, source.constants, constants)
    aligned = {path: value for path, value in attributes.items() if value}
    assert source.attrs == aligned, (spec.name, source.attrs, aligned)
"""


def run_script(*arguments: str) -> str:
    """Output of a process of its own: the kernels of this one may be for the interpreter."""
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compiled(capability: int, which: str) -> list[dict[str, Any]]:
    return json.loads(run_script(_SCRIPT, str(capability), which))


def check(records: list[dict[str, Any]], capability: int) -> None:
    for record in records:
        name = f"{record['kernel']} {record['specialization']}"
        assert record["cubin_bytes"] > 0, name
        assert record["shared"] <= SHARED_LIMIT[capability] * 1024, name
        rows = [row for row in BUDGETS if fnmatchcase(record["kernel"], row["kernel"])]
        assert len(rows) == 1, (name, rows)
        limits = {key: limit for key, limit in rows[0].items() if key != "kernel"}
        over = {key: record[key] for key, limit in limits.items() if record[key] > limit}
        assert not over, (name, over, limits)


def test_barriers_in_loops_are_told_from_others() -> None:
    assembly = """
    bar.sync 	0;
    @%p1 bra 	$L__BB0_3;
$L__BB0_2:                              // =>This Inner Loop Header: Depth=1
    barrier.sync 	0;
    bar.sync 	0;
    @%p2 bra 	$L__BB0_2;
$L__BB0_3:
    bar.sync 	0;
    bra.uni 	$L__BB0_4;
    bar.sync 	0;
$L__BB0_4:
    ret;
"""
    assert count_barriers(assembly) == (5, 2)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sample_compiles(capability: int) -> None:
    records = compiled(capability, "sample")
    check(records, capability)
    gemm = next(record for record in records if record["kernel"] == "weight_only_gemm_kernel")
    # Weights are decoded in the registers the tensor core reads: no 16-bit value goes back to
    # shared memory.
    assert "wgmma" in gemm["assembly"] if capability == 90 else "mma" in gemm["assembly"]
    assert "st.shared.b16" not in gemm["assembly"]
    assert "cp.async" in gemm["assembly"]


def test_what_is_compiled_is_what_a_launch_would_compile() -> None:
    run_script(_LAUNCHED_SCRIPT)


def test_everything_compiles() -> None:
    records = compiled(90, "all")
    check(records, 90)
    assert len(records) > 60


@pytest.mark.full
@pytest.mark.parametrize("capability", [value for value in CAPABILITIES if value != 90])
def test_everything_compiles_for_the_others(capability: int) -> None:
    check(compiled(capability, "all"), capability)
