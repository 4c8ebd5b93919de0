"""A fixed piece of work on fixed tensors, replayed as one CUDA graph; elsewhere the plain call."""

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


class Graph:
    """Calls `work`, which returns nothing, reads and writes only tensors that stay where they are, and never syncs.

    On CUDA the first call runs it plainly, which compiles and allocates what it needs; the second captures it; every
    call from then on replays the capture, whatever the arguments, which must therefore always be the same objects.
    What cannot be captured goes on being called plainly, with the reason logged. pool: memory that graphs share whose
    replays follow one another (torch.cuda.graph_pool_handle).
    """

    def __init__(self, name: str, work: Callable[..., None], device: torch.device, pool=None):
        self.name, self.work, self.on_cuda, self.pool = name, work, device.type == "cuda", pool
        self.warm, self.captured = False, None

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
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                self.work(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.on_cuda = False
            log.warning("%s runs without a CUDA graph: %s", self.name, str(error).splitlines()[0])
            return
        self.captured = graph
