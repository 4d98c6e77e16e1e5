"""Patches: small sets of private tensors that fit one shared backbone to many tasks."""

from patches.backbone import Backbone, load_backbone
from patches.errors import BackboneError, BundleError, PatchError
from patches.names import unknown_name_message
from patches.patch import MethodInfo, ParameterCounts, PatchedModel, attach, methods

__all__ = [
    "Backbone",
    "BackboneError",
    "BundleError",
    "MethodInfo",
    "ParameterCounts",
    "PatchError",
    "PatchedModel",
    "attach",
    "load_backbone",
    "methods",
    "unknown_name_message",
]
