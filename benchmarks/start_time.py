"""How long does a process of a run take to start, with torch.compile put off and without?

New processes import what a worker needs and make one step of an optimiser: some as a run starts them, others with
`torch._dynamo` imported first, as torchvision and torch's optimisers import it. The lower limit is a process that
imports torch alone. The processes take turns. The CPU time of a process counts, because other programs on the machine
disturb it least.
"""

import os
import subprocess
import sys
import time
from statistics import median

from benchmarks._common import at_most, environment, finish, make_parser
from multitask.startup import RUN_PROCESS

WORKER = """
import multitask.engines.workers
import torch
from multitask.server.optimizers import make_optimizer

values = [torch.zeros(2), torch.zeros(2)]
optimizer = make_optimizer("adamw", *values, weight_decay=0.1)
for buffer in values:
    buffer.grad = torch.ones(2)
optimizer.step()
"""
ROWS = {
    "torch alone": "import torch",
    "a worker": WORKER,
    "a worker, torch.compile imported": f"import torch._dynamo\n{WORKER}",
}
GOAL = 0.75


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=9, help="processes of each kind")
    arguments = parser.parse_args()
    around = environment()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for turn in range(arguments.turns + 1):
        for name in reversed(ROWS) if turn % 2 else ROWS:
            times = start(ROWS[name])
            if turn:  # the first one reads files from the disk
                found[name].append(times)
    cpu = {name: [times[0] for times in found[name]] for name in ROWS}
    *_, put_off, imported = cpu.values()
    ratios = [after / before for after, before in zip(put_off, imported, strict=True)]
    rows = [
        {
            "process": name,
            "CPU s": median(cpu[name]),
            "wall s": median(times[1] for times in found[name]),
            "of torch alone": median(cpu[name]) / median(cpu["torch alone"]),
        }
        for name in ROWS
    ]
    finish(
        arguments.out,
        tables={"The start of a process": rows},
        environment=around,
        goals=[at_most("CPU time of a worker's start with torch.compile put off / imported", median(ratios), GOAL)],
        settings={"turns": arguments.turns, "ratios": sorted(ratios)},
    )


def start(code: str) -> tuple[float, float]:
    """Return CPU and wall seconds of a new process that runs this code."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {RUN_PROCESS: "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, code)
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begin


if __name__ == "__main__":
    main()
