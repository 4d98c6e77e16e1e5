"""The method `norm_statistics`: each task has its own running statistics of BatchNorm."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone
from patches.errors import PatchError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class NormStatistics:
    """Give each task its own running mean and variance of every BatchNorm layer. Scale γ and bias β stay shared.

    In train mode the layers normalise with the batch's statistics and update the running ones. Joined with
    `last_layer`, this is the middle row of the paper's Table 6.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703.
    """

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        if not copy.batch_norms():
            raise PatchError(
                f"Patch method 'norm_statistics' needs BatchNorm layers, and backbone '{copy.name}' has none. "
                "Other normalisation layers keep no statistics; 'scale_bias' owns their scale and bias."
            )

    def owns(self, key: str, module: nn.Module) -> bool:
        return isinstance(module, nn.BatchNorm2d) and key.rpartition(".")[2] in STATISTICS
