"""Processes that a run starts do without the machinery of torch.compile, which none of them uses.

They get the environment variable `RUN_PROCESS`, on which `import multitask` calls `put_off_torch_compile`; the command
line calls it too. A user's own process, which may compile what it likes, keeps its `sys.modules` as they are.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
UTILS = f"{DYNAMO}.utils"
RUN_PROCESS = "MULTITASK_RUN_PROCESS"
"""Environment variable of the processes that a run starts."""


class _StandIn(ModuleType):
    """Gives its place to the real module as soon as something is asked that it does not have."""

    def __getattr__(self, name: str) -> Any:
        # Python asks a package for its path when one of its modules is imported. Of other such names those ask who
        # walk through all modules.
        if name.startswith("__") and (self.__name__, name) != (DYNAMO, "__path__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def put_off_torch_compile() -> None:
    """Let `torch._dynamo` be imported when something is compiled, or asks for anything else of it.

    It takes almost as long to import as torch itself. torchvision (0.29) and torch's optimisers (2.15) import it to
    mark functions which torch.compile is to leave alone, process groups to clear a cache of it; where nothing is
    compiled, that has no effect. Call it before torchvision is imported. Where `torch._dynamo` is imported already,
    nothing changes.
    """
    if DYNAMO in sys.modules:
        return
    dynamo, utils, rules = _StandIn(DYNAMO), _StandIn(UTILS), _StandIn(f"{DYNAMO}.trace_rules")
    vars(rules).update(clear_lru_cache=lambda: None)
    vars(dynamo).update(disable=_leave_as_it_is, graph_break=lambda: None, trace_rules=rules)
    vars(utils).update(is_compile_supported=lambda device: _real(UTILS).is_compile_supported(device))
    sys.modules |= {DYNAMO: dynamo, UTILS: utils}


def _leave_as_it_is(fn: Callable[..., Any] | None = None, recursive: bool = True, **_: Any) -> Callable[..., Any]:  # noqa: ARG001
    """Mark a function, or make what marks one."""
    return _leave_as_it_is if fn is None else fn


def _real(name: str) -> ModuleType:
    for stood_in in (DYNAMO, UTILS):
        if isinstance(sys.modules.get(stood_in), _StandIn):
            del sys.modules[stood_in]
    return importlib.import_module(name)
