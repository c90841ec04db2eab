"""Parameters on the meta device, while other threads make modules of their own."""

import threading

import pytest
from torch import nn

from qkernels.checkpoints.limits import TooManyParametersError, parameters_on_meta


@pytest.fixture
def made_aside():
    """A thread within `parameters_on_meta`; calling it ends that."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with parameters_on_meta(1):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()

    def end():
        leave.set()
        thread.join()

    yield end
    end()


def test_parameters_have_no_memory_within():
    with parameters_on_meta(1):
        assert nn.Linear(2, 3).weight.is_meta
    assert not nn.Linear(2, 3).weight.is_meta


def test_too_many_are_an_error():
    named = pytest.raises(TooManyParametersError, match="more than 1004 parameters")
    with named, parameters_on_meta(1):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(1000))


def test_modules_of_other_threads_are_left_alone(made_aside):
    assert not nn.Linear(2, 3).weight.is_meta


def test_nothing_stays_when_threads_leave_in_any_order(made_aside):
    second_inside, leave = threading.Event(), threading.Event()

    def hold():
        with parameters_on_meta(1):
            second_inside.set()
            leave.wait()

    second = threading.Thread(target=hold)
    second.start()
    # It waits for the first to leave; this gives it the time to do otherwise.
    second_inside.wait(0.2)
    made_aside()
    leave.set()
    second.join()
    assert nn.Module.register_parameter.__module__ == nn.Module.__module__
