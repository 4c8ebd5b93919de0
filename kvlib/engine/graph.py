"""A fixed piece of work on fixed tensors, replayed as one CUDA graph; elsewhere the plain call."""

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


class Pool:
    """Memory that graphs share whose replays follow one another on one stream."""

    def __init__(self):
        self.renew()

    def renew(self) -> None:
        """A failed capture leaves its pool recording, and what captures into it next raises (pytorch#180395)."""
        self.handle = torch.cuda.graph_pool_handle()


class Graph:
    """Calls `work`, which returns nothing, reads and writes only tensors that stay where they are, and never syncs.

    On CUDA the first call runs it plainly, which compiles and allocates what it needs; the second captures it; every
    call from then on replays the capture, whatever the arguments, which must therefore always be the same objects.
    What cannot be captured goes on being called plainly: `reason` says why, and so does the log.
    """

    def __init__(self, name: str, work: Callable[..., None], device: torch.device, pool: Pool | None = None):
        self.name, self.work, self.on_cuda, self.pool = name, work, device.type == "cuda", pool
        self.warm, self.captured, self.reason = False, None, ""

    def __call__(self, *arguments) -> None:
        if self.captured is None and self.on_cuda and self.warm:
            self._capture(arguments)
        if self.captured is None:
            self.warm = True
            self.work(*arguments)
        else:
            self.captured.replay()

    def _capture(self, arguments: tuple) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context, because a capture that fails may leave its own stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool and self.pool.handle),
            ):
                self.work(*arguments)
        except RuntimeError as error:
            # Where the work itself fails, ending the capture fails too, and only its context is the reason.
            cause = error.__context__ or error
            if self.pool:
                self.pool.renew()
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.on_cuda, self.reason = False, f"{type(cause).__name__}: {cause}".splitlines()[0]
            log.warning("%s runs without a CUDA graph: %s", self.name, self.reason)
            return
        self.captured = graph
