"""From pinned memory that the host cache has filled to the GPU: no reading, no copy on the host."""

import threading

from torch import Tensor

from runtime.gpu.host_parts import HostParts, Wait, open_parts
from runtime.gpu.weight_stream import WeightStream
from runtime.host_cache.protocol import HeldFile
from snapshots.loader import OpenRank


class CachedStream(WeightStream):
    """One pass over a rank's file as the host cache holds it.

    Args:
        rank: What to bring.
        held: The file; owned from now on.
        device: "cuda", or "cpu" in tests.
    """

    def __init__(self, rank: OpenRank, held: HeldFile, device: str) -> None:
        super().__init__(rank, len(held.descriptors), "host cache")
        self._held: HeldFile | None = held
        self._device = device
        self._parts: HostParts | None = None
        self._copier: threading.Thread | None = None
        self._is_given_up = False

    def close(self) -> None:
        """Stop, unmap and let go of the file; see `WeightStream`."""
        self._is_given_up = True
        if self._copier is not None:
            self._copier.join()
            self._copier = None
        if self._parts is not None:
            self._parts.close()
            self._parts = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def _start(self, slab: Tensor) -> None:
        assert self._held is not None, "not closed"
        self._parts = open_parts(self._device)
        self._copier = threading.Thread(
            target=self._run, args=(self._held, self._parts, slab), name="weights", daemon=True
        )
        self._copier.start()

    def _is_running(self) -> bool:
        return self._copier is None or self._copier.is_alive()

    def _copied(self) -> None:
        """Do nothing yet: to unmap 16 GB takes 30 ms, in which the first token can be made."""

    def _run(self, held: HeldFile, parts: HostParts, slab: Tensor) -> None:
        try:
            parts.enter()
            for size, wait in self._start_copies(held, parts, slab):
                wait()
                self._news.put(size)
        except Exception as error:  # noqa: BLE001  # the thread that waits for the bytes raises it
            self._news.put(error)

    def _start_copies(
        self, held: HeldFile, parts: HostParts, slab: Tensor
    ) -> list[tuple[int, Wait]]:
        """Start to copy every part; return the bytes of each and what waits for it."""
        data_start = self._rank.file.data_offset
        data_end = data_start + self._rank.data_bytes
        copies = []
        for index, descriptor in enumerate(held.descriptors):
            if self._is_given_up:
                break
            part_start = index * held.part_bytes
            part_end = min(part_start + held.part_bytes, held.num_bytes)
            start, end = max(part_start, data_start), min(part_end, data_end)
            target = slab[start - data_start : end - data_start]
            wait = parts.copy(descriptor, part_end - part_start, start - part_start, target)
            copies.append((end - start, wait))
        return copies
