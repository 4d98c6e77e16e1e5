"""Patches: small sets of private tensors that fit one shared backbone to many tasks.

`load_backbone` builds a backbone and `attach` makes a task's model on it. `save_bundle` and `load_bundle` write and
read a task's patch as one file. `PatchBank` answers for many tasks with one backbone in memory, and `open_export` opens
what a training exported as such a bank. `fold` makes a plain network of one task's model, which `save_folded` and
`load_folded` write and read.
"""

from patches.backbone import Backbone, load_backbone
from patches.bank import PatchBank, open_export
from patches.bundle import BundleInfo, inspect_bundle, load_bundle, save_bundle, verify_bundle
from patches.errors import BackboneError, BundleError, ImageError, PatchError
from patches.fold import fold
from patches.folded import Folded, load_folded, save_folded
from patches.images.preprocessing import Preprocessing
from patches.method import MethodInfo
from patches.model import ParameterCounts, PatchedModel
from patches.names import unknown_name_message
from patches.patch import attach, methods
from patches.prediction import Answer

__all__ = [
    "Answer",
    "Backbone",
    "BackboneError",
    "BundleError",
    "BundleInfo",
    "Folded",
    "ImageError",
    "MethodInfo",
    "ParameterCounts",
    "PatchBank",
    "PatchError",
    "PatchedModel",
    "Preprocessing",
    "attach",
    "fold",
    "inspect_bundle",
    "load_backbone",
    "load_bundle",
    "load_folded",
    "methods",
    "open_export",
    "save_bundle",
    "save_folded",
    "unknown_name_message",
    "verify_bundle",
]
