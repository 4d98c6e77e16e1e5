"""Records: what the server notes about each push, for the driver and for metrics."""

import math
from collections.abc import Callable

from multitask.server.members import Member
from multitask.server.messages import Push, StepRecord
from multitask.server.progress import Progress


class Records:
    """The records of the pushes since the driver last asked for them."""

    def __init__(
        self, private_rate: Callable[[str], float], progress: Progress, on_record: Callable[[StepRecord], None]
    ) -> None:
        """Args:
        private_rate: worker -> the present rate of its task's private tensors.
        progress: the server's own counters, not a copy; they are only read.
        on_record: called with each record.
        """
        self._private_rate = private_rate
        self._progress = progress
        self._on_record = on_record
        self._records: list[StepRecord] = []

    def note(self, push: Push, member: Member, *, rejected: str | None = None, redone: bool = False) -> None:
        """Note a push of a worker, before the push changes version and rounds."""
        version = self._progress.version
        record = StepRecord(
            worker=push.worker,
            task=member.task,
            step=push.step,
            round=math.floor(self._progress.rounds),
            version=version + (not rejected and not redone),
            staleness=push.staleness(version),
            rate=self._private_rate(push.worker),
            loss=push.loss,
            images=push.images,
            seconds=push.seconds,
            skipped=push.skipped,
            bad_images=push.bad_images,
            pid=push.pid,
            queue=member.queue,
            rejected=rejected,
            redone=redone,
        )
        self._records.append(record)
        self._on_record(record)

    def drain(self) -> list[StepRecord]:
        """Return the records since the last call."""
        records, self._records = self._records, []
        return records
