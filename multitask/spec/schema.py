"""The keys of a job spec. Each mapping of the YAML file is one dataclass, which is checked before anything starts."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from multitask.spec.engines import AsyncSpec, EngineSpec
from multitask.spec.errors import quoted
from multitask.spec.fields import (
    STRICT,
    Amount,
    Augmentations,
    Classes,
    ClassWeights,
    Count,
    LabelKey,
    LabelValue,
    Name,
    PathText,
    Pixel,
    Pixels,
    Rate,
    ResourceAmount,
    Share,
    Spread,
    TaskName,
    Whole,
)
from multitask.spec.optimizers import (
    ConstantSpec,
    CosineSpec,
    OptimizerSpec,
    ScheduleSpec,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BackboneSpec:
    name: str
    """A key of patches.backbones()."""
    weights: PathText | None = None
    """A torchvision weight name, or a .safetensors or .pth file. Without it the weights are random."""
    num_classes: Classes = 1000
    """Number of outputs of the backbone's own head. Tasks whose method does not own the head share it, unless they have
    `num_classes`; it needs exactly as many outputs as these tasks have classes."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the backbone's constructor, for example `width_mult`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskSpec:
    name: TaskName
    """Name of the task in metrics and in its bundle. It is unique in a job."""
    data: PathText
    """Folder that holds the tables train, validation and test: a path or a pyarrow filesystem URI."""
    method: str
    """Name of the patch method, or several names joined by '+'."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the patch method."""
    num_classes: Classes | None = None
    """Number of outputs of the task's own head: the number of classes of its training table. It may be left out. Then a
    method that owns the head has as many outputs as the table has classes: a copy of the backbone's head if that has as
    many, and a new head otherwise. Any other method uses the backbone's head itself."""
    resolution: Pixels
    """Side of the square images, in pixels. A list in a file stands for one task per entry: NAME@96, NAME@128, ..."""
    batch_size: Count = 64
    """Number of images in one forward pass."""
    accumulate: Count = 1
    """Number of forward and backward passes in one step of a worker. The push carries the mean of their gradients."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the forward pass and the loss in training. Weights, gradients and evaluations are always
    float32."""
    workers: Count = 1
    """Number of workers that train this task. Several workers share the task's patch through the server."""
    min_workers: Count | None = None
    """Number of workers that need a place on the cluster before training starts; by default all of the task's workers.
    Each remaining worker makes its steps as a guest in the process of another worker of its task, until the cluster has
    a place for it. Engine `allreduce` always starts all workers at once and refuses a smaller number."""
    resources: dict[str, ResourceAmount] = Field(default_factory=dict)
    """Custom resources of the cluster that each worker of this task takes: {data_pets: 1}. Engine `local` ignores
    them."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that a node needs to hold a worker of this task: {zone: west}. Engine `local` ignores them."""
    augment: Augmentations = "none"
    """Random changes of the training images, a name or a list of names. `none` only resizes them; `resize_crop` takes
    random resized crops; `flip` mirrors half of them; `crop_flip` does both; `color_jitter` changes brightness,
    contrast and saturation; `rand_augment` is RandAugment with torchvision's defaults."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Whether the images of a batch are mixed with each other, and their labels in the same shares."""
    mix_alpha: Rate | None = None
    """Both parameters of the Beta distribution of the share; by default 0.2 for `mixup` and 1.0 for `cutmix`."""
    sampling: Literal["natural", "balanced"] = "natural"
    """How often a training image is read in an epoch: once (`natural`), or so often that all classes give the same
    number of images (`balanced`). An epoch is equally long in both."""
    class_weights: ClassWeights = "none"
    """Weights of the classes in the training loss: `balanced` (number of images / number of classes / images of the
    class), or a number for each class name, 1 for the classes that are not named."""
    cache_features: PathText | None = None
    """Folder on a local disk that stores the outputs of the frozen backbone for each training image, so that only the
    first epoch computes them. Tasks and later runs may share the folder."""
    mean: tuple[Pixel, Pixel, Pixel] = (0.485, 0.456, 0.406)
    """Number for each colour channel that is subtracted from the pixels, on the scale 0 to 1. The default is ImageNet's
    mean."""
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)
    """Number for each colour channel by which the pixels are divided after that, above 0 and up to 1. The default is
    ImageNet's standard deviation."""
    label_smoothing: Share = 0.0
    """Share of each label that is spread evenly over all classes in the training loss; 0 keeps the labels."""
    weight: Rate = 1.0
    """Weight of each worker of this task where gradients are averaged: `sync`, `allreduce`, and `local` with
    `rounds`."""
    auxiliary_weight: Amount = 0.4
    """Weight of the loss of an auxiliary classifier (InceptionV3)."""
    undecodable: Literal["fail", "skip"] = "fail"
    """Whether an image that cannot be decoded ends the run (`fail`), or is left out and counted (`skip`)."""
    verify_data: bool = True
    """Read every shard once before training to compare its SHA-256 with the index and to check its labels."""
    damaged_shards: Literal["fail", "skip"] = "fail"
    """Whether a shard that is missing, or differs from the index, is an error before the job starts (`fail`), or is
    left out with a warning (`skip`)."""
    shuffle_window: Count = 4096
    """Number of training rows that are shuffled together. A worker holds the encoded images of up to two such
    windows."""
    train_on: Literal["train", "train+validation"] = "train"
    """Tables that training reads. With `train+validation` the validation metrics measure images that were trained on,
    so they cannot be used to choose a setting. Use it once the settings are chosen."""
    validation_images: Count | None = None
    """Number of validation images that each evaluation during training reads; all by default."""

    @property
    def needed_workers(self) -> int:
        """Number of workers that need a place before training starts."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _the_minimum_is_a_part_of_its_workers(self) -> Self:
        if self.needed_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, but the task has workers: {self.workers}; set workers to the "
                "largest number that it may have, and min_workers to that number or fewer"
            )
        return self

    @model_validator(mode="after")
    def _mixing_mixes(self) -> Self:
        if self.mix == "none" and self.mix_alpha is not None:
            raise ValueError(f"mix_alpha is {self.mix_alpha:g}, but mix is 'none'; set mix, or leave mix_alpha out")
        if self.mix != "none" and self.batch_size == 1:
            raise ValueError(
                f"mix is '{self.mix}', which mixes the images of a batch, but batch_size is 1; set 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_balanced_once(self) -> Self:
        if self.sampling == self.class_weights == "balanced":
            raise ValueError(
                "sampling and class_weights are both 'balanced', so rare classes would count twice as intended; leave "
                "one of them out"
            )
        return self

    @model_validator(mode="after")
    def _cpus_and_gpus_are_the_jobs(self) -> Self:
        not_custom = sorted(self.resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"})
        if not_custom:
            raise ValueError(
                f"resources has {not_custom}, but a task's resources are custom resources of the cluster; set the CPUs "
                "and GPUs of all workers in the job's resources.cpus_per_worker and resources.gpus_per_worker"
            )
        return self

    @model_validator(mode="after")
    def _stored_features_stay_the_same(self) -> Self:
        if self.cache_features is None:
            return self
        if "://" in self.cache_features:
            raise ValueError(f"cache_features is '{self.cache_features}', but it has to be a folder on a local disk")
        for key, allowed in (("augment", "none"), ("mix", "none"), ("precision", "float32")):
            if getattr(self, key) != allowed:
                raise ValueError(
                    f"cache_features needs {key} '{allowed}', but {key} is '{getattr(self, key)}'; "
                    f"set {key}: {allowed}, or leave cache_features out"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointsSpec:
    """When and where the run's checkpoints are saved."""

    uri: PathText | None = None
    """Folder for the checkpoints: a path or a pyarrow filesystem URI; checkpoints/ in the run directory by default."""
    every_minutes: Rate | None = 10.0
    """Number of minutes between checkpoints; with null, time does not count."""
    every_rounds: Count | None = None
    """Number of rounds between checkpoints; without it only time counts. Both keys may be set."""
    keep: Count = 2
    """Number of checkpoints that are kept; older ones are deleted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResourcesSpec:
    cpus_per_worker: Rate | None = None
    """CPUs that each worker reserves. By default all workers get an equal share of the cluster's CPUs: at most one, and
    small enough that every worker fits on a node."""
    gpus_per_worker: Amount = 0.0
    """GPUs that each worker reserves. With a number below 1 several workers share one GPU."""
    placement: Literal["spread", "pack"] | None = None
    """Where the workers and the server's shards go: `spread` uses as many nodes as possible, `pack` as few as possible.
    By default Ray finds a place for each worker separately; if a task has `resources` or `labels`, the default is
    `spread`."""
    threads_per_worker: Count = 1
    """Number of threads with which torch computes in each worker."""
    decode_threads: Count = 1
    """Number of threads that decode images for a worker, or for all workers of a node that share the decoded images."""
    start_timeout_s: Rate = 300.0
    """Seconds that the workers may take to start. After that the job fails and names the workers that are missing."""
    step_timeout_s: Rate = 600.0
    """Seconds that a worker may be silent before it counts as lost. The time in which it waits for other workers does
    not count. While workers share a process, the limit is multiplied by the number of workers in the fullest
    process."""

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; Ray gives a share of one GPU, or whole GPUs: set at "
                "most 1, or a whole number"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingSpec:
    uri: PathText | None = None
    """MLflow tracking URI; by default the SQLite file mlflow.db beside the run directories."""
    experiment: str = "multitask"
    """Name of the MLflow experiment, which is created if it is missing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JobSpec:
    name: Name
    """Name of the run and of its directory."""
    backbone: BackboneSpec
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1)]
    workers: Count | None = None
    """Number of workers of all tasks together. When the job starts, each task gets a part of them in proportion to the
    number of its training images, at least one, and the run's spec records the result. Without this key each task has
    its own `workers`."""
    train_shared: bool
    """Whether to train the shared tensors too, so that all tasks learn one backbone, or to keep the backbone frozen."""
    steps: Count
    """Number of steps that each worker makes."""
    evaluate_every: Count
    """Number of rounds between evaluations on the validation tables. The last version is always evaluated."""
    optimizer: OptimizerSpec
    """Optimizer of all tensors. In a file the whole key, or its name or rate, may be left out: the missing values, and
    a missing schedule, come from the recipe of the tasks' patch method (multitask/spec/recipes.py)."""
    rate_rule: Literal["fixed", "per_256_images"] = "fixed"
    """`fixed` uses the rate as it is. `per_256_images` multiplies it by the number of images in an update / 256. The
    images of an update are those of all `accumulate` passes and, if the update is the mean of several workers' pushes,
    those of all these workers."""
    clip_norm: Rate | None = None
    """Largest L2 norm of a worker's gradient, over all shared and private tensors of a push. A longer one is scaled
    down."""
    private_rate_factor: Rate = 1.0
    """Factor on the learning rate of private tensors. Small patches often need larger rates than whole networks."""
    schedule: ScheduleSpec = ConstantSpec()
    engine: EngineSpec = AsyncSpec()
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Seed of everything that is drawn at random: initial values, the order of images, augmentation and dropout."""
    directory: PathText | None = None
    """Directory for all files of the run; runs/NAME by default."""

    @model_validator(mode="after")
    def _task_names_are_unique(self) -> Self:
        counts = Counter(task.name for task in self.tasks)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"task names {quoted(repeated)} appear more than once; give every task its own name")
        return self

    @model_validator(mode="after")
    def _workers_are_the_jobs_or_the_tasks(self) -> Self:
        own = [task.name for task in self.tasks if task.workers > 1]
        if self.workers is not None and own:
            raise ValueError(
                f"workers is {self.workers} for all tasks together, but tasks {own} have workers of their own; set "
                "either the job's workers or the tasks' workers"
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
                f"tasks {cached} have cache_features, but train_shared is true: the backbone's outputs change with "
                "every step; set train_shared: false, or leave cache_features out"
            )
        return self

    @model_validator(mode="after")
    def _a_worker_group_has_places_of_one_kind(self) -> Self:
        kinds = [(task.resources, task.labels) for task in self.tasks]
        if self.engine.worker_group and any(kind != kinds[0] for kind in kinds):
            raise ValueError(
                "engine 'allreduce' needs the same kind of place for all workers (Ray Train's worker group), but the "
                "tasks' resources or labels differ; set them in task_defaults for all tasks, or use engine 'sync'"
            )
        return self

    @model_validator(mode="after")
    def _a_worker_group_starts_whole(self) -> Self:
        fewer = [task.name for task in self.tasks if task.needed_workers < task.workers]
        if self.engine.worker_group and fewer:
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
