"""A fixed piece of work on fixed tensors, replayed as one CUDA graph; elsewhere the plain call."""

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


class Graph:
    """Calls `work`, which takes no arguments, reads and writes only tensors that stay where they are, and never syncs.

    On CUDA the first call runs it plainly, which compiles and allocates what it needs; the second captures it; every
    call from then on replays the capture and returns the same output tensors, with new content. What cannot be
    captured goes on being called plainly, with the reason logged once.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device):
        self.work, self.on_cuda = work, device.type == "cuda"
        self.warm, self.captured, self.output = False, None, None

    def __call__(self) -> Any:
        if self.captured is None and self.on_cuda and self.warm:
            self._capture()
        if self.captured is None:
            self.warm = True
            return self.work()
        self.captured.replay()
        return self.output

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.work()
        except RuntimeError as error:
            self.on_cuda = False
            log.warning("decoding without a CUDA graph: %s", str(error).splitlines()[0])
            return
        self.captured = graph
