"""The keys of a job spec: one dataclass for each mapping of the YAML file, checked before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Unknown keys are errors; the strings under the fields are the schema's descriptions."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$")]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
ResourceAmount = Annotated[float, Field(ge=0.0001, allow_inf_nan=False)]
LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([A-Za-z0-9.-]+/)?{LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^{LABEL}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BackboneSpec:
    name: str
    """A key of patches.backbones()."""
    weights: str | None = None
    """A torchvision weight name, a .safetensors or .pth file, or nothing for random weights."""
    num_classes: Count = 1000
    """Size of the backbone's own head, which tasks without num_classes share."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What this backbone's constructor takes, for example width_mult."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskSpec:
    name: TaskName
    """Names the task in metrics and in its bundle; unique in a job."""
    data: str
    """Folder (path or pyarrow filesystem URI) of the tables train, validation and test."""
    method: str
    """Patch method, or several joined by '+'."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the patch method."""
    num_classes: Count | None = None
    """Size of the task's own head; without it the task uses the backbone's."""
    resolution: Annotated[int, Field(ge=8)]
    """Side of the square images, in pixels; in a file, a list makes one task of each: NAME@96, NAME@128, ..."""
    batch_size: Count = 64
    """Images of one forward pass."""
    accumulate: Count = 1
    """Forward passes for each worker and step: a push carries the mean of their gradients."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward pass and loss in training; weights, gradients and evaluations are float32 with both."""
    workers: Count = 1
    """Workers of this task; several share its patch through the server."""
    min_workers: Count | None = None
    """Workers that need a place before training starts, by default all; the others make their steps in the processes of
    these until there is a place for them. Engine `allreduce` takes all at once."""
    resources: dict[str, ResourceAmount] = Field(default_factory=dict)
    """Custom resources of the cluster that each of its workers takes: {data_pets: 1}. Engine `local` takes none."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """What the nodes of its workers have to be labelled with: {zone: west}. Engine `local` does not look."""
    augment: Literal["none", "crop_flip"] = "none"
    """Training images: only resized, or random resized crops and horizontal flips."""
    cache_features: str | None = None
    """Folder on a local disk that keeps what the frozen backbone gives for each training image, so that the first epoch
    alone computes it; tasks and later runs may share it."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Rate, Rate, Rate] = (0.229, 0.224, 0.225)
    label_smoothing: Share = 0.0
    weight: Rate = 1.0
    """Of this task's workers where gradients are averaged (`sync`, `allreduce`, `local` by rounds)."""
    auxiliary_weight: Amount = 0.4
    """Weight of the loss of an auxiliary classifier (InceptionV3)."""
    undecodable: Literal["fail", "skip"] = "fail"
    """What an image that cannot be decoded does: end the run, or be skipped and counted."""
    verify_data: bool = True
    """Read every shard once before training to compare its SHA-256 with the index."""
    damaged_shards: Literal["fail", "skip"] = "fail"
    """What a missing or differing shard does: end the job before it starts, or be left out with a warning."""
    shuffle_window: Count = 4096
    """Training rows that are shuffled together; a worker holds up to two windows of encoded images."""
    train_on: Literal["train", "train+validation"] = "train"
    """Tables that training reads. With both, validation measures images that were trained on, so that nothing can be
    chosen by it any more: for a setting that was chosen before."""
    validation_images: Count | None = None
    """How many validation images the evaluations during training read; all by default."""

    @property
    def needed_workers(self) -> int:
        """Workers that have a place from the start."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _the_minimum_is_a_part_of_its_workers(self) -> Self:
        if self.needed_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, but the task has workers: {self.workers}; set workers to the most "
                "that it may have, and min_workers to at most that"
            )
        return self

    @model_validator(mode="after")
    def _cpus_and_gpus_are_the_jobs(self) -> Self:
        not_custom = sorted(self.resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"})
        if not_custom:
            raise ValueError(
                f"resources has {not_custom}, but a task's are custom resources of the cluster; CPUs and GPUs of all "
                "workers are the job's resources.cpus_per_worker and resources.gpus_per_worker"
            )
        return self

    @model_validator(mode="after")
    def _stored_features_stay_the_same(self) -> Self:
        if self.cache_features is None:
            return self
        if "://" in self.cache_features:
            raise ValueError(f"cache_features is '{self.cache_features}', but it has to be a folder on a local disk")
        for key, allowed in (("augment", "none"), ("precision", "float32")):
            if getattr(self, key) != allowed:
                raise ValueError(
                    f"cache_features needs {key} '{allowed}', but {key} is '{getattr(self, key)}'; "
                    f"set {key}: {allowed}, or leave cache_features out"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RMSpropSpec:
    name: Literal["rmsprop"]
    rate: Rate
    decay: Share = 0.9
    momentum: Share = 0.9
    eps: Rate = 1.0
    """Inside the square root, as TensorFlow has it."""
    weight_decay: Amount = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SGDSpec:
    name: Literal["sgd"]
    rate: Rate
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: Amount = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamSpec:
    name: Literal["adam"]
    rate: Rate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: Amount = 0.0
    """Added to the gradient (L2); `adamw` shrinks the weights instead."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamWSpec:
    name: Literal["adamw"]
    rate: Rate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: Amount = 0.01


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConstantSpec:
    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExponentialSpec:
    name: Literal["exponential"]
    factor: Annotated[float, Field(gt=0, le=1)]
    every_rounds: Count
    """The rate is multiplied by `factor` after this many rounds, for all tasks alike."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CosineSpec:
    name: Literal["cosine"]
    """From the full rate to 0 over the job's steps."""
    warm_up_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds in which the rate first rises from 0 in a line; they are part of the job's steps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AsyncSpec:
    """Workers as Ray actors around a parameter server; nobody waits for another worker."""

    name: Literal["async"] = "async"
    in_flight: Annotated[int, Field(ge=0, le=1)] = 0
    """Pushes unanswered while the next gradient is computed: 1 hides the server's time behind one step of staleness."""
    shards: Count = 1
    """Actors over which the server's tensors are spread."""
    divide_rate_by_staleness: bool = False
    """A push of staleness s > 1 is applied at the rate divided by s."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BoundedSpec:
    """As `async`, but a worker whose step count is `staleness` ahead of the slowest worker's waits for it."""

    name: Literal["bounded"]
    staleness: Annotated[int, Field(ge=0)]
    """0 is engine `sync`."""
    in_flight: Annotated[int, Field(ge=0, le=1)] = 0
    shards: Count = 1
    divide_rate_by_staleness: bool = False

    @model_validator(mode="after")
    def _a_worker_may_always_make_its_next_step(self) -> Self:
        if self.in_flight and self.in_flight >= self.staleness:
            raise ValueError(f"in_flight is {self.in_flight}; it has to be below staleness ({self.staleness})")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SyncSpec:
    """All workers make a step on the same values; the server applies the weighted mean of their gradients."""

    name: Literal["sync"]
    shards: Count = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AllreduceSpec:
    """As `sync`, but the workers sum their gradients among themselves, in a worker group of Ray Train."""

    name: Literal["allreduce"]
    bucket_mb: Rate = 25.0
    """Gradients leave while the backward pass goes on, in pieces of this size."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalSpec:
    """All workers in this process: the numerical reference, and where breakpoints work."""

    name: Literal["local"]
    schedule: Literal["turns", "rounds"] = "turns"
    """One update for each worker in turn, as `async`, or one by the mean of all, as `sync`."""
    delay: Annotated[int, Field(ge=0)] = 0
    """By turns: updates of its own that a worker's values lag behind."""

    @model_validator(mode="after")
    def _rounds_know_no_delay(self) -> Self:
        if self.schedule == "rounds" and self.delay:
            raise ValueError(f"delay is {self.delay}, but schedule 'rounds' has none; use schedule 'turns'")
        return self


