"""Imports run one way, and importing the package touches no CUDA, no Triton and no file."""

import ast
import subprocess
import sys
from pathlib import Path

import qkernels

PACKAGE = Path(qkernels.__file__).parent
ORDER = (
    ("errors", "lasting", "machine", "progress", "sparse"),
    ("compiled", "positions", "spelling"),
    ("scheme",),
    ("fields",),
    ("weight",),
    ("bits", "rounding"),
    ("layouts",),
    ("reference", "preparation"),
    ("backends",),
    ("select",),
    ("proving",),
    ("ops",),
    ("activations",),
    ("modules",),
    ("calibration", "checkpoints"),
    ("quantizers",),
    ("integrations",),
    ("functional",),
    ("models",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports in qkernels/ are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "__init__" or "triton_kernels" in parts:
            continue
        assert parts[0] in LEVEL, f"{path} has no place in the order of imports"
        for name in imported(path):
            target = name.split(".")
            if target[0] == "qkernels" and len(target) > 1 and target[1] in LEVEL:
                # Neighbours on one level know nothing of each other.
                below = LEVEL[target[1]] < LEVEL[parts[0]] or target[1] == parts[0]
                assert below, f"{path} imports {name}"


def test_every_folder_of_modules_is_a_package():
    """Others are left out of a wheel."""
    assert all(path.with_name("__init__.py").exists() for path in PACKAGE.rglob("*.py"))


def test_triton_kernels_import_nothing_of_qkernels():
    import qkernels.triton_kernels as kernels

    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("qkernels"), path
                assert node.level < 2, path


def test_importing_touches_nothing():
    script = """
import sys, builtins, torch
import safetensors
opened, real = [], builtins.open
builtins.open = lambda *a, **k: (opened.append(a[0]), real(*a, **k))[1]
torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit("importing initializes CUDA")
import qkernels
heavy = [m for m in ("triton", "transformers", "matplotlib", "typer", "rich") if m in sys.modules]
sys.exit(f"imports {heavy}, opens {opened}" if heavy or opened else 0)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
