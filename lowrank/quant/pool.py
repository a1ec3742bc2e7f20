"""Output buffers that come back: on a CPU, fresh pages cost more than the decoding that fills them.

A buffer belongs to the pool again when the STORAGE of the tensor handed out dies, so a view or a detached alias of it
keeps it alive. (A finalizer on the tensor object would fire while `t.detach()` still reads the memory.)
"""

import threading
import weakref
from math import prod

import torch
from torch import Tensor

SMALLEST = 2**21  # bytes; the allocator reuses smaller ones by itself
IDLE_LIMIT = 256 * 2**20  # bytes kept without a user


class Pool:
    """Buffers by exact size, at most `limit` bytes idle, the oldest dropped first."""

    def __init__(self, limit: int = IDLE_LIMIT) -> None:
        self.limit = limit
        self.idle: list[Tensor] = []
        self.lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """torch.empty, out of the pool where it is a large tensor on the CPU."""
        size = prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        with self.lock:
            place = next((i for i, buffer in enumerate(self.idle) if buffer.numel() == size), None)
            buffer = torch.empty(size, dtype=torch.uint8) if place is None else self.idle.pop(place)
        view = buffer.numpy()[:]  # an array object of its own: torch holds it exactly as long as the storage lives
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def _give_back(self, buffer: Tensor) -> None:
        if not self.lock.acquire(blocking=False):  # a finalizer may run anywhere, `empty` included: then just let it go
            return
        try:
            self.idle.append(buffer)
            while sum(b.numel() for b in self.idle) > self.limit:
                self.idle.pop(0)
        finally:
            self.lock.release()

    def clear(self) -> None:
        with self.lock:
            self.idle.clear()


pool = Pool()
