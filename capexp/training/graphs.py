"""CUDA graphs: work on a GPU that is launched once, recorded, and then replayed by a single call."""

from collections.abc import Callable, Hashable

import torch

Work = Callable[[], None]
"""Work of fixed shapes that does not wait for the GPU. It reads and writes tensors whose addresses stay the same."""


class Graphs:
    """Runs work on a GPU, with a CUDA graph for each kind of work; on other devices it only calls the work.

    The CPU takes longer to launch the kernels of a training step than the GPU to run them. A graph launches them all at
    once (Ng et al., "Accelerating PyTorch with CUDA graphs", 2021).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_used = device.type == "cuda"
        """Whether work is captured."""
        self.generator = torch.cuda.default_generators[device.index or 0] if self.is_used else torch.default_generator
        """The random generator that the work draws from. Seed it before the work, also before a replay."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        if self.is_used:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, kind: Hashable, work: Work, release: Work | None = None) -> None:
        """Do work of a kind, which has shapes of its own.

        The first time, the work runs without a graph. The second time it is captured and replayed; after that it is
        only replayed. ``release`` is called before the capture, to free tensors that the work allocates anew.
        """
        if not self.is_used:
            work()
            return
        graph = self._graphs.get(kind)
        if kind in self._graphs and graph is None:
            graph = self._graphs[kind] = self._capture(work, release)
        if graph is not None:
            graph.replay()
            return
        self._graphs[kind] = None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def _capture(self, work: Work, release: Work | None = None) -> torch.cuda.CUDAGraph:
        """Capture work as a CUDA graph. Capturing does not run it."""
        graph = torch.cuda.CUDAGraph()
        if release is not None:
            release()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph's own memory cannot reuse what the work without a graph allocated
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until the GPU has done all work that was launched before this call."""
        if not self.is_used:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize
