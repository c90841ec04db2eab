"""The command line: `python -m bench.generate`.

Contestants take turns, so that a machine that is busy or slow for a while is so for all of them;
ratios are of turns in the same round.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench import load
from bench.cli import INTERRUPTED_STATUS
from bench.generate import contestants as who
from bench.generate import record as results
from bench.generate.contestants import Contestant, Process
from bench.generate.models import MODELS, find_model
from bench.generate.ours import DENSE, FILE
from bench.generate.record import Record, Speed
from bench.generate.reply import NotHere
from bench.results import ResultsError, beginning, new_path
from qkernels import machine
from qkernels.errors import QuantizationError, SchemeError
from qkernels.scheme import QuantScheme

SCHEMES = ("w4a8-g64", "w4a16-g64", "w8a8", FILE, DENSE)

_HIGHEST_ID = 30_000
"""Prompts are of random tokens below, which all models have."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.generate",
        description="Tokens a second of whole models on a CPU, beside other engines. See "
        "docs/benchmarks.md.",
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    add(
        "--schemes",
        nargs="+",
        metavar="SCHEME",
        default=list(SCHEMES),
        help=f"of all layers but the head, which has 8 bits; {FILE} for the blocks of the file, "
        f"{DENSE} for bf16 (%(default)s)",
    )
    add("--contestants", nargs="+", metavar="NAME", help="only these")
    add("--prompt", type=int, default=512, help="tokens that are read (%(default)s)")
    add("--new", type=int, default=64, help="tokens that are written (%(default)s)")
    add("--context", type=int, default=8, help="tokens before those (%(default)s)")
    add("--rounds", type=int, default=7, help="%(default)s")
    add("--threads", type=int, help="CPU threads (torch's own choice unless given)")
    add("--no-compile", dest="compile", action="store_false", help="ours as they come")
    add("--node", type=Path, default=Path("build/node"), help="the folder with node_modules")
    add("--output", type=Path, default=Path("build/generate"), metavar="DIR")
    add("--from", dest="source", type=Path, metavar="JSON", help="show an earlier run")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; the exit code: 0, 1 where nobody was timed, 2 a bad option, 130
    interrupted.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.source is not None:
            _show(results.read(options.source))
            return 0
        _check(options, parser.error)
        options.output.mkdir(parents=True, exist_ok=True)
        files = {name: find_model(name, options.output, _said) for name in options.models}
    except (ResultsError, QuantizationError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED_STATUS
    found = _new_record(options, argv)
    status = 0
    before = load.snapshot()
    try:
        for model, file in files.items():
            _measure(found, model, file, options)
    except KeyboardInterrupt:
        print("interrupted; the rounds until then are written", file=sys.stderr)
        status = INTERRUPTED_STATUS
    found.others_percent = load.others_percent(before, load.snapshot())
    name = f"generate-{machine.card_name('cpu')}-{found.date[:10]}"
    path = new_path(options.output, name)
    path.write_text(found.to_json())
    _show(found)
    print(f"written: {path}")
    return status or int(not any(speed.write for speed in found.speeds))


def _show(found: Record) -> None:
    print(*results.table(found), sep="\n")
    warning = load.warning([found.others_percent])
    if warning is not None:
        print(warning)


def _check(options: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    for name, least in (("prompt", 1), ("new", 2), ("context", 1), ("rounds", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            refuse(f"--{name} {value} must be {least} or more")
    if options.threads is None:
        options.threads = torch.get_num_threads()
    try:
        for scheme in options.schemes:
            if scheme not in (DENSE, FILE):
                QuantScheme.parse(scheme)
    except SchemeError as error:
        refuse(f"--schemes: {error}")


def _measure(found: Record, model: str, file: Path, options: argparse.Namespace) -> None:
    """Times everybody on one model into `found`."""
    longest = max(options.prompt + 1, options.context + options.new)
    all_of_them, absent = who.contestants(
        file,
        options.schemes,
        threads=options.threads,
        context=longest,
        node=options.node,
        compile=options.compile,
    )
    chosen = [c for c in all_of_them if options.contestants is None or _asked(c, options)]
    found.speeds += [Speed(model, name, absent=reason) for name, reason in absent.items()]
    race: list[tuple[Speed, Process]] = []
    draw = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(3, _HIGHEST_ID) for _ in range(tokens)]

    try:
        for contestant in chosen:
            speed = Speed(model, contestant.name)
            found.speeds.append(speed)
            _said(len(race), len(chosen), f"{model}: starting {contestant.name}")
            try:
                process = Process(contestant)
                race.append((speed, process))
                speed.about = process.about
                # What is compiled at first use is, before anything is timed.
                process.generate(prompt(options.prompt), 1)
                process.generate(prompt(options.context), options.new)
            except NotHere as error:
                speed.absent = str(error)
        for number in range(options.rounds):
            long, short = prompt(options.prompt), prompt(options.context)
            for speed, process in race:
                if speed.absent is None:
                    _said(number, options.rounds, f"{model}: {speed.name}")
                    _turn(speed, process, long, short, options.new)
    finally:
        for _, process in race:
            process.end()


def _turn(
    speed: Speed, process: Process, long: Sequence[int], short: Sequence[int], new: int
) -> None:
    try:
        process.generate(short, 1)  # wakes it up
        read = process.generate(long, 1)
        written = process.generate(short, new)
    except NotHere as error:
        speed.absent = str(error)
        return
    speed.read.append(len(long) / read.first)
    speed.write.append((new - 1) / written.rest)


def _asked(contestant: Contestant, options: argparse.Namespace) -> bool:
    return any(name.lower() in contestant.name.lower() for name in options.contestants)


def _said(done: int, total: int, text: str) -> None:
    print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)


def _new_record(options: argparse.Namespace, argv: Sequence[str]) -> Record:
    names = ("prompt", "new", "context", "rounds", "threads", "compile", "schemes")
    settings = {name: getattr(options, name) for name in names}
    return Record(**beginning("bench.generate", argv, "cpu", settings))