EngineSpec = Annotated[AsyncSpec | BoundedSpec | SyncSpec | AllreduceSpec | LocalSpec, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointsSpec:
    """When the run's state is saved, and where."""

    uri: str | None = None
    """Folder: a path or a pyarrow filesystem URI; checkpoints/ in the run directory by default."""
    every_minutes: Rate | None = 10.0
    every_rounds: Count | None = None
    keep: Count = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResourcesSpec:
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """By default an equal share of the cluster's CPUs, at most one, that each worker finds on some node."""
    gpus_per_worker: Amount = 0.0
    """Below 1, workers share a GPU."""
    placement: Literal["spread", "pack"] | None = None
    """Workers and server shards over as many nodes as there are, or on as few as hold them; by default Ray finds each
    worker a place by itself, and where tasks have resources or labels all are spread."""
    threads_per_worker: Count = 1
    decode_threads: Count = 1
    """Threads that decode images for a worker, or for all workers of a node that share one decode."""
    start_timeout_s: Rate = 300.0
    """How long workers may take to start before the job gives up and says who is missing."""
    step_timeout_s: Rate = 600.0
    """How long a worker may be silent, though it waits for nobody, before it is taken for lost; while workers share a
    process, as many times as long as there are in the fullest."""

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; Ray gives shares of one GPU, or whole ones: set at "
                "most 1, or a whole number"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingSpec:
    uri: str | None = None
    """MLflow tracking URI; by default an SQLite file beside the run directories."""
    experiment: str = "multitask"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JobSpec:
    name: Name
    """Names the run and its directory."""
    backbone: BackboneSpec
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1)]
    workers: Count | None = None
    """Workers of all tasks together: when the job starts each task gets its part of them, in proportion to its training
    images and at least one, written into the run's spec. Without it each task has its own `workers`."""
    train_shared: bool
    """Train the shared tensors too (one backbone learned by all tasks), or keep the backbone frozen."""
    steps: Count
    """Steps of each worker."""
    evaluate_every: Count
    """Rounds between evaluations on the validation tables; the end is always evaluated."""
    optimizer: Annotated[RMSpropSpec | SGDSpec | AdamSpec | AdamWSpec, Field(discriminator="name")]
    """In a file: without it, or without its name or rate, what is missing comes from the recipe of the tasks' method
    (multitask/spec/recipes.py), and so does a missing schedule."""
    rate_rule: Literal["fixed", "per_256_images"] = "fixed"
    """The rate as it stands, or times images of an update / 256; images are counted after `accumulate`, and over the
    workers where an update is the mean of their pushes."""
    clip_norm: Rate | None = None
    """Longest gradient (L2 norm over all tensors of one push, shared and private) that leaves a worker."""
    private_rate_factor: Rate = 1.0
    """Private tensors learn at this multiple of the rate: small patches want larger rates than whole networks."""
    schedule: Annotated[ConstantSpec | ExponentialSpec | CosineSpec, Field(discriminator="name")] = ConstantSpec()
    engine: EngineSpec = AsyncSpec()
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    seed: Annotated[int, Field(ge=0)] = 0
    directory: str | None = None
    """Where everything that the run makes goes; runs/NAME by default."""

    @model_validator(mode="after")
    def _task_names_are_unique(self) -> Self:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"task names {repeated} appear more than once; give every task its own name")
        return self

    @model_validator(mode="after")
    def _workers_are_the_jobs_or_the_tasks(self) -> Self:
        own = [task.name for task in self.tasks if task.workers > 1]
        if self.workers is not None and own:
            raise ValueError(
                f"workers is {self.workers} for all tasks together, but tasks {own} have workers of their own; leave "
                "one of them out"
            )
        if self.workers is not None and self.workers < len(self.tasks):
            raise ValueError(
                f"workers is {self.workers}, but each of the {len(self.tasks)} tasks needs one; set at least "
                f"{len(self.tasks)}"
            )
        return self

    @model_validator(mode="after")
    def _features_are_stored_of_a_frozen_backbone(self) -> Self:
        cached = [task.name for task in self.tasks if task.cache_features is not None]
        if cached and self.train_shared:
            raise ValueError(
                f"tasks {cached} have cache_features, but train_shared is true: what the backbone gives changes with "
                "every step; set train_shared: false, or leave cache_features out"
            )
        return self

    @model_validator(mode="after")
    def _a_worker_group_has_places_of_one_kind(self) -> Self:
        kinds = [(task.resources, task.labels) for task in self.tasks]
        if isinstance(self.engine, AllreduceSpec) and any(kind != kinds[0] for kind in kinds):
            raise ValueError(
                "engine 'allreduce' has one kind of place for all workers (Ray Train's worker group), but the tasks' "
                "resources or labels differ; put the same in task_defaults, or use engine 'sync'"
            )
        return self

    @model_validator(mode="after")
    def _a_worker_group_starts_whole(self) -> Self:
        fewer = [task.name for task in self.tasks if task.needed_workers < task.workers]
        if isinstance(self.engine, AllreduceSpec) and fewer:
            raise ValueError(
                f"tasks {fewer} have fewer min_workers than workers, but engine 'allreduce' starts all workers at once "
                "(Ray Train's worker group); leave min_workers out, or use engine 'sync'"
            )
        return self

    @model_validator(mode="after")
    def _the_warm_up_ends_before_the_job(self) -> Self:
        if isinstance(self.schedule, CosineSpec) and self.schedule.warm_up_rounds >= self.steps:
            raise ValueError(
                f"schedule.warm_up_rounds is {self.schedule.warm_up_rounds}, but the job has {self.steps} steps; "
                "set fewer rounds, or more steps"
            )
        return self

    @model_validator(mode="after")
    def _the_rate_rule_finds_one_number_of_images(self) -> Self:
        images = {task.name: task.batch_size * task.accumulate for task in self.tasks}
        if self.rate_rule == "per_256_images" and len(set(images.values())) > 1:
            raise ValueError(
                f"rate_rule 'per_256_images' needs one number of images for all tasks, but batch_size * accumulate is "
                f"{', '.join(f'{count} for {name}' for name, count in images.items())}; make them equal, or set "
                "rate_rule: fixed"
            )
        return self

    @property
    def run_directory(self) -> Path:
        return Path(self.directory or f"runs/{self.name}")

    @property
    def checkpoint_folder(self) -> str:
        return self.checkpoints.uri or str(self.run_directory.resolve() / "checkpoints")
