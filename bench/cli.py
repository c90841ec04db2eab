"""The command line of the benchmark. Needs nothing but torch and the standard library."""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from bench import children, load, plot, report, results, roofline, schedule
from bench.children import Children
from bench.driver import INTERRUPTED, Driver, Plan, time_is_up
from bench.progress import Progress
from bench.results import Results, ResultsError
from bench.shapes import M_VALUES, MODELS, Layer, model_layers, parse_shape, without_repeats
from bench.subjects import SUBJECTS, Problem, Subject
from bench.subjects.dense import DTYPE_NAMES, baseline_name
from qkernels import compiled, machine
from qkernels.errors import SchemeError
from qkernels.scheme import QuantScheme

DEFAULT_SCHEMES = {
    "cpu": "w4a8-g128,w4a16-g128,w8a8,nf4-g64",
    "cuda": "w4a16-g128,w8a16-sym,w8a8,w4a8-g128",
}
INTERRUPTED_STATUS = 130
"""The exit code of a command that SIGINT ended."""


class UsageError(Exception):
    """An option that cannot be followed; the message is one line for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _words(values: Sequence[str] | None) -> list[str]:
    """Options take their values apart by spaces, by commas, or both."""
    return [word for value in values or () for word in value.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench",
        description="Times qkernels and its peers side by side. See docs/benchmarks.md.",
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--schemes",
        nargs="+",
        metavar="SCHEME",
        help="those that targets are set for, unless given",
    )
    add("--models", nargs="+", metavar="MODEL", help=f"layers of: {', '.join(MODELS)}")
    add("--shapes", nargs="+", metavar="N,K", help="layers of your own")
    add("--m", nargs="+", metavar="M", help="rows of x; 1 to 4096 unless given")
    add("--threads", type=int, help="CPU threads (torch's own choice unless given)")
    add("--dtype", choices=tuple(DTYPE_NAMES), default="bf16", help="of x and y")
    add("--subjects", nargs="+", metavar="PATTERN", help="only these, next to the dense rows")
    add("--quick", action="store_true", help="one layer, three M; under a minute on a CPU")
    add("--cell-seconds", type=float, help="time for one subject on one layer at one M")
    add("--rotate-mb", type=int, help="memory that the copies of a weight cover")
    add("--time-limit", type=float, metavar="S", help="for the whole run; budgets shrink to it")
    add("--seed", type=int, default=0)
    add("--output", default="build/bench", metavar="DIR", help="where JSON and PNG go")
    add("--plot-layers", nargs="+", metavar="NxK", help="columns of the picture")
    add("--commit", help="to record, where the files are not in a git repository")
    add("--list", action="store_true", help="list the subjects, with the reason of each absent one")
    add("--schedule", action="store_true", help="how GPUs would share out work; needs none of them")
    add("--from", dest="source", metavar="JSON", help="show an earlier run; draw its picture")
    add(children.OPTION, dest="ceilings", help=argparse.SUPPRESS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark with these arguments; returns the exit code.

    0 done (also where a time limit ended it), 2 a bad option, 130 interrupted.
    """
    try:
        options = _parser().parse_args(argv)
        if options.source is not None:
            return _show(options)
        if options.schedule:
            return _show_schedules(options)
        plan = make_plan(options)
        if options.list:
            return _list(plan)
        return _measure(options, plan, argv)
    except (UsageError, ResultsError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED_STATUS
    except SystemExit as done:  # argparse after --help
        return int(done.code or 0)


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for.

    Raises:
        UsageError: naming the option, its value and what is accepted.
    """
    device = _device(options.device)
    on_cpu = device == "cpu"
    if options.threads is not None:
        _at_least("--threads", options.threads, 1)
        torch.set_num_threads(options.threads)
    if options.quick:
        layers = [Layer("quick", "linear", 2048, 2048)] if on_cpu else [parse_shape("4096,4096")]
        m_values: tuple[int, ...] = (1, 16, 128) if on_cpu else (1, 16, 256)
        cell_seconds, rotate_mb, time_limit = 0.1, 128, 55.0
    else:
        layers = list(model_layers("targets-cpu" if on_cpu else "targets"))
        m_values = (1, 4, 16, 64, 128, 512) if on_cpu else M_VALUES
        cell_seconds, rotate_mb, time_limit = (0.5 if on_cpu else 0.1), 600, math.inf
    if not on_cpu:
        rotate_mb = 4 * machine.cuda_cache_bytes() >> 20
    layers = _layers(options) or layers
    if options.m is not None:
        m_values = tuple(sorted({_integer("--m", word) for word in _words(options.m)}))
    for name, value in (
        ("--cell-seconds", options.cell_seconds),
        ("--time-limit", options.time_limit),
    ):
        if value is not None and not value > 0:
            raise UsageError(f"{name} {value:g} must be more than 0")
    if options.rotate_mb is not None:
        _at_least("--rotate-mb", options.rotate_mb, 0)
        rotate_mb = options.rotate_mb
    return Plan(
        device=device,
        dtype=DTYPE_NAMES[options.dtype],
        layers=without_repeats(layers),
        m_values=m_values,
        schemes=_schemes(options.schemes or [DEFAULT_SCHEMES[device]]),
        subjects=_subjects(options.subjects),
        cell_seconds=options.cell_seconds or cell_seconds,
        rotate_bytes=rotate_mb << 20,
        time_limit=options.time_limit or time_limit,
        seed=options.seed,
    )


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{option} {value} must be {least} or more")


def _integer(option: str, word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        raise UsageError(f"{option} {word!r} is not a whole number") from None
    _at_least(option, value, 1)
    return value


def _layers(options: argparse.Namespace) -> list[Layer]:
    try:
        layers = [layer for name in _words(options.models) for layer in model_layers(name)]
        return layers + [parse_shape(text) for text in options.shapes or ()]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _schemes(values: Sequence[str]) -> list[QuantScheme]:
    try:
        # A table scheme holds commas, so that a value with brackets is one scheme.
        words = [w for value in values for w in ([value] if "(" in value else _words([value]))]
        return list(dict.fromkeys(QuantScheme.parse(word) for word in words))
    except SchemeError as error:
        raise UsageError(f"--schemes: {error}") from None


def _subjects(patterns: Sequence[str] | None) -> tuple[Subject, ...]:
    if patterns is None:
        return SUBJECTS
    for pattern in patterns:
        if not any(fnmatch.fnmatch(subject.name, pattern) for subject in SUBJECTS):
            raise UsageError(f"--subjects {pattern!r} matches none; see --list")
    return tuple(
        subject
        for subject in SUBJECTS
        if subject.dense or any(fnmatch.fnmatch(subject.name, p) for p in patterns)
    )


def _list(plan: Plan) -> int:
    """Each subject with the schemes it runs on the first layer, or why it runs none."""
    layer, m = plan.layers[0], plan.m_values[-1]
    print(f"on {plan.device}, N = {layer.n}, K = {layer.k}, M = {m}:")
    for subject in plan.subjects:
        able, reasons = [], []
        for scheme in plan.schemes:
            problem = Problem(m, layer.n, layer.k, plan.dtype, plan.device, scheme)
            reason = subject.why_not(problem)
            if reason is None:
                able.append(str(scheme))
            else:
                reasons.append(reason)
        if able:
            print(f"  {subject.name}: {'runs' if subject.dense else ', '.join(able)}")
        else:
            print(f"  {subject.name}: absent: {'; '.join(dict.fromkeys(reasons))}")
    return 0


def _show_schedules(options: argparse.Namespace) -> int:
    problem = compiled.problem()
    if problem is not None:
        raise UsageError(f"--schedule needs qkernels._C: {problem}")
    layers = without_repeats(_layers(options) or list(model_layers("targets")))
    m_values = sorted({_integer("--m", word) for word in _words(options.m)})
    schedule.print_schedules(layers, m_values or schedule.M_VALUES)
    return 0


def _show(options: argparse.Namespace) -> int:
    source = Path(options.source)
    found = results.read(source)
    picture = _draw(found, source.with_suffix(".png"), _words(options.plot_layers))
    report.print_results(found)
    print(*picture, sep="\n")
    return 0


def _measure(options: argparse.Namespace, plan: Plan, argv: Sequence[str]) -> int:
    started = time.perf_counter()
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {options.output}: {error.strerror}") from None
    found = _new_results(options, plan, argv)
    if options.ceilings is None:
        found.stopped = _run(found, plan, argv, started)
    else:
        found.stopped = _run_as_child(found, plan, options.ceilings, started)
    found.settings["seconds"] = round(time.perf_counter() - started, 1)
    path = results.new_path(folder, f"{machine.card_name(plan.device)}-{found.date[:10]}")
    path.write_text(found.to_json())
    if options.ceilings is None:
        # Files first: a reader of standard output may close it early, as `head` does.
        picture = _draw(found, path.with_suffix(".png"), _words(options.plot_layers))
        report.print_results(found)
        print(f"written: {path}", *picture, sep="\n")
    if found.stopped == INTERRUPTED:
        print("bench: interrupted; what was measured until then is written", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0


def _run(found: Results, plan: Plan, argv: Sequence[str], started: float) -> str | None:
    """Measures the ceilings and the whole plan into `found`; returns why that is incomplete."""
    small = all(layer.n * layer.k <= 1 << 16 for layer in plan.layers)
    apart = children.apart(plan)
    with_int8 = any(scheme.integer_activation for scheme in plan.schemes) or any(
        subject.quantizes_x for subject in apart
    )
    total = plan.problems + len(apart)
    together = replace(
        plan,
        subjects=[subject for subject in plan.subjects if subject not in apart],
        time_limit=plan.time_limit * children.parents_share(plan, apart),
    )
    with Progress() as progress:
        progress.update(0, total, "measuring bandwidth and peaks")
        before = load.snapshot()
        ceilings = roofline.measure(plan.device, plan.dtype, with_int8=with_int8, small=small)
        found.roofline = {
            "bandwidth_gb_s": ceilings.bandwidth / 1e9,
            "bandwidth_kind": "read" if plan.device == "cpu" else "copy, read plus written",
            "others_percent": load.others_percent(before, load.snapshot()),
            "peaks_tflop_s": {name: peak / 1e12 for name, peak in ceilings.peaks.items()},
        }
        driver = Driver(
            together,
            ceilings,
            started=started,
            progress=lambda done, _, text: progress.update(done, total, text),
        )
        driver.run()
        found.cells = driver.cells
        if driver.stopped == INTERRUPTED:
            return driver.stopped
        others = Children(
            plan,
            apart,
            ceilings,
            argv,
            started=started,
            progress=lambda done, text: progress.update(plan.problems + done, total, text),
        )
        others.run()
    found.cells += others.cells
    # The driver's limit was a part of what the user set.
    return others.stopped or (time_is_up(plan.time_limit) if driver.stopped else None)


def _run_as_child(found: Results, plan: Plan, ceilings: str, started: float) -> str | None:
    """What `bench.children` starts: the plan in this process, beside the dense baseline alone."""
    try:
        known = children.ceilings_from(ceilings)
    except ValueError as error:
        raise UsageError(f"{children.OPTION}: {error}") from None
    children.end_with_parent()
    baseline = baseline_name(plan.dtype)
    subjects = [s for s in plan.subjects if not s.dense or s.name == baseline]
    driver = Driver(replace(plan, subjects=subjects), known, started=started)
    driver.run()
    found.cells = driver.cells
    return driver.stopped


def _new_results(options: argparse.Namespace, plan: Plan, argv: Sequence[str]) -> Results:
    settings = {
        "device": plan.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "schemes": [str(scheme) for scheme in plan.schemes],
        "layers": [str(layer) for layer in plan.layers],
        "m": list(plan.m_values),
        "cell_seconds": plan.cell_seconds,
        "rotate_mb": plan.rotate_bytes >> 20,
        "time_limit": None if plan.time_limit == math.inf else plan.time_limit,
        "seed": plan.seed,
    }
    found = Results(**results.beginning("bench", argv, plan.device, settings))
    found.commit = found.commit or options.commit
    return found


def _draw(found: Results, path: Path, layers: Sequence[str]) -> list[str]:
    """Draws the picture; returns the lines to tell the user."""
    try:
        left_out = plot.draw(found, path, layers)
    except plot.PlotError as error:
        return [f"no picture: {error}"]
    lines = [f"written: {path}"]
    if left_out:
        shown = " ".join(left_out)
        lines.append(
            f"not in the picture: {shown}; choose with --plot-layers and --from {path.stem}.json"
        )
    return lines
