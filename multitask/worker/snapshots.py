"""A worker's part of a snapshot."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from multitask.server.messages import GroupValues, SnapshotRequest


@dataclass(frozen=True)
class SnapshotPart:
    """The private tensors of a worker as of its last push that the snapshot's version contains."""

    request: SnapshotRequest
    step: int
    """Steps that the private tensors had learned from."""
    position: int
    """Position of the data stream after these steps."""
    private: dict[str, GroupValues]
    """Group -> private values; with the optimiser's slots if the request is for a checkpoint."""


class NewRequests:
    """Recognises repeated snapshot requests: the server repeats a request until it is answered."""

    def __init__(self, evaluates: bool) -> None:
        """Args:
        evaluates: this worker measures validation metrics for its task.
        """
        self._evaluates = evaluates
        self._seen: set[tuple[int, int, str]] = set()
        """Incarnation of the server, version, and what was requested."""

    def take(self, requests: Iterable[SnapshotRequest]) -> list[SnapshotRequest]:
        """Return the new requests. In each of them `evaluate` or `save` is False if it was asked before, or is not this
        worker's job."""
        new = []
        for request in requests:
            which = request.server_incarnation, request.version
            evaluate = request.evaluate and self._evaluates and (*which, "evaluate") not in self._seen
            save = request.save and (*which, "save") not in self._seen
            self._seen |= {(*which, "evaluate")} if evaluate else set()
            self._seen |= {(*which, "save")} if save else set()
            if evaluate or save:
                new.append(replace(request, evaluate=evaluate, save=save))
        return new
