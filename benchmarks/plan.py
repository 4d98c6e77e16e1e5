"""Does `multitask plan` predict the speed of two workers? Its images/s against those of the engines themselves.

Two workers with one thread each on this machine train MobileNetV2 at 96 px, ResNet-50 and ResNet-18 at 64 px, batch 32,
with all tensors shared, as in `benchmarks.engines`. The plan times its steps and its copy here, as the command does. It
takes the server's costs from `benchmarks.server_throughput`, which measured pushes of MobileNetV2's and ResNet-50's
bytes by 1 and by 16 workers that train nothing. The plan contains no measurement of two workers, of training with a
server or of ResNet-18. The plan and the engines take turns, because the speed of such a machine changes within ten
seconds.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._common import Goal, at_most, environment, finish, make_parser
from benchmarks._turns import WARM_UP, started, take_turn
from benchmarks.engines import ALLREDUCE, BATCH, OVERLAPPED, RESOLUTIONS, SYNC, Setting, make_rows, write_tables
from multitask.capacity.estimate import estimate
from multitask.capacity.timing import cores_here, time_deployment
from multitask.cluster.session import ray_session

ENGINES: dict[str, dict[str, Any]] = {
    OVERLAPPED: {"name": "async", "in_flight": 1},
    SYNC: {"name": "sync"},
    ALLREDUCE: {"name": "allreduce"},
}
WITHIN = 0.25
NETWORK_GBIT = 10.0
"""Has no effect on one machine."""
Round = dict[str, float]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument(
        "--rounds", type=int, default=2, help="plans of every model, each beside a turn of every engine"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each worker in each turn")
    arguments = parser.parse_args()
    around = environment()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, the plan's workers at 0
    rounds: dict[tuple[str, str], list[Round]] = {}
    with tempfile.TemporaryDirectory() as name, ray_session():
        write_tables(Path(name))
        for model in arguments.models:
            setting = Setting(model, gpus_per_worker=0.0, folder=Path(name))
            for engine, found in compare(setting, arguments.rounds, arguments.steps).items():
                rounds[model, engine] = found
    finish(
        arguments.out,
        tables={"Two workers, planned and measured: medians over rounds": [row(*key, rounds[key]) for key in rounds]},
        environment=around,
        goals=[goal(*key, found) for key, found in rounds.items()],
        settings={
            "resolutions": {model: RESOLUTIONS[model] for model in arguments.models},
            "batch": BATCH,
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "found": [
                {"model": model, "engine": engine, **one} for (model, engine), found in rounds.items() for one in found
            ],
        },
    )


def compare(setting: Setting, rounds: int, steps: int) -> dict[str, list[Round]]:
    """Return engine -> planned and measured images/s of each round."""
    specs = {name: setting.spec(shared=True, engine=engine) for name, engine in ENGINES.items()}
    found: dict[str, list[Round]] = {name: [] for name in specs}
    with ExitStack() as alive:
        engines, rows = {}, make_rows(setting)
        for name in specs:
            engines[name] = alive.enter_context(started(rows[name]))
            engines[name].turn(WARM_UP)
        for number in range(rounds):
            layout = time_deployment(specs[OVERLAPPED], nodes=1, cores=cores_here(), network_gbit=NETWORK_GBIT)
            (kind,) = layout.kinds
            for name, engine in engines.items():
                planned = estimate(replace(layout, engine=specs[name].engine))
                turn = take_turn(engine, steps, BATCH)
                found[name].append(
                    {
                        "planned images/s": planned.images_per_s,
                        "images/s": turn["images/s"],
                        "planned step ms": 1000 * planned.steps_s[0],
                        "step ms": turn["step ms"],
                        "own step ms": 1000 * kind.step_s,
                        "spread ms": 1000 * kind.spread_s,
                        "others' cores": turn["others' cores"],
                    }
                )
                print(f"{setting.model}, round {number + 1}, {name}: {found[name][-1]}", flush=True)
    return found


def row(model: str, engine: str, found: Sequence[Round]) -> dict[str, Any]:
    columns = {key: median(one[key] for one in found) for key in found[0]}
    return {"model": model, "engine": engine, **columns, "error": error(found)}


def error(found: Sequence[Round]) -> float:
    """Return how much the plan is too high, as a share of the measured value."""
    planned, measured = (median(one[key] for one in found) for key in ("planned images/s", "images/s"))
    return planned / measured - 1


def goal(model: str, engine: str, found: Sequence[Round]) -> Goal:
    return at_most(f"{model}, {engine}, two workers: |planned images/s / measured - 1|", abs(error(found)), WITHIN)


if __name__ == "__main__":
    main()
