"""What two processes calibrate together, for test_distributed.py. Each scenario runs in all of
them; its result is what the process got, or the error that it raised."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

import qkernels as qk
from qkernels import rounding
from qkernels.calibration.statistics import Needs
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from tests.plain_model import Block, Model, no_forward_is_left, snapshot, unchanged

SIZE = 2
TIMEOUT = 120
"""Seconds that a process waits for the others."""

FIRST = [torch.arange(240).view(4, 60) % 30, torch.arange(20)[None], torch.arange(7)[None] + 3]
SECOND = [(torch.arange(240) * 7 % 40).view(4, 60), torch.arange(39, 0, -1)[None]]
BATCHES = [FIRST, SECOND]
"""Of each process."""


class NormBlock(Block):
    """A block whose inputs can be scaled in front of its first layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(72)
        self.norm.weight.data[::9] *= 20

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Normed(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(NormBlock() for _ in range(3))


class Experts(Model):
    """Four experts of ten tokens each, and one of none; the fourth's are in one process alone."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = nn.ModuleList(Block() for _ in range(5))

    def forward(self, tokens):
        x = self.blocks[0](self.embed(tokens))
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.blocks[1]):
            taken = tokens // 10 == i if i < 4 else tokens < 0
            y[taken] = expert(x[taken])
        return self.blocks[2](x + y)


class Skipping(Model):
    """Blocks that only sequences of some lengths reach: the second in one process alone."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if number != 1 or tokens.shape[1] == 39:
                x = block(x)
        return self.lm_head(x)


class Twice(Model):
    """Long sequences, which one process has, go through a block twice."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and tokens.shape[1] == 39:
                x = block(x)
        return self.lm_head(x)


def not_a_number():
    """A token of the second process has no finite embedding."""
    model = Model()
    model.embed.weight.data[39] = torch.nan
    return model


class Refusing(Model):
    """Fails in the second block, on what one process has."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if number == 1 and tokens.shape[1] == 39:
                raise IndexError("39 positions")
            x = block(x)
        return self.lm_head(x)


def _own_codes(task, parameters):
    """As if the processors of two machines computed differently."""
    weight = task.weight.float() * (1 + torch.distributed.get_rank())
    return rounding.quantize(weight, task.scheme)


def _run_batches(task, parameters):
    raise AssertionError("it is refused before")


OWN_CODES = Method(name="own_codes", title="", quantize=_own_codes)
USES_BATCHES = Method(name="uses_batches", title="", finish=_run_batches, uses_batches=True)
LOOKS = Method(
    name="looks",
    title="rounds, and looks at a sample of rows",
    quantize=lambda task, parameters: rounding.fit(task.weight, task.scheme),
    statistics=lambda scheme, parameters: Needs(dense=("rows",)),
)


def interrupted(rank):
    def progress(done, total, name):
        if rank == 1 and done == 3:
            raise KeyboardInterrupt

    return {"progress": progress}


def leaves(rank):
    def progress(done, total, name):
        if rank == 1 and done == 3:
            os._exit(0)

    return {"progress": progress}


@dataclass(frozen=True)
class Scenario:
    """Arguments of `quantize_model`; `of_rank` gives more of them, for each process."""

    method: str = "rtn"
    scheme: str = "w8a8-static"
    model: Callable[[], nn.Module] = Model
    options: tuple[tuple[str, Any], ...] = ()
    of_rank: Callable[[int], dict[str, Any]] = lambda rank: {}


ALIKE = {
    "static": Scenario(),
    "percentile": Scenario(options=(("observer", "percentile(percent=98)"),)),
    "moving average": Scenario(options=(("observer", "moving_average"),)),
    "tokenwise": Scenario(options=(("observer", "tokenwise"),)),
    "migrated": Scenario("outlier_suppression", model=Normed),
    "zero points": Scenario(scheme="w8a8-staticasym", options=(("observer", "mse"),)),
    "sample": Scenario("looks", "w4a16-g24"),
    "gptq": Scenario("gptq", "w4a16-g24"),
    "gptq full": Scenario("gptq(act_order=full, drift=0)", "w4a16-g24-sym"),
    "awq": Scenario("awq", "w4a16-g24", Normed),
    "smoothquant": Scenario("smoothquant(steps=3)+gptq", "w8a8", Normed),
    "smoothquant factors": Scenario("smoothquant", "w8a8-static"),
    "experts": Scenario("gptq", "w4a16-g24", Experts),
    "experts static": Scenario(model=Experts),
    "skipped": Scenario("gptq", "w4a16-g24", Skipping),
    "twice": Scenario("gptq", "w4a16-g24", Twice),
}
"""What ends as it does in one process."""

FAILING = {
    "not a number": Scenario(model=not_a_number),
    "refusing": Scenario(model=Refusing),
    "interrupted": Scenario(of_rank=interrupted),
    "no batch": Scenario(of_rank=lambda rank: {"calibration": BATCHES[rank] if rank == 0 else []}),
    "other scheme": Scenario(of_rank=lambda rank: {"exclude": ["*.up"] if rank else ["*.down"]}),
    "other weights": Scenario(of_rank=lambda rank: {"seed": rank}),
    "no calibration": Scenario(
        scheme="w8a16", of_rank=lambda rank: {"calibration": BATCHES[0] if rank else None}
    ),
    "mistake": Scenario(of_rank=lambda rank: {"backend": "nonesuch" if rank else None}),
    "own codes": Scenario("own_codes", "w8a16"),
    "uses batches": Scenario("rtn+uses_batches", "w8a16"),
    "resumed": Scenario(options=(("resume", "nowhere"),)),
    "left alone": Scenario(of_rank=leaves),
}
"""What all processes raise. The last one ends a process."""


def run_scenario(scenario: Scenario, rank: int, group: Any, batches: list) -> dict[str, Any]:
    options = {"calibration": batches, **dict(scenario.options), **scenario.of_rank(rank)}
    torch.manual_seed(options.pop("seed", 0))
    model = scenario.model()
    before = snapshot(model)
    try:
        report = qk.quantize_model(
            model, scenario.method, scenario.scheme, process_group=group, **options
        )
    except (Exception, KeyboardInterrupt) as error:
        unchanged(model, before)
        assert no_forward_is_left()
        return {"raised": type(error).__name__, "text": str(error)}
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    return {"state": state, "report": report.as_dict()}


def add_methods() -> None:
    for method in (OWN_CODES, USES_BATCHES, LOOKS):
        METHODS[method.name] = method


def main(rank: int, folder: str) -> None:
    """Runs every scenario in a process, and writes its results."""
    torch.set_num_threads(1)
    add_methods()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    group = torch.distributed.group.WORLD
    for name, scenario in {**ALIKE, **FAILING}.items():
        result = run_scenario(scenario, rank, group, BATCHES[rank])
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
