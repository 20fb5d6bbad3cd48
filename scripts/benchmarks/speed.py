"""Measures LMUs beside their peers: forward and backward, float32, interleaved runs of one process per contender.

    python scripts/benchmarks/speed.py [CASE ...] [--keras PYTHON] [--runs 9] [--output FILE.json]

Before anything is timed, outputs and all gradients are compared with the naive loop in float64. `--keras` names the Python of an
environment with keras-lmu==0.9.0 and tensorflow-cpu. Prints medians with their spread and writes all runs as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from cases import CASES

from lmu_hf.record import hardware

HERE = Path(__file__).parent


class Contender:
    """A worker process."""

    def __init__(self, python: str, name: str, case: dict):
        self.name, self.runs = name, []
        environment = None
        command = [python, str(HERE / "worker.py"), name, json.dumps(case)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def ask(self, command: str):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(case: dict, runs: int, keras: str | None) -> dict:
    """Times all contenders of a case in turn."""
    plain = {key: value for key, value in case.items() if key not in ("title", "peers")}
    names = [(sys.executable, name) for name in ("ours", "naive", *case["peers"])]
    if keras:
        names += [(keras, "keras-lmu")] + ([] if "hidden" in case and case["steps"] > 28 else [(keras, "keras-lmu XLA")])
    contenders = []
    result = {"title": case["title"], "sizes": plain, "ms": {}}
    try:
        for python, name in names:
            contender = Contender(python, name, plain)
            try:
                contender.version = contender.ask("version")
            except RuntimeError as error:
                print(f"  left out: {error}", flush=True)
                continue
            contenders.append(contender)
        ours = next(contender for contender in contenders if contender.name == "ours")
        result["error"] = ours.ask("check")
        if not result["error"] < 1e-3:
            raise RuntimeError(f"not equal to the naive loop: relative error {result['error']:.1e}")
        for _ in range(runs):
            for contender in contenders:
                contender.runs.append(round(contender.ask("run"), 3))
    finally:
        for contender in contenders:
            contender.close()
    result["ms"] = {contender.name: contender.runs for contender in contenders}
    result["versions"] = sorted({contender.version for contender in contenders})
    return result


def describe(result: dict) -> str:
    lines = [f"{result['title']}   (error against float64 {result['error']:.0e})"]
    ours = statistics.median(result["ms"]["ours"])
    for name, runs in result["ms"].items():
        median = statistics.median(runs)
        spread = f"{min(runs):.1f} to {max(runs):.1f}"
        lines.append(f"  {name:14s} {median:9.2f} ms   {spread:20s} {median / ours:7.2f}x ours")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--keras", help="Python of an environment with keras-lmu")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    machine = hardware()
    report = {"machine": f"{machine['cpu']}, {machine['cores']} cores", "results": {}}
    for name in arguments.cases or CASES:
        result = report["results"][name] = measure(CASES[name], arguments.runs, arguments.keras)
        print(describe(result), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
