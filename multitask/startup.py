"""Start the processes of a run without the machinery of torch.compile, which none of them uses.

A run that starts Ray or connects to it sets the environment variable `RUN_PROCESS` for its processes, and
`import multitask` then calls `put_off_torch_compile`. The command line does both. In a user's own process, and in the
processes of a Ray session that the user has opened, nothing in `sys.modules` changes: they may use torch.compile.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
UTILS = f"{DYNAMO}.utils"
RUN_PROCESS = "MULTITASK_RUN_PROCESS"
"""Environment variable that marks the processes that a run starts."""
SUBMITTED = "MULTITASK_SUBMITTED"
"""Environment variable that marks the processes of a job that was submitted to a cluster."""


class _StandIn(ModuleType):
    """Stands in for a module, and is replaced by the real one as soon as an attribute is read that it does not have."""

    def __getattr__(self, name: str) -> Any:
        # Python reads a package's `__path__` when it imports one of its modules. Code that walks through all modules
        # reads other names of this kind, and must not cause the import.
        if name.startswith("__") and (self.__name__, name) != (DYNAMO, "__path__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def put_off_torch_compile() -> None:
    """Delay the import of `torch._dynamo` until something is compiled or uses it in another way.

    The import takes almost as long as the import of torch itself. torchvision (0.29) and torch's optimisers (2.15)
    import `torch._dynamo` only to mark functions that torch.compile must not touch, and process groups import it to
    clear one of its caches. In a process that compiles nothing, neither has an effect. Call this function before
    torchvision is imported. If `torch._dynamo` is already imported, nothing changes.
    """
    if DYNAMO in sys.modules:
        return
    dynamo, utils, rules = _StandIn(DYNAMO), _StandIn(UTILS), _StandIn(f"{DYNAMO}.trace_rules")
    vars(rules).update(clear_lru_cache=lambda: None)
    vars(dynamo).update(disable=_leave_as_it_is, graph_break=lambda: None, trace_rules=rules)
    vars(utils).update(is_compile_supported=lambda device: _real(UTILS).is_compile_supported(device))
    sys.modules |= {DYNAMO: dynamo, UTILS: utils}


def _leave_as_it_is(fn: Callable[..., Any] | None = None, recursive: bool = True, **_: Any) -> Callable[..., Any]:  # noqa: ARG001
    """Return the function unchanged, or without a function a decorator that does so, like `torch._dynamo.disable`."""
    return _leave_as_it_is if fn is None else fn


def _real(name: str) -> ModuleType:
    """Remove the stand-ins and import the real module."""
    for stood_in in (DYNAMO, UTILS):
        if isinstance(sys.modules.get(stood_in), _StandIn):
            del sys.modules[stood_in]
    return importlib.import_module(name)
