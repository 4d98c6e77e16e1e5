"""Groups of ranks as worker groups of Ray Train."""

import importlib
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.util
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_put,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

from multitask.cluster.collectives import WAIT
from multitask.cluster.interface import Actor, Cluster, GroupStartError, Ranks
from multitask.cluster.memory import FOR_ALL_THREADS
from multitask.startup import RUN_PROCESS

HEALTH_CHECK_S = 0.5
"""Seconds between two looks of Train at its workers, and so the time that a loss may go unnoticed."""

CONTROLLER_END_S = 5.0
"""Seconds within which Train's controller ends when the process that has started it was lost. A controller that loses
its places before it ends would start another group."""


class TrainRun:
    """A worker group of Ray Train at work."""

    def __init__(self, fit: Any, places_key: str) -> None:
        """Args:
        fit: reference to the result of `fit`, which Train's work ends with.
        places_key: key under which the cluster keeps the places of the group that has started last.
        """
        self._fit, self._places_key = fit, places_key

    def wait(self, timeout_s: float) -> bool:
        done, _ = ray.wait([self._fit], timeout=timeout_s)
        return bool(done)

    def result(self) -> None:
        ray.get(self._fit)

    def cancel(self) -> None:
        """See `GroupRun.cancel`.

        A cancel reaches Train as a Ctrl-C, and only then does Train give back its places on the cluster. The cancel is
        not recursive, because Train would take a cancel of its own calls for a lost rank.
        """
        ray.cancel(self._fit, recursive=False)

    def kill(self) -> None:
        ray.cancel(self._fit, force=True, recursive=False)

    def release(self) -> None:
        if not _internal_kv_exists(self._places_key):
            return
        time.sleep(CONTROLLER_END_S)
        places = _internal_kv_get(self._places_key)
        if places is None:  # `fit` has ended meanwhile: Train has given the places back itself
            return
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(places)))
        _internal_kv_del(self._places_key)


def start_ranks(cluster: Cluster, ranks: Ranks, work: Callable[..., None], leader: Actor) -> TrainRun:
    """Let Train start a group of ranks; see `Cluster.run_ranks`."""
    variables = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(ranks.start_timeout_s),
        # The spec may name data relative to the folder that the run was started in, so ranks stay there.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        RUN_PROCESS: "1",
        # Train runs each rank in a thread of its process, not in the main thread.
        **FOR_ALL_THREADS,
    }
    task = ray.remote(fit).options(num_cpus=0, max_retries=0, runtime_env={"env_vars": variables})
    places_key = f"multitask/places/{uuid.uuid4().hex}"
    return TrainRun(task.remote(cluster, ranks, work, leader, places_key), places_key)


def fit(cluster: Cluster, ranks: Ranks, work: Callable[..., None], leader: Actor, places_key: str) -> None:
    """Let Ray Train run a group of ranks, and another one whenever a rank is lost, until a group has ended its work.

    Args:
        places_key: key under which the ranks write down their places in the cluster. It is deleted when Train gives
            them back itself.
    Raises:
        GroupStartError: the ranks found no places in time, or were lost while they started.
        RayActorError: Train's controller was lost, and the places of its group are left.
    """
    # Train is imported here, because the import takes a second and no other engine needs it. It is typed as Any,
    # because Train's type annotations describe its version 1.
    train: Any = importlib.import_module("ray.train")
    train_torch: Any = importlib.import_module("ray.train.torch")

    class Losses(train.UserCallback):
        """Tells the leader when Train has noticed that a rank is lost."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            texts = [f"rank {rank}: {str(error).splitlines()[0]}" for rank, error in worker_exceptions.items()]
            leader.lose.remote("; ".join(texts))

    demand = ranks.demand
    # NCCL refuses two ranks on one device.
    shares_device = 0 < demand.resources.get("GPU", 0) < 1
    trainer = train_torch.TorchTrainer(
        run_rank,
        train_loop_config={"work": work, "cluster": cluster, "leader": leader, "places_key": places_key},
        torch_config=train_torch.TorchConfig(
            backend="gloo" if shares_device else None, timeout_s=int(WAIT.total_seconds())
        ),
        scaling_config=train.ScalingConfig(
            num_workers=ranks.number,
            use_gpu="GPU" in demand.resources,
            resources_per_worker=dict(demand.resources),
            label_selector=dict(demand.labels) or None,
            placement_strategy="SPREAD" if ranks.spread else "PACK",
        ),
        run_config=train.RunConfig(
            name=ranks.folder.name,
            storage_path=str(ranks.folder.parent),
            # Train restarts without a limit; the driver counts the losses without a step made in between.
            failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[Losses()],
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    lost = False
    try:
        trainer.fit()
    except train.ControllerError as error:
        raise GroupStartError(str(error)) from None
    except RayActorError:
        lost = True
        raise
    finally:
        if not lost:
            _internal_kv_del(places_key)


def run_rank(setting: dict[str, Any]) -> None:
    """Do the work of one rank; Ray Train calls this in every process of a worker group.

    Train lets a process of its own give the places back when its controller is lost, but this process needs Ray's
    dashboard, which a Ray of the run's own does not start. So the ranks write their places down, in the store of the
    cluster's head: it outlives every process of the run.
    """
    places = ray.util.get_current_placement_group()
    assert places is not None
    _internal_kv_put(setting["places_key"], places.id.binary(), overwrite=True)
    setting["work"](setting["cluster"], setting["leader"])
