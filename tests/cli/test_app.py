"""What holds for every command: help, errors as one line, exit codes, clean output."""

import builtins
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qkernels import cli
from qkernels.cli import bench, doctor
from qkernels.select import Explanation

FACTS = {"system": "Linux", "architecture": "x86_64", "cpu": "a CPU", "cores": 8, "cpu_isa": []}
COMMANDS = ("doctor", "quantize", "list", "eval", "generate", "explain", "inspect", "bench")


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(re.search(rf"^ *{name} +\S", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_each_command_explains_itself(run, command: str):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage:" in out


def test_the_commands_import_neither_torch_nor_transformers_for_their_help():
    # In a process of its own: this one has them. qkernels itself is kept from importing torch.
    program = (
        "import sys, types\n"
        "package = types.ModuleType('qkernels'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['qkernels'] = package\n"
        "import qkernels.cli.app\n"
        "sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)\n"
    )
    package = str(next(iter(sys.modules["qkernels"].__path__)))
    done = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [("no-such-command",), ("explain",), ("eval", "x", "--nope")])
def test_wrong_usage_is_exit_code_2(run, arguments: tuple[str, ...]):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage:" in err


def test_an_error_is_one_line_and_a_traceback_with_debug(run):
    code, out, err = run("explain", "w9a16")
    assert (code, out) == (1, "")
    assert err.startswith("qkernels: scheme 'w9a16' does not parse")
    assert err.count("\n") == 1
    code, _, err = run("--debug", "explain", "w9a16")
    assert code == 1
    assert "Traceback" in err
    assert "SchemeError" in err


def test_an_operating_system_error_names_the_file(run, monkeypatch):
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(doctor, "_reference", fail)
    assert run("doctor") == (1, "", "qkernels: /secret: Permission denied\n")


def test_an_interrupt_is_one_line_and_exit_code_130(run, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_reference", interrupt)
    assert run("doctor") == (130, "", "qkernels: interrupted\n")


def test_a_fault_of_our_own_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(doctor, "_reference", lambda: 1 / 0)
    code, _, err = run("doctor")
    assert code == 1
    assert "qkernels:" not in err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_it_says_how_to_install_them(monkeypatch, capsys, missing: str):
    real = builtins.__import__

    def imported(name: str, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("qkernels.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    expected = f"qkernels: the command line needs {missing}: pip install 'qkernels[cli]'\n"
    assert capsys.readouterr() == ("", expected)


def test_doctor_names_every_backend_with_a_reason(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    names = ("reference", "_C", "cuda kernels", "triton", "triton interpreter", "CUDA device")
    for name in (*names, "torch threads"):
        assert re.search(rf"│ {re.escape(name)}[^│]*│[^│]*\w", out), name


def test_doctor_says_why_the_extension_is_missing():
    # In a process of its own, which has not found the extension yet.
    program = (
        "import sys; sys.modules['qkernels._C'] = None; sys.argv[1:] = ['doctor']; "
        "from qkernels.cli import main; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    line = next(line for line in out.splitlines() if "_C (C++)" in line)
    assert "│ no" in line
    assert "the CPU runs the reference" in line


@pytest.mark.parametrize("missing", [None, "this CPU has no AMX with bf16 and int8"])
def test_doctor_lists_the_instructions_of_the_cpu(run, monkeypatch, missing):
    other = "this build is for x86 CPUs"
    reasons = {"amx": missing, "neon_i8mm": other, "neon_dot": other, "neon": other}
    monkeypatch.setattr("qkernels.backends.cpu.why_no_isa", reasons.get)
    _, out, _ = run("doctor")
    line = next(line for line in out.splitlines() if "cpu kernels" in line)
    assert "avx512, avx2, portable" in line and "│ yes" in line
    assert ("amx, avx512" in line) == (missing is None)
    assert missing is None or missing in line


def test_doctor_says_why_triton_is_missing(run, monkeypatch):
    monkeypatch.setattr(
        "qkernels.backends.triton.import_problem", lambda: "Triton does not import (no [such] file)"
    )
    _, out, _ = run("doctor")
    assert out.count("Triton does not import (no [such] file)") == 2


@pytest.mark.parametrize("reason", [None, "needs compute capability 8.0 or more"])
def test_doctor_on_a_gpu(run, monkeypatch, reason: str | None):
    rows = [
        Explanation("triton_weight_only_gemv", "triton", False, "is for 4 rows"),
        Explanation("triton_weight_only_gemm", "triton", reason is None, reason),
    ]
    if reason is not None:
        rows[0] = Explanation("triton_weight_only_gemv", "triton", False, reason)
    monkeypatch.setattr("qkernels.select.explain", lambda *args, **kwargs: rows)
    monkeypatch.setattr("qkernels.backends.triton.import_problem", lambda: None)
    monkeypatch.setattr("qkernels.machine.describe", lambda: FACTS)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (
        ("is_available", True),
        ("get_device_name", "NVIDIA H200"),
        ("get_device_capability", (9, 0)),
        ("get_device_properties", SimpleNamespace(total_memory=141 * 2**30)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    code, out, _ = run("doctor")
    assert code == 0
    assert "NVIDIA H200, compute capability 9.0, 141 GiB, CUDA 13.0" in out
    there = "yes" if reason is None else "no"
    line = next(line for line in out.splitlines() if line.startswith("│ triton  "))
    assert f"│ {there} " in line
    assert (reason or "Triton 3") in line


def test_bench_hands_its_arguments_on(run, monkeypatch):
    seen = []

    def called(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        seen.append((command, env["PYTHONPATH"].split(":")[0]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(bench.subprocess, "run", called)
    code, _, _ = run("bench", "--quick", "--m", "1", "--help")
    assert code == 7
    command = [sys.executable, "-m", "bench", "--quick", "--m", "1", "--help"]
    assert seen == [(command, str(bench.repository()))]


def test_bench_outside_a_checkout_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "repository", lambda: tmp_path)
    code, out, err = run("bench")
    assert (code, out) == (1, "")
    assert "clone the repository" in err
