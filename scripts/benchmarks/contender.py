"""Contenders, each in a process of its own, asked in turn: a machine that drifts slows all of them."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


class Contender:
    """A worker process.

    Attributes:
        name: what it runs, see :mod:`worker`.
        runs: what it measured.
    """

    def __init__(self, python: str, name: str, case: dict):
        self.name, self.runs = name, []
        environment = {**os.environ, "LMU_HF_NATIVE": "0"} if name.endswith("in Python") else None
        sizes = {key: value for key, value in case.items() if key not in ("title", "peers")}
        command = [python, str(WORKER), name, json.dumps(sizes)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, command: str):
        """The answer to a command.

        Raises:
            RuntimeError: the process ended instead.
        """
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        answer = self.process.stdout.readline()
        if not answer:
            said = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}: {said[-1] if said else 'no message'}")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def in_turn(contenders: list[tuple[str, str, dict]], command: str, runs: int, *, check: bool = True) -> dict:
    """Asks each of (python, name, case) ``runs`` times, in turn; first, "ours" whether it is right.

    Raises:
        RuntimeError: ours is not equal to the naive loop.
    """
    result: dict = {}
    with ExitStack() as stack:
        asked = []
        for python, name, case in contenders:
            contender = stack.enter_context(Contender(python, name, case))
            try:
                contender.version = contender.ask("version")
            except RuntimeError as error:
                if not name.startswith("keras"):
                    raise
                print(f"  left out: {error}", file=sys.stderr, flush=True)
                continue
            asked.append(contender)
        if check:
            result["error"] = next(one for one in asked if one.name == "ours").ask("check")
            if not result["error"] < 1e-3:
                raise RuntimeError(f"not equal to the naive loop: relative error {result['error']:.1e}")
        for _ in range(runs):
            for contender in asked:
                contender.runs.append(round(contender.ask(command), 3))
        if command == "stream":
            for contender in asked:
                contender.version = contender.ask("version")
        result["runs"] = {contender.name: contender.runs for contender in asked}
        result["versions"] = {contender.name: contender.version for contender in asked}
    return result
