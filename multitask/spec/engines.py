"""The job spec's keys for the engines, and the facts about each engine that the rest of the code asks for.

Every engine spec has these attributes, as a key of the file, a class constant or a property. The constants and
properties are no keys: a file cannot set them, and they are not written back.

- `together`: all workers' pushes of a round make one update.
- `bound`: how many steps a worker may be ahead of the slowest worker; None means any number.
- `shards`: number of processes that hold the server's values.
- `in_flight`: pushes that may be unanswered while a worker computes its next gradient.
- `divide_rate_by_staleness`: a push is applied at a rate that is divided by its staleness.
- `uses_ray`: workers are processes that Ray starts.
- `worker_group`: the workers are one worker group of Ray Train, which starts whole and has no server with values.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from multitask.spec.fields import STRICT, Count, Rate, Whole


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AsyncSpec:
    """Workers are Ray actors around a parameter server. No worker waits for another worker."""

    together: ClassVar[bool] = False
    bound: ClassVar[None] = None
    uses_ray: ClassVar[bool] = True
    worker_group: ClassVar[bool] = False

    name: Literal["async"] = "async"
    in_flight: Annotated[Whole, Field(ge=0, le=1)] = 0
    """Number of pushes that may be unanswered while the worker computes its next gradient. With 1, computing hides the
    server's time, and every gradient is one step more stale."""
    shards: Count = 1
    """Number of processes over which the server's tensors are spread."""
    divide_rate_by_staleness: bool = False
    """Apply a push with a staleness s above 1 at the learning rate divided by s."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BoundedSpec:
    """Like `async`, but a worker waits while it is `staleness` steps ahead of the slowest worker."""

    uses_ray: ClassVar[bool] = True
    worker_group: ClassVar[bool] = False

    name: Literal["bounded"]
    staleness: Annotated[Whole, Field(ge=0)]
    """Number of steps that a worker may be ahead of the slowest worker. With 0 the engine works like `sync`."""
    in_flight: Annotated[Whole, Field(ge=0, le=1)] = 0
    """As for `async`. With 1, `staleness` has to be 2 or more."""
    shards: Count = 1
    """As for `async`."""
    divide_rate_by_staleness: bool = False
    """As for `async`."""

    @property
    def together(self) -> bool:
        return self.staleness == 0

    @property
    def bound(self) -> int | None:
        return self.staleness or None

    @model_validator(mode="after")
    def _a_worker_may_always_make_its_next_step(self) -> Self:
        if self.in_flight and self.in_flight >= self.staleness:
            raise ValueError(f"in_flight is {self.in_flight}; it has to be below staleness ({self.staleness})")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SyncSpec:
    """All workers make a step on the same values. The server then applies the weighted mean of their gradients."""

    together: ClassVar[bool] = True
    bound: ClassVar[None] = None
    in_flight: ClassVar[int] = 0
    divide_rate_by_staleness: ClassVar[bool] = False
    uses_ray: ClassVar[bool] = True
    worker_group: ClassVar[bool] = False

    name: Literal["sync"]
    shards: Count = 1
    """As for `async`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AllreduceSpec:
    """Like `sync`, but the workers sum their gradients among themselves, in a worker group of Ray Train."""

    together: ClassVar[bool] = True
    bound: ClassVar[None] = None
    shards: ClassVar[int] = 1
    in_flight: ClassVar[int] = 0
    divide_rate_by_staleness: ClassVar[bool] = False
    uses_ray: ClassVar[bool] = True
    worker_group: ClassVar[bool] = True

    name: Literal["allreduce"]
    bucket_mb: Rate = 25.0
    """Size in MB of the pieces in which gradients are sent while the backward pass still runs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalSpec:
    """All workers run in the job's own process: the numerical reference, in which breakpoints work."""

    bound: ClassVar[None] = None
    shards: ClassVar[int] = 1
    in_flight: ClassVar[int] = 0
    divide_rate_by_staleness: ClassVar[bool] = False
    uses_ray: ClassVar[bool] = False
    worker_group: ClassVar[bool] = False

    name: Literal["local"]
    schedule: Literal["turns", "rounds"] = "turns"
    """`turns` makes one update for each worker in turn, like `async`. `rounds` makes one update by the mean of all
    workers, like `sync`."""
    delay: Annotated[Whole, Field(ge=0)] = 0
    """With `turns`: a worker computes on values from before its last `delay` updates."""

    @property
    def together(self) -> bool:
        return self.schedule == "rounds"

    @model_validator(mode="after")
    def _rounds_know_no_delay(self) -> Self:
        if self.schedule == "rounds" and self.delay:
            raise ValueError(f"delay is {self.delay}, but schedule 'rounds' has none; use schedule 'turns'")
        return self


EngineSpec = Annotated[AsyncSpec | BoundedSpec | SyncSpec | AllreduceSpec | LocalSpec, Field(discriminator="name")]
