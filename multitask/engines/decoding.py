"""Actors that decode images once for several workers of a node."""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch

from multitask.cluster.interface import Actor, Cluster, OnNode, Process
from multitask.data.stream import Drawn
from multitask.engines.loss import LOST
from multitask.job.job import Job

BATCHES_AHEAD = 2
"""Batches that a worker asks its decoder for before it needs them."""


class DecodeActor:
    """Decodes each image once for several workers of one node that read the same rows."""

    def __init__(self, cluster: Cluster, job: Job, workers: Sequence[str]) -> None:
        torch.set_num_threads(1)
        cluster.log_to_stderr(lambda: {"run": job.spec.name})
        self._stream = job.make_stream(workers)

    def next(self, worker: str) -> Drawn:
        """Return the next batch of a worker."""
        return self._stream.next(worker)

    def decoded(self) -> int:
        """Return the number of batches decoded so far."""
        return self._stream.decoded


@contextlib.contextmanager
def decoders(cluster: Cluster, job: Job, nodes: Mapping[str, str]) -> Iterator[dict[str, Actor]]:
    """Start a decoder for each set of workers that read the same rows on one node; end the decoders with the block.

    Args:
        nodes: worker -> the cluster's name of its node.
    Yields:
        Worker -> its decoder, for the workers that have one.
    """
    shared_job = cluster.put(job)
    decoder_of: dict[str, Actor] = {}
    for node in dict.fromkeys(nodes.values()):
        for readers in job.sharing(name for name in job.workers if nodes[name] == node):
            if len(readers) > 1:
                decoder = cluster.start(DecodeActor, [cluster, shared_job, readers], Process(place=OnNode(node)))
                decoder_of |= dict.fromkeys(readers, decoder)
    try:
        yield decoder_of
    finally:
        for decoder in dict.fromkeys(decoder_of.values()):
            cluster.kill(decoder)


def batches_from(cluster: Cluster, decoder: Actor, job: Job, worker: str) -> Iterator[Drawn]:
    """Yield a worker's batches from its decoder; once the decoder is lost, decode in this process."""
    requested = deque(decoder.next.remote(worker) for _ in range(BATCHES_AHEAD))
    position = job.start_of(worker)[1]
    try:
        while True:
            drawn: Drawn = cluster.get(requested.popleft())
            requested.append(decoder.next.remote(worker))
            position = drawn.position
            yield drawn
    except LOST:
        stream = job.make_stream([worker])
        stream.seek(worker, position)
        while True:
            yield stream.next(worker)
