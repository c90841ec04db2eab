"""What a process keeps on a GPU is made outside of the pool that its first caller uses."""

import threading
from contextlib import contextmanager

import pytest
import torch

from qkernels import weight
from qkernels.lasting import made_to_last, once_a_device
from qkernels.layouts import padding
from qkernels.modules import twins
from qkernels.scheme import QuantScheme

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Stream:
    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.events.append(f"{self.name} is waited for")


@pytest.fixture
def events(monkeypatch):
    """What is done to the streams of a made-up GPU."""
    events = []

    @contextmanager
    def stream(entered):
        events.append(f"on {entered.name}")
        yield
        events.append(f"no longer on {entered.name}")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller", events))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default", events))
    return events


def test_another_thread_makes_it_on_the_default_stream(events):
    def make():
        events.append("made")
        return threading.get_ident(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        thread, inference = made_to_last(make, GPU)
    assert thread != threading.get_ident()
    # Nothing that lasts may be a tensor of inference mode, which no gradient can be taken with.
    assert not inference
    assert events == [
        "on default",
        "default waits for caller",
        "made",
        "default is waited for",
        "no longer on default",
    ]


def test_errors_are_the_callers(events):
    def make():
        raise ValueError("no such table")

    with pytest.raises(ValueError, match="no such table"):
        made_to_last(make, GPU)


def test_on_the_cpu_the_caller_makes_it(events):
    assert made_to_last(threading.get_ident, CPU) == threading.get_ident()
    assert events == []


def test_once_for_each_device_and_the_same_arguments(events):
    made = []

    @once_a_device
    def table(device, *values):
        made.append((device, values))
        return list(values)

    first = table(GPU, 1, 2)
    assert table(GPU, 1, 2) is first and table("cuda:1", 1, 2) is first
    assert table("cuda", 1, 2) is first  # the current one
    assert table(GPU, 1, 3) == [1, 3] and table("cuda:0", 1, 2) is not first
    assert table(CPU, 1, 2) is table("cpu", 1, 2)
    devices = [(GPU, (1, 2)), (GPU, (1, 3)), (torch.device("cuda:0"), (1, 2)), (CPU, (1, 2))]
    assert made == devices


def test_nothing_is_forgotten():
    @once_a_device
    def table(device, number):
        return [number]

    all_of_them = [table(CPU, number) for number in range(5000)]
    assert all(table(CPU, number) is each for number, each in enumerate(all_of_them))


def test_a_graph_that_is_compiled_makes_its_own(monkeypatch):
    made = []
    table = once_a_device(lambda device: made.append(device))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    table(GPU)
    table(GPU)
    assert made == [GPU, GPU]


class Meta:
    """Stands for a tensor that is put on a device: which, and by which thread."""

    def __init__(self, *arguments, device, **keywords):
        self.device, self.thread = device, threading.get_ident()


def test_tables_are_made_to_last(events, monkeypatch):
    here = threading.get_ident()
    monkeypatch.setattr(torch, "tensor", Meta)
    nf4 = QuantScheme.parse("nf4-g64").weight
    for made in (weight.codebook(nf4, GPU, entries=20), weight.nested_table(GPU)):
        assert made.device == GPU and made.thread != here
    threads = []
    monkeypatch.setattr(torch, "arange", lambda *_, **__: threads.append(threading.get_ident()))
    with pytest.raises(TypeError):  # there is no GPU to go on with
        padding.column_order(QuantScheme.parse("w4a16-g24"), 100, GPU)
    assert threads and threads[0] != here


def test_a_twin_is_made_where_its_buffers_are(monkeypatch):
    asked = []
    monkeypatch.setattr(twins, "made_to_last", lambda make, device: asked.append(device) or make())
    buffer = torch.zeros(3)
    assert twins.of([buffer], lambda: "layer") == twins.of([buffer], lambda: "other") == "layer"
    assert asked == [CPU]
