"""The parameter server as the driver sees it."""

import itertools
import logging
from typing import Any

from multitask.engines.caller import PatientCaller
from multitask.engines.crew import Crew
from multitask.engines.decisions import Recovery, ServerChange, server_change
from multitask.engines.interface import WHOLE_RUN, Outcome
from multitask.engines.loss import RestartAllError
from multitask.server.messages import StepRecord
from multitask.server.parameter_server import CompleteSnapshot
from multitask.server.progress import Progress
from multitask.worker import Values

SERVER = "server"
"""Name of the parameter server among what is lost."""

log = logging.getLogger(__name__)


class ServerClient:
    """Calls the parameter server of a run, again and again where it is lost, and notices when it was started again."""

    def __init__(self, crew: Crew, outcome: Outcome) -> None:
        self._crew, self._outcome = crew, outcome
        self._timeout_s = crew.job.spec.resources.start_timeout_s
        self._caller = PatientCaller(
            crew.cluster, "The parameter server", self._hand_out_job, self._on_lost, self._timeout_s
        )
        self._incarnations: list[int] = []
        """The server's answer to `ping` when the driver last looked."""
        self._drains = itertools.count(1)
        self.pausing = False
        """Whether the server was told to let all workers stop after their step."""

    def begin(self) -> None:
        """Hand the server and its shards the job at the latest checkpoint."""
        self._incarnations = self._caller.ask(self._crew.server.ping.remote, begin_first=True)

    def watch(self) -> bool:
        """Look whether the server or one of its shards was started again, and see to it that they fit together.

        Returns:
            The server was started again since the last look, and went back to a checkpoint.
        Raises:
            RestartAllError: a process of the server was lost under `sync`.
        """
        server = self._caller.ask(self._crew.server.ping.remote)
        shards = [self._caller.ask(shard.ping.remote) for shard in self._crew.shards]
        change = server_change(self._incarnations, server, shards)
        if change is ServerChange.SHARD_RESTARTED:
            self.note_loss(SERVER, "A shard of the parameter server was lost.")
            self._crew.cluster.kill(self._crew.server, restart=True)
            server = self._caller.ask(self._crew.server.ping.remote)
            change = server_change(self._incarnations, server, server[1:])
        if change is ServerChange.RESTARTED:
            self._incarnations = server
            self.note_loss(SERVER, "The parameter server was lost.")
            if self.pausing:
                self.call("pause")
            log.warning("The parameter server is back, at %s.", self._crew.store.where() or "the start")
        # A server that could not be reached for a while may have run all the time.
        self._outcome.note_recovery(SERVER)
        return change is ServerChange.RESTARTED

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `ParameterServer`."""
        return self._caller.ask(lambda: self._crew.server.call.remote(method, *arguments))

    def drain(self) -> tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]:
        """Call `ParameterServer.drain`; an answer that gets lost is given again."""
        number = next(self._drains)
        return self._caller.ask(lambda: self._crew.server.drain.remote(number))

    def snapshot(self, version: int) -> Values | None:
        """Return the server's values of a snapshot; None where the snapshot was lost with the server."""
        return self._caller.ask(lambda: self._crew.server.snapshot.remote(version))

    def pause(self) -> None:
        """Let all workers stop after their step; a server that is started again is told, too."""
        self.pausing = True
        self.call("pause")

    def note_loss(self, what: str, message: str) -> None:
        """Note that a process was lost.

        Args:
            what: the worker, or SERVER.
        Raises:
            RestartAllError: under `sync`, with the first line of the message.
        """
        if self._crew.recovery is Recovery.REPLACE:
            self._outcome.note_loss(what)
        else:
            self._outcome.note_loss(WHOLE_RUN)
            raise RestartAllError(message.splitlines()[0])

    def _hand_out_job(self) -> None:
        self._crew.cluster.get(self._crew.begin(), self._timeout_s)

    def _on_lost(self, error: Exception) -> None:
        self.note_loss(SERVER, f"The parameter server was lost: {error}")
