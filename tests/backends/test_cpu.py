"""The CPU kernels around their numbers: instructions, threads, forks, memory that is kept."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

import qkernels as qk
from qkernels import rounding
from qkernels.backends import cpu
from qkernels.errors import NoKernelError
from qkernels.layouts import VNNI, pack
from qkernels.select import KERNELS, make_problem
from tests import truth
from tests.bounds import FROBENIUS_BOUND

SCHEMES = ("w4a16-g64", "nf4-g64", "w8a8", "w4a8-g64", "w4a8-g64-flat")
LARGE = (600, 1024)  # enough work for threads, and a split of K for the first


def layer_of(scheme, n=LARGE[0], k=LARGE[1]):
    return qk.WQLinear.from_weight(
        rounding.quantize(torch.randn(n, k), scheme, bias=torch.randn(n))
    )


def chosen(scheme, m, environment):
    """The kernel that a new Python chooses with some variables set."""
    code = f"import qkernels as qk; print(*(row for row in qk.explain({scheme!r}, n=64, k=256, "
    code += f"m={m})), sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_the_environment_caps_the_instructions(isa):
    if cpu.why_no_isa(isa) is not None:
        pytest.skip(cpu.why_no_isa(isa))
    said = chosen("w8a8", 12 if isa == "amx" else 2, {"QKERNELS_CPU_ISA": isa})
    assert f"cpu_{isa}_int8: chosen" in said
    for better in cpu.ISAS[: cpu.ISAS.index(isa)]:
        assert f"cpu_{better}_int8: QKERNELS_CPU_ISA={isa} rules out {better}" in said


def test_an_unknown_cap_is_named():
    assert "QKERNELS_CPU_ISA='avx9' is not one of amx, avx512" in chosen(
        "w8a8", 1, {"QKERNELS_CPU_ISA": "avx9"}
    )


def test_missing_instructions_are_named(monkeypatch):
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)

    class Old:
        @staticmethod
        def why_no_isa(name):
            return "this CPU has no AMX with bf16 and int8" if name == "amx" else None

    monkeypatch.setattr(cpu, "_compiled", lambda: Old)
    cpu._why_no_isa.cache_clear()
    try:
        row = next(row for row in KERNELS if row.name == "cpu_amx_int8")
        problem = make_problem(
            qk.QuantScheme.parse("w8a8"), n=8, k=64, m=64, device="cpu", layout="vnni"
        )
        assert "has no AMX" in row.refusal(problem)
    finally:
        cpu._why_no_isa.cache_clear()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 5, 70])
def test_the_same_bits_for_every_number_of_threads(scheme, m):
    for shape in (LARGE, (40, 4096)):  # the second splits K
        layer = layer_of(scheme, *shape)
        x = torch.randn(m, shape[1]).bfloat16()
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(layer(x))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)
        exact = truth.product(layer.to_weight(), x)
        assert truth.error(results[0], exact) <= FROBENIUS_BOUND[torch.bfloat16]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_python_threads_at_once(scheme):
    layer, other = layer_of(scheme), layer_of("w4a16-g64", 300, 512)
    inputs = [torch.randn(m, LARGE[1]).bfloat16() for m in (1, 3, 20, 70)]
    wanted = [layer(x) for x in inputs]
    small = torch.randn(2, 512)
    wanted_small, wrong = other(small), []

    def work(i):
        for _ in range(20):
            if not torch.equal(layer(inputs[i]), wanted[i]):
                wrong.append(i)
            if not torch.equal(other(small), wanted_small):
                wrong.append(-i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Rows(torch.utils.data.Dataset):
    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.layer(self.x[i : i + 1])[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(method):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer, x = layer_of("w8a8"), torch.randn(4, LARGE[1])
        wanted = layer(x)  # starts the threads that a fork loses
        loader = torch.utils.data.DataLoader(
            Rows(layer, x), batch_size=4, num_workers=2, multiprocessing_context=method
        )
        (got,) = list(loader)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, wanted)


def test_after_a_fork():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer, x = layer_of("w4a16-g64"), torch.randn(20, LARGE[1])
        wanted = layer(x)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=lambda: answers.put(torch.equal(layer(x), wanted)))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0, "the child hangs" if child.is_alive() else child.exitcode
        assert answers.get()
    finally:
        torch.set_num_threads(before)


def test_a_call_allocates_its_output_alone():
    layer, x = layer_of("w8a8"), torch.randn(40, LARGE[1]).bfloat16()
    layer(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = layer(x)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated == y.nbytes


def test_a_forced_instruction_set_that_is_no_backend_is_named():
    with pytest.raises(NoKernelError, match="amx"):
        qk.WQLinear.from_linear(torch.nn.Linear(64, 8), "w8a8", backend="amx")


def test_wrong_arguments_of_the_compiled_kernels_are_named():
    compiled = pytest.importorskip("qkernels._C")

    def route(**changes):
        arguments = {
            "n": 32,
            "k": 64,
            "group": 32,
            "padded_group": 32,
            "code": "int4",
            "implied_zero": 8.0,
            "table": None,
            "nested_table": None,
            "isa": "portable",
            "tiles": False,
            "rounds_weights": False,
            "pairs": False,
            "activation": "none",
            "granularity": "token",
        }
        return compiled.CpuRoute(**{**arguments, **changes})

    for changes, message in (
        ({"group": 24, "padded_group": 24}, "multiple of 16"),
        ({"padded_group": 16}, "cannot be filled up to 16"),
        ({"group": 64, "padded_group": 80}, "one group of all columns"),
        ({"code": "int5"}, "code must be"),
        ({"code": "table4"}, "a table goes with table4"),
        ({"isa": "sse"}, "isa must be"),
        ({"tiles": True}, "tiles need amx"),
        ({"rounds_weights": True}, "only tiles and products"),
        ({"pairs": True}, "pairs are for codes of up to 4 bits"),
        ({"activation": "int4"}, "activation must be"),
        ({"granularity": "row"}, "granularity must be"),
        ({"code": "fp8e4m3", "activation": "int8"}, "int4 and int8 codes alone"),
        ({"k": 0}, "above 0"),
        ({"n": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            route(**changes)
    packed = pack(rounding.quantize(torch.randn(32, 64), "w4a16-g32"), VNNI)
    x = torch.randn(3, 64)

    def run(x=x, bias=None, row_scales=None, dtype=torch.float32, activation="none", **changes):
        buffers = {**packed.buffers, **changes}
        buffers = {name: tensor for name, tensor in buffers.items() if tensor is not None}
        return route(activation=activation).run(x, buffers, bias, row_scales, dtype)

    assert run().shape == (3, 32)
    words, scales, zeros = (packed.buffers[name] for name in ("words", "scales", "zeros"))
    quantized = {"x": x.to(torch.int8), "activation": "int8"}
    for arguments, message in (
        ({"x": x[:, :10]}, r"x must have shape \[..., 64\]"),
        ({"x": x.double()}, "fp16, bf16 or fp32"),
        ({"words": words[:1]}, "words must have shape"),
        ({"words": None}, "has words and scales"),
        ({"scales": scales.to(torch.uint8)}, "uint8 scales need"),
        ({"zeros": zeros[:, :1]}, "zeros must have shape"),
        ({"zeros": zeros.float(), "activation": "int8"}, "zeros must be uint8"),
        ({"words": words.transpose(1, 2).contiguous().transpose(1, 2)}, "must be contiguous"),
        ({"plumbing": words}, "no buffer called plumbing"),
        ({"bias": torch.zeros(31)}, r"bias must have shape \[32\]"),
        ({"row_scales": torch.ones(3)}, "takes no quantized x"),
        (quantized, "row_scales go with int8 x alone"),
        ({"row_scales": torch.ones(3), "activation": "int8"}, "row_scales go with int8 x alone"),
        ({**quantized, "row_scales": torch.ones(2)}, "row_scales must be 3 numbers"),
        ({"dtype": torch.float64}, "y must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**arguments)
