"""Optimisers over flat buffers, by name: those of torch, and RMSProp as TensorFlow computes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


class RMSpropTF(Optimizer):
    """RMSProp as TensorFlow 1 computes it. The rates in the papers are tuned for it.

    It differs from torch's RMSprop in three ways: the squared average starts at one, epsilon stands inside the square
    root, and the momentum buffer accumulates steps that are already multiplied by the rate.
    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.1 (RMSProp); constants of TF-slim.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if not state:
                    state["square"] = torch.ones_like(parameter)
                    state["momentum"] = torch.zeros_like(parameter)
                square, momentum = state["square"], state["momentum"]
                square.mul_(group["decay"]).addcmul_(gradient, gradient, value=1 - group["decay"])
                root = (square + group["eps"]).sqrt_()
                # One pass over memory; computing the quotient separately would triple the time of the whole step.
                momentum.mul_(group["momentum"]).addcdiv_(gradient, root, value=group["lr"])
                parameter.sub_(momentum)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "rmsprop": RMSpropTF, "sgd": SGD}


def make_optimizer(name: str, decayed: Tensor, plain: Tensor, *, weight_decay: float, **options: Any) -> Optimizer:
    """Return one optimiser over two flat buffers: `decayed` takes the weight decay, `plain` does not.

    Args:
        name: a key of OPTIMIZERS.
        decayed, plain: shape (n,) and (m,), float32; updated in place. Gradients are read from their `.grad`.
        options: the optimiser's options, under torch's names. The rate is set before every step.
    """
    groups = [{"params": [decayed], "weight_decay": weight_decay}, {"params": [plain], "weight_decay": 0.0}]
    if name != "rmsprop":
        options["fused"] = True
    return OPTIMIZERS[name](groups, lr=0.0, **options)
