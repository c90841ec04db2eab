"""Two processes that calibrate together end as one, in the same codes or the same error."""

import pytest
import torch
import torch.multiprocessing

from qkernels.quantizers.methods import METHODS
from tests.calibration import scenarios
from tests.calibration.scenarios import ALIKE, BATCHES, FAILING, SIZE, run_scenario


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name -> what each process got; all scenarios in one pair of processes."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=scenarios.main, args=(rank, str(folder))) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(2 * scenarios.TIMEOUT)
    finally:
        for process in processes:
            process.kill()

    def of(name):
        paths = [folder / f"{name}-{rank}.pt" for rank in range(SIZE)]
        return [torch.load(p, weights_only=False) if p.exists() else None for p in paths]

    return of


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.setattr("qkernels.quantizers.methods.METHODS", METHODS)
    before = dict(METHODS)
    scenarios.add_methods()
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def one_thread():
    """As the processes have: sums over rows depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.usefixtures("methods", "one_thread")
@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_end_as_one(results, name):
    first, second = results(name)
    assert "raised" not in first, first
    assert equal(first["state"], second["state"])
    assert first["report"] == second["report"]
    batches = [batch for own in BATCHES for batch in own]
    one = run_scenario(ALIKE[name], 0, None, batches)
    assert equal(one["state"], first["state"])
    assert one["report"] == first["report"]


def test_what_the_scenarios_are_for(results):
    """Rows of both processes are sampled; a block that one reaches, an expert that none does."""
    assert set(results("experts")[0]["report"]["unreached"]) == {"blocks.1.4.up", "blocks.1.4.down"}
    assert results("skipped")[0]["report"]["unreached"] == {}
    assert "called more than once" in results("twice")[0]["report"]["whole_model"]
    assert results("gptq")[0]["report"]["whole_model"] is None
    state = results("awq")[0]["state"]
    torch.manual_seed(0)
    assert not torch.equal(state["blocks.0.norm.weight"], scenarios.Normed().blocks[0].norm.weight)


MESSAGES = {
    "not a number": ("LayerError", "blocks.0.up: a calibration batch gives it inputs that are not"),
    "refusing": ("IndexError", "39 positions"),
    "interrupted": ("KeyboardInterrupt", ""),
    "no batch": ("LayerError", "calibration holds no batch"),
    "other scheme": (
        "LayerError",
        "process 1 of the process_group differs from process 0 in the sc",
    ),
    "other weights": (
        "LayerError",
        "process 1 of the process_group differs from process 0 in the mo",
    ),
    "no calibration": ("LayerError", "differs from process 0 in the calibration batches: give all"),
    "mistake": ("NoKernelError", "nonesuch"),
    "own codes": (
        "LayerError",
        "blocks.0: the processes made different codes of the same statistic",
    ),
    "uses batches": (
        "LayerError",
        "uses_batches runs the calibration batches itself, which the proc",
    ),
    "resumed": ("LayerError", "a folder to resume from is of one process: leave process_group out"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_one_raises_all_raise(results, name):
    assert {*MESSAGES, "left alone"} == set(FAILING)
    first, second = results(name)
    kind, text = MESSAGES[name]
    assert second["raised"] == kind and text in second["text"]
    if name in ("refusing", "interrupted", "no batch", "mistake"):
        kind = kind if name in ("no batch", "mistake") else "LayerError"
        assert first["raised"] == kind and first["text"].startswith("in process 1: ")
        assert text in first["text"]
    else:
        assert first == second


def test_a_process_that_ends_does_not_leave_the_other_waiting(results):
    first, second = results("left alone")
    assert second is None
    assert first["raised"] == "LayerError"
    assert "process 0 has lost another one of its process_group" in first["text"]
