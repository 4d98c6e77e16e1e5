"""The job spec's keys for optimizers and for schedules of the learning rate."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from multitask.spec.fields import STRICT, Amount, Count, Number, Rate, Share, Whole


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RMSpropSpec:
    name: Literal["rmsprop"]
    rate: Rate
    decay: Share = 0.9
    """Decay of the running mean of squared gradients."""
    momentum: Share = 0.9
    eps: Rate = 1.0
    """Constant that is added inside the square root, as in TensorFlow; torch adds it outside."""
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
    """L2 penalty, added to the gradient. The optimizer `adamw` shrinks the weights directly instead."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamWSpec:
    name: Literal["adamw"]
    rate: Rate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: Amount = 0.01


OptimizerSpec = Annotated[RMSpropSpec | SGDSpec | AdamSpec | AdamWSpec, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConstantSpec:
    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExponentialSpec:
    name: Literal["exponential"]
    factor: Annotated[Number, Field(gt=0, le=1)]
    every_rounds: Count
    """Number of rounds after which the rate is multiplied by `factor`. It is the same for all tasks."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CosineSpec:
    name: Literal["cosine"]
    """The rate follows half a cosine from its full value to 0 over the job's steps."""
    warm_up_rounds: Annotated[Whole, Field(ge=0)] = 0
    """Number of rounds at the start in which the rate rises linearly from 0. They are part of the job's steps."""


ScheduleSpec = Annotated[ConstantSpec | ExponentialSpec | CosineSpec, Field(discriminator="name")]
