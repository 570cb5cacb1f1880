"""The fast engine on CUDA: a whole inner step is captured once as a graph, and replayed.

An eager step at batch 8 is some hundreds of small kernels, and the GPU waits for the launch of each. A graph launches
them at once. Each lane has a stream of its own, so that the tasks of a meta-batch run side by side; and a random state
of its own, since graphs that share one would overwrite each other's seeds.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaseg.engine.fast import Fast
from metaseg.episode import Batch
from metaseg.update import Update

Precision = Literal["bf16", "fp32"]
WARM_UP = 3  # eager steps before a capture, in which libraries choose their algorithms and allocate what they keep


class Captured(NamedTuple):
    """A step's graph with the memory that it reads a mini-batch from and writes the loss to."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    masks: Tensor
    loss: Tensor


class Graphs(Fast):
    """`Fast`, with its step replayed from CUDA graphs: one for each shape of a mini-batch.

    Args:
        net: a network of θ's architecture, on a CUDA device; copied.
        update: ω.
        precision: `bf16` computes forward and backward in bfloat16 where autocast allows it, and what cuDNN has
            left in TF32; weights, loss, gradients and update are float32. `fp32`: float32 throughout, without TF32.
    """

    def __init__(self, net: nn.Module, update: Update, precision: Precision) -> None:
        device = next(net.parameters()).device
        self.precision = precision
        self._lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()  # of a lane's graphs: they never run at the same time
        self._captured: dict[tuple[int, ...], Captured] = {}
        self._generator = torch.cuda.default_generators[device.index or 0]
        self._random = self._generator.clone_state()
        super().__init__(net, update)

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queue on the lane's stream, behind what the current stream holds so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Have the current stream wait for the lane's."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Autocast to bfloat16, and what `_libraries` sets."""
        bf16 = self.precision == "bf16"
        with self._libraries(), torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
            yield

    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        key = (*batch.images.shape, everything)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, everything)
        captured = self._captured[key]
        self._lr.fill_(lr)
        captured.images.copy_(batch.images)
        captured.masks.copy_(batch.masks)
        with self._own_random_state():
            self._generator.manual_seed(seed)
            captured.graph.replay()
        return captured.loss.clone()

    def _compute(self, images: Tensor, masks: Tensor, everything: bool) -> Tensor:
        with self._libraries():  # around the backward pass, too
            return super()._compute(images, masks, everything)

    def _capture(self, batch: Batch, everything: bool) -> Captured:
        """Record a step on mini-batches of this shape; φ and its optimizer stay as they are."""
        images, masks = batch.images.clone(), batch.masks.clone()
        state = [self._vector, self._statistics, *self._optimizer_state()]
        before = [tensor.clone() for tensor in state]
        graph = torch.cuda.CUDAGraph()
        with self.queue(), self._own_random_state():
            self._capturable(False)  # or torch warns in each eager step that it need not be
            for _ in range(WARM_UP):
                self._compute(images, masks, everything)
            self._capturable(True)
            # errors of this thread alone: a loader's thread may pin memory meanwhile
            with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
                loss = self._compute(images, masks, everything)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.join()
        return Captured(graph, images, masks, loss)

    def _make_optimizer(self) -> Optimizer:
        optimizer = super()._make_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = self._lr  # read by the graph, so in the GPU's memory
        return optimizer

    def _capturable(self, wanted: bool) -> None:
        for group in self.optimizer.param_groups:
            group["capturable"] = wanted

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        before = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._random)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(before)

    def _libraries(self) -> AbstractContextManager[None]:
        """CuDNN chooses its algorithms by trying them, and may use TF32 unless float32 was asked for."""
        return torch.backends.cudnn.flags(
            enabled=True,
            benchmark=True,
            allow_tf32=self.precision == "bf16",
            deterministic=torch.backends.cudnn.deterministic,
        )
