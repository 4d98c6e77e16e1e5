"""`multitask plan`: what a job would do on a cluster, before there is one."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from multitask.capacity.estimate import Deployment, Estimate

LARGE = 1000
"""Workers up to which the plan is drawn."""


def plan(
    spec: Annotated[Path, typer.Argument(help="A job spec (YAML); its engine is the one planned for.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster, all alike.")],
    cpus_per_node: Annotated[
        float | None, typer.Option(min=1, help="Cores of a node for workers; as many as here by default.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of each task, instead of the spec's.")] = None,
    network_gbit: Annotated[float, typer.Option(min=0.001, help="Gbit/s of a node's link, each way.")] = 10.0,
    figures: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Your own JSON of `python -m benchmarks.server_throughput --out FILE`."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Time a few steps here, and estimate a cluster: steps, images/s, load of server and network, and the limit."""
    from multitask.capacity.costs import SERVER_COSTS, fit
    from multitask.capacity.estimate import best_shards, doublings, estimate, saturation
    from multitask.capacity.timing import cores_here, time_deployment
    from multitask.spec.reading import load_spec

    job = load_spec(spec)
    if workers is not None:
        tasks = tuple(replace(task, workers=workers, min_workers=None) for task in job.tasks)
        job = replace(job, workers=None, tasks=tasks)
    costs = SERVER_COSTS if figures is None else fit(json.loads(figures.read_text(encoding="utf-8")))
    layout = time_deployment(
        job, nodes=nodes, cores=cpus_per_node or cores_here(), network_gbit=network_gbit, costs=costs
    )
    estimates = list(doublings(layout, LARGE))
    factor = saturation(layout)
    if json_output:
        found = {"saturation": None if factor is None else asdict(estimate(layout.times(factor)))}
        print(json.dumps(asdict(layout) | {"estimates": [asdict(one) for one in estimates]} | found))
        return
    _show(layout, estimates)
    if factor is None:
        print("Neither server nor network limits this job, however large it grows.")
        return
    full, twice = estimate(layout.times(factor)), layout.times(2 * factor)
    best = best_shards(twice)
    print(
        f"With {full.workers:,} workers on {full.nodes:,} nodes a step takes {full.slowdown:.1f} times as long because "
        f"of {full.limit}."
    )
    if best.shards > layout.shards:
        print(
            f"Twice as many make {estimate(best).images_per_s:,.0f} images/s with engine.shards: {best.shards}, each "
            f"on cores of its own, and {estimate(twice).images_per_s:,.0f} with {layout.shards}."
        )
    else:
        print(
            "More shards do not help. Push less often (tasks.accumulate, tasks.batch_size), train fewer tensors, or "
            "use faster links."
        )


def _show(layout: "Deployment", estimates: list["Estimate"]) -> None:
    steps = Table("tasks", "workers", "images", "step ms here", "spread", "step ms planned", "MB pushed")
    for kind, step_s in zip(layout.kinds, estimates[0].steps_s, strict=True):
        numbers = 1000 * kind.step_s, 1000 * kind.spread_s, 1000 * step_s, kind.pushed_bytes / 1e6
        steps.add_row(", ".join(kind.tasks), f"{kind.workers}", f"{kind.images}", *(f"{one:,.1f}" for one in numbers))
    growth = Table("workers", "nodes", "step ms", "images/s", "of free", "a shard", "its cores", "MB/s", "limit")
    for one in estimates:
        growth.add_row(
            f"{one.workers:,}",
            f"{one.nodes:,}",
            f"{1000 * max(one.steps_s):,.0f}",
            f"{one.images_per_s:,.0f}",
            f"{one.efficiency:.2f}",
            f"{one.server_load:.2f}",
            f"{one.server_cores:.1f}",
            f"{one.node_bytes_per_s / 1e6:,.0f}",
            one.limit,
        )
    console = Console(width=max(120, Console().width))
    console.print(steps)
    console.print(growth)
    print(
        "of free: images/s over those of workers that share nothing. a shard: how busy its thread is; its cores: what "
        "a node with shards needs for them beside its workers. MB/s: over the busiest node's link, each way."
    )
