"""Routes: what qkernels._C asks Python for, once for a range of rows, and does by itself then."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels import compiled, ops, select
from qkernels.errors import NoKernelError, WeightError

pytestmark = pytest.mark.skipif(
    compiled.extension() is None, reason=f"qkernels._C is missing: {compiled.problem()}"
)
N, K = 48, 200


def layer_of(text="w4a16-g64", **kwargs):
    return qk.WQLinear.from_linear(torch.nn.Linear(K, N), text, **kwargs)


@contextmanager
def questions():
    """Lists the questions put to Python meanwhile: (dtype of x, rows)."""
    seen = []

    def answer(x, scale, buffers, spec, dtype):
        seen.append((x.dtype, x.numel() // K))
        return ops._answer(x, scale, buffers, spec, dtype)

    select.forget_choices()
    compiled.extension().answer_with(answer)
    try:
        yield seen
    finally:
        compiled.extension().answer_with(ops._answer)


def reading(m, dtype=torch.float32):
    return torch.randn(m, K).to(dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8", "w4a8-g64", "fp8-a8", "w4a16-g24"])
def test_python_is_asked_once_for_each_range_of_rows_and_type(text, backend):
    layer = layer_of(text, backend=backend)
    with questions() as seen:
        for _ in range(2):
            for dtype in (torch.float32, torch.bfloat16):
                for m in (1, 2, 3, 8, 9, 17, 40, 100, 300):
                    assert layer(reading(m, dtype)).dtype == dtype
    problem = ops._problem(ops.PackedSpec.parse(layer._spec), 0, torch.float32, torch.device("cpu"))
    ranges, m = 0, 0
    while m is not None and m <= 300:
        most = select.choose(replace(problem, m=max(m, 1)), backend).most_rows
        ranges, m = ranges + 1, None if most is None else most + 1
    assert len([dtype for dtype, _ in seen if dtype == torch.float32]) == ranges
    assert len(seen) < 10


def test_layers_of_one_kind_share_their_routes():
    first, second, other = layer_of(), layer_of(), layer_of("w4a16-g32")
    with questions() as seen:
        for layer in (first, second, other):
            layer(reading(1))
    assert len(seen) == 2


def test_quantized_x_takes_the_route_of_its_layer():
    layer = layer_of("w8a8")
    x = reading(5, torch.bfloat16)
    with questions() as seen:
        want = layer(x)
        assert torch.equal(layer(qk.quantize_activation(x)), want)
    assert len(seen) == 1


def test_a_choice_that_changed_is_asked_for_again():
    layer, x = layer_of(), reading(1)
    layer(x)
    with questions() as seen:
        layer(x)
        select.forget_choices()
        layer(x)
    assert len(seen) == 2


def test_what_is_wrong_is_said_by_python_also_after_calls_that_were_right():
    layer = layer_of()
    buffers = list(layer.packed.buffers.values())
    x = reading(2)
    for _ in range(2):
        for wrong, message in (
            (torch.randn(2, 63), r"\[..., 200\], got \[2, 63\]"),
            (torch.randn(2, 400), r"\[..., 200\], got \[2, 400\]"),
            (x.double(), "float64"),
            (x.int(), "int32"),
            (torch.tensor(1.0), r"\[..., 200\], got \[\]"),
        ):
            with pytest.raises(WeightError, match=message):
                layer(wrong)
        for given in (buffers[:-1], [*buffers, buffers[0]], []):
            with pytest.raises((ValueError, IndexError)):
                ops.linear_operator(x, given, None, layer._spec)
        with pytest.raises(ValueError, match="words must have shape"):
            ops.linear_operator(x, [buffers[0][:1], *buffers[1:]], None, layer._spec)
        with pytest.raises(ValueError, match="unpack"):
            ops.linear_operator(x, buffers, None, "nonsense")
        with pytest.raises(NoKernelError, match="triton_weight_only_gemv: needs a CUDA GPU"):
            ops.linear_operator(x, buffers, None, layer._spec.replace("||", "|triton|"))
        layer(x)


def test_an_error_of_a_kernel_in_python_arrives_as_it_is():
    layer, route = layer_of(backend="reference"), compiled.extension().PythonRoute

    def fail(x, buffers, bias):
        raise KeyError("of mine")

    def answer(*question):
        return route(fail, None), 0, None

    select.forget_choices()
    compiled.extension().answer_with(answer)
    try:
        with pytest.raises(KeyError, match="of mine"):
            layer(reading(1))
    finally:
        compiled.extension().answer_with(ops._answer)
        select.forget_choices()


def test_threads_ask_run_and_forget_at_once():
    layers = [layer_of(), layer_of("w8a8"), layer_of(backend="reference"), layer_of("fp8-a8")]
    inputs = [reading(m) for m in (1, 3, 20)]
    wanted = [[layer(x) for x in inputs] for layer in layers]
    wrong, running = [], threading.Event()
    running.set()

    def work(seed):
        for step in range(60):
            i, j = (step + seed) % len(layers), step % len(inputs)
            if not torch.equal(layers[i](inputs[j]), wanted[i][j]):
                wrong.append((i, j))

    def forget():
        while running.is_set():
            select.forget_choices()

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    forgetting = threading.Thread(target=forget, daemon=True)
    for thread in (*threads, forgetting):
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    running.clear()
    forgetting.join(timeout=300)
    assert not any(thread.is_alive() for thread in (*threads, forgetting)), (
        "a thread waits for ever"
    )
    assert not wrong
