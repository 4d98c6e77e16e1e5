"""One decode for several tasks over the same images: each row is decoded once and resized for every reader."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from multitask.data.batches import Drawn, TrainStream

AHEAD = 16
"""Batches kept for a reader that is behind."""


class SharedStream:
    """The same training stream at the resolutions of several readers.

    A reader never waits for another one. Where readers keep pace, each image is decoded once; what one decodes is kept
    for those who are behind, up to `AHEAD` batches each, and a reader further behind decodes for itself again. So the
    batches of each reader are those of a `TrainStream` of its own, bit for bit.
    """

    def __init__(
        self, make_stream: Callable[[int], TrainStream], resolutions: Mapping[str, int], ahead: int = AHEAD
    ) -> None:
        """Args:
        make_stream: from a position to the stream that starts there.
        resolutions: reader -> the resolution it asks for, in pixels.
        """
        self._make_stream = make_stream
        self._resolutions = dict(resolutions)
        self._ahead = ahead
        self._position = dict.fromkeys(resolutions, 0)
        self._kept: dict[str, deque[tuple[int, Drawn]]] = {reader: deque() for reader in resolutions}
        self._streams: list[TrainStream] = []
        self.decoded = 0
        """Batches decoded so far, for all readers together."""

    def seek(self, reader: str, position: int) -> None:
        """Let a reader go on at a position of its stream, as `Batch.position` gives it."""
        self._position[reader] = position
        self._kept[reader].clear()

    def next(self, reader: str) -> Drawn:
        """The reader's next batch, at its own resolution alone."""
        position, kept = self._position[reader], self._kept[reader]
        drawn = kept.popleft()[1] if kept and kept[0][0] == position else self._decode(reader, position)
        self._position[reader] = drawn.position
        return drawn

    def _decode(self, reader: str, position: int) -> Drawn:
        sizes = {reader: self._resolutions[reader]}
        for other, kept in self._kept.items():
            behind = self._position[other] <= position and (not kept or kept[-1][0] < position)
            if other != reader and behind and len(kept) < self._ahead:
                sizes[other] = self._resolutions[other]
        drawn = self._stream_at(position).draw(sorted(set(sizes.values())))
        self.decoded += 1
        for other in sizes.keys() - {reader}:
            self._kept[other].append((position, _at(drawn, sizes[other])))
        return _at(drawn, sizes[reader])

    def _stream_at(self, position: int) -> TrainStream:
        """The stream that stands at a position; one where no reader stands is let go, with its windows."""
        self._streams = [stream for stream in self._streams if stream.position in self._position.values()]
        for stream in self._streams:
            if stream.position == position:
                return stream
        self._streams.append(self._make_stream(position))
        return self._streams[-1]


def _at(drawn: Drawn, resolution: int) -> Drawn:
    return replace(drawn, pixels={resolution: drawn.pixels[resolution]}) if drawn.pixels else drawn
