"""Calls of an actor that Ray starts again when it is lost."""

from collections.abc import Callable

from ray.exceptions import GetTimeoutError

from multitask.cluster.interface import Cluster, Ref
from multitask.engines.loss import LOST, Answer, NotBegunError
from multitask.errors import TrainingError

POLL_S = 0.5
"""Seconds between two looks of the driver at its processes, and between two tries to reach one that is lost."""


class PatientCaller:
    """Calls an actor. If the actor is lost, it repeats the call until Ray has restarted the actor and `begin` has given
    it the job."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        begin: Callable[[], None],
        on_lost: Callable[[Exception], None],
        timeout_s: float,
    ) -> None:
        """Args:
        name: the actor in messages, at the beginning of a sentence.
        begin: hands the actor the job that it works on, and waits for its answer. It is called whenever the actor has
            started and has no job yet.
        on_lost: called with the error of every call that did not reach an actor with a job.
        timeout_s: for how long an answer may take, and for how long the actor may be away.
        """
        self._cluster = cluster
        self._name, self._begin, self._on_lost, self._timeout_s = name, begin, on_lost, timeout_s

    def ask(self, send: Callable[[], Ref[Answer]], begin_first: bool = False) -> Answer:
        """Call the actor and wait for the answer.

        Args:
            send: makes the call; a call that meets a lost actor is made again, so it must be safe to repeat.
            begin_first: the actor has just been started and has no job yet.
        Raises:
            TrainingError: the actor did not answer, or did not come back, in time.
        """
        deadline = self._cluster.clock.monotonic() + self._timeout_s
        while True:
            try:
                if begin_first:
                    self._begin()
                    begin_first = False
                return self._cluster.get(send(), self._timeout_s)
            except LOST as error:
                begin_first = begin_first or isinstance(error, NotBegunError)
                self._on_lost(error)
                if self._cluster.clock.monotonic() > deadline:
                    raise TrainingError(f"{self._name} did not come back within {self._timeout_s:g} s.") from error
                self._cluster.clock.sleep(POLL_S)
            except GetTimeoutError:
                raise TrainingError(f"{self._name} did not answer within {self._timeout_s:g} s.") from None
