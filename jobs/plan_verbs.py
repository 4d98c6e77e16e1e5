"""`multitask plan`: estimate the speed of a job on a cluster, before there is a cluster."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jobs.tables import show

if TYPE_CHECKING:
    from multitask.capacity.estimate import Deployment, Estimate

LARGE = 1000
"""The largest number of workers that the plan shows."""


def plan(
    spec: Annotated[Path, typer.Argument(help="A job spec (YAML); the plan is for its engine.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes of the cluster, which are all alike.")],
    cpus_per_node: Annotated[
        float | None,
        typer.Option(min=1, help="Cores of each node for workers; by default as many as this machine has."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of workers of each task, instead of the spec's.")
    ] = None,
    network_gbit: Annotated[
        float, typer.Option(min=0.001, help="Speed of a node's network link in Gbit/s, in each direction.")
    ] = 10.0,
    figures: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON that `python -m benchmarks.server_throughput --out FILE` wrote; it replaces the server's costs "
            "that come with the program.",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Time a few steps on this machine, and estimate how fast a cluster would be and what would limit it."""
    from multitask.capacity.costs import SERVER_COSTS, fit
    from multitask.capacity.estimate import doublings, estimate, saturation
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
    _print_limit(layout, factor)


def _show(layout: "Deployment", estimates: list["Estimate"]) -> None:
    steps = Table("tasks", "workers", "images", "step ms here", "spread", "step ms planned", "MB pushed")
    for kind, step_s in zip(layout.kinds, estimates[0].steps_s, strict=True):
        numbers = 1000 * kind.step_s, 1000 * kind.spread_s, 1000 * step_s, kind.pushed_bytes / 1e6
        steps.add_row(", ".join(kind.tasks), f"{kind.workers}", f"{kind.images}", *(f"{one:,.1f}" for one in numbers))
    growth = Table("workers", "nodes", "step ms", "images/s", "of free", "shard load", "its cores", "MB/s", "limit")
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
    show(steps, growth)
    print(
        "of free: images/s divided by those of workers that share nothing. shard load: share of the time that the "
        "thread of a shard is busy. its cores: cores that a node with shards needs for them in addition to its "
        "workers. MB/s: over the busiest node's link, in each direction."
    )


def _print_limit(layout: "Deployment", factor: int | None) -> None:
    """Print from how many workers on something limits the job, and whether more shards would help.

    Args:
        factor: growth of the layout at which a step becomes slower because of the limit; None if it never does.
    """
    from multitask.capacity.estimate import best_shards, estimate

    if factor is None:
        print("Neither the server nor the network limits this job, however many workers it has.")
        return
    full, twice = estimate(layout.times(factor)), layout.times(2 * factor)
    best = best_shards(twice)
    print(
        f"With {full.workers:,} workers on {full.nodes:,} nodes a step takes {full.slowdown:.1f} times as long because "
        f"of {full.limit}."
    )
    if best.shards > layout.shards:
        print(
            f"Twice as many workers process {estimate(best).images_per_s:,.0f} images/s with `engine.shards: "
            f"{best.shards}`, if each shard has cores of its own, and {estimate(twice).images_per_s:,.0f} with "
            f"{layout.shards}."
        )
    else:
        print(
            "More shards do not help. Push less often (tasks.accumulate, tasks.batch_size), train fewer tensors, or "
            "use faster links."
        )
