"""Who takes part, each in a process of its own that holds the model and answers requests."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.children import how_it_ended
from bench.generate.ours import DENSE, FILE
from bench.generate.reply import NotHere
from qkernels.machine import REPOSITORY
from qkernels.scheme import QuantScheme

LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO GenAI"
_LLAMA_SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
_LLAMA_BINARIES = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}
"""Of the package that node-llama-cpp takes llama.cpp from, by the machine."""


@dataclass(frozen=True)
class Contestant:
    """Attributes:
    name: as the table has it.
    command: of its process.
    """

    name: str
    command: tuple[str, ...]


class Times(NamedTuple):
    """Seconds from a prompt to the first token, and from that to the last."""

    first: float
    rest: float


def contestants(
    file: Path,
    schemes: Sequence[str],
    *,
    threads: int,
    context: int,
    node: Path,
    compile: bool,
) -> tuple[list[Contestant], dict[str, str]]:
    """Everybody for a model's file, and why others are absent.

    Args:
        schemes: ours, of all layers but the head; "dense" and "file" as in `ours`.
        context: the most tokens that a sequence has.
        node: the folder with node_modules.
    """
    file = file.absolute()
    found = []
    for scheme in schemes:
        about = {"file": str(file), "scheme": scheme, "head": head_of(scheme)}
        request = json.dumps(about | {"compile": compile, "threads": threads})
        name = {DENSE: "dense bf16", FILE: "qkernels, the file's blocks"}
        found.append(
            Contestant(
                name.get(scheme, f"qkernels {scheme}"),
                (sys.executable, "-m", "bench.generate.ours", request),
            )
        )
    peer = json.dumps({"file": str(file), "threads": threads})
    found.append(Contestant(OPENVINO, (sys.executable, "-m", "bench.generate.openvino", peer)))
    absent = {}
    try:
        program = _node(node)
    except NotHere as error:
        absent[LLAMA_CPP] = str(error)
    else:
        options = (str(node.absolute()), str(file), str(threads), str(context))
        found.append(Contestant(LLAMA_CPP, (program, str(_LLAMA_SCRIPT), *options)))
    return found, absent


def head_of(scheme: str) -> str:
    """The scheme of the output head beside a scheme of the other layers: 8 bits, x alike."""
    if scheme in (DENSE, FILE):
        return "none"
    return "w8a8" if QuantScheme.parse(scheme).integer_activation else "w8a16-sym"


def _node(folder: Path) -> str:
    """The program node, where llama.cpp is under `folder`.

    Raises:
        NotHere: where one of them is missing.
    """
    program = shutil.which("node")
    if program is None:
        raise NotHere("node is not installed, which the npm package node-llama-cpp runs on")
    binary = _LLAMA_BINARIES.get(platform.machine())
    if sys.platform != "linux" or binary is None:
        raise NotHere(f"nothing is known of it for {sys.platform} on {platform.machine()}")
    for package in ("node-llama-cpp", f"@node-llama-cpp/{binary}"):
        if not (folder / "node_modules" / package).exists():
            raise NotHere(f"the npm package {package} is not in {folder}: npm install {package}")
    return program


class Process:
    """A contestant's process. It is stopped (SIGSTOP) but for its turns, so that nothing runs
    beside another's.

    Raises:
        NotHere: where it cannot take part, or ends.
    """

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `end`
        # A session of its own: Ctrl-C at a terminal reaches this process alone.
        self._child = subprocess.Popen(
            contestant.command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        try:
            said = self._reply()
            if "why_not" in said:
                raise NotHere(said["why_not"])
            self.about: dict[str, Any] = said["ready"]
            self._child.send_signal(signal.SIGSTOP)
        except BaseException:
            self.end()
            raise

    def generate(self, prompt: Sequence[int], new: int) -> Times:
        """Writes `new` tokens after a prompt."""
        assert self._child.stdin is not None
        self._child.send_signal(signal.SIGCONT)
        try:
            print(json.dumps({"prompt": prompt, "new": new}), file=self._child.stdin, flush=True)
            said = self._reply()
        except BrokenPipeError:
            raise NotHere(self._last_words()) from None
        self._child.send_signal(signal.SIGSTOP)
        return Times(said["first"], said["rest"])

    def end(self) -> None:
        """Ends the process and all that it started."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                # What was left to be written to it.
                continue

    def _reply(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise NotHere(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        status = self._child.wait()
        self._errors.seek(0)
        return how_it_ended(status, self._errors.read())
