"""The plain loop, kept as the truth: every other engine must give its numbers.

A module with its own tensors in their usual layout, the network's formulas as they are written in the paper, a torch
optimizer over its parameters, one task after another.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from metaseg.adapt import Adapter
from metaseg.engine.flat import gather, ordered_parameters, running_statistics
from metaseg.episode import Batch
from metaseg.losses import segmentation_loss
from metaseg.models import use_shortcuts
from metaseg.seeding import torch_seed
from metaseg.update import Update, batchnorm_parameters


class Reference(Adapter):
    """One task at a time, with torch's own parts and nothing else."""

    def __init__(self, net: nn.Module, update: Update) -> None:
        super().__init__(net, update)
        self.phi.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # of modules, too
        use_shortcuts(self.phi, False)

    def vector(self) -> Tensor:
        """A copy."""
        return gather(ordered_parameters(self.phi))

    def statistics(self) -> Tensor:
        """A copy."""
        return gather(running_statistics(self.phi))

    def computing(self) -> AbstractContextManager[None]:
        """Float32 throughout: on CUDA, cuDNN would use TF32."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

    def _reset(self, theta: nn.Module) -> None:
        self.phi.load_state_dict(theta.state_dict())
        self.phi.requires_grad_(False)
        for parameter in self.update.select(self.phi):
            parameter.requires_grad_(True)
        norms = batchnorm_parameters(self.phi)
        weights = ordered_parameters(self.phi)[len(norms) :]
        self.optimizer = self.update.make_optimizer(weights, norms)

    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        if everything:
            self.phi.requires_grad_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.phi.train()
        with torch.enable_grad(), torch_seed(seed), self.computing():
            loss = segmentation_loss(self.phi(batch.images.contiguous()), batch.masks)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()
