"""One training stream for several tasks that read the same images: each row is decoded once and resized for all."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from multitask.data.stream import Drawn, TrainStream

AHEAD = 16
"""Number of batches that are kept for a reader that is behind the others."""


class SharedStream:
    """One training stream at the resolutions of several readers.

    Each reader gets the batches that a `TrainStream` of its own would give, bit for bit, and never waits for another
    reader. When a reader decodes a batch, it also resizes the images for the readers that are behind, and the results
    are kept for them, at most `ahead` batches for each reader. So readers at the same pace decode each image once. A
    reader that is further behind decodes again for itself.
    """

    def __init__(
        self, make_stream: Callable[[int], TrainStream], resolutions: Mapping[str, int], ahead: int = AHEAD
    ) -> None:
        """Args:
        make_stream: returns the stream that starts at a given position.
        resolutions: reader -> its resolution, in pixels.
        ahead: number of batches that are kept for a reader that is behind.
        """
        self._make_stream = make_stream
        self._resolutions = dict(resolutions)
        self._ahead = ahead
        self._position = dict.fromkeys(resolutions, 0)
        self._kept: dict[str, deque[tuple[int, Drawn]]] = {reader: deque() for reader in resolutions}
        self._streams: list[TrainStream] = []
        self.decoded = 0
        """Number of batches decoded so far, for all readers together."""

    def seek(self, reader: str, position: int) -> None:
        """Move a reader to a position of its stream, such as the `position` of a batch."""
        self._position[reader] = position
        self._kept[reader].clear()

    def next(self, reader: str) -> Drawn:
        """Return the next batch of a reader, at the resolution of that reader only."""
        position, kept = self._position[reader], self._kept[reader]
        drawn = kept.popleft()[1] if kept and kept[0][0] == position else self._decode(reader, position)
        self._position[reader] = drawn.position
        return drawn

    def _decode(self, reader: str, position: int) -> Drawn:
        """Decode the batch at a position for a reader, and keep it for the readers that are behind."""
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
        """Return a stream at a position. Streams that no reader needs are dropped, which frees their windows."""
        self._streams = [stream for stream in self._streams if stream.position in self._position.values()]
        for stream in self._streams:
            if stream.position == position:
                return stream
        self._streams.append(self._make_stream(position))
        return self._streams[-1]


def _at(drawn: Drawn, resolution: int) -> Drawn:
    """Return the batch at one of its resolutions."""
    return replace(drawn, pixels={resolution: drawn.pixels[resolution]}) if drawn.pixels else drawn
