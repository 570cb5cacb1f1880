"""The plain loop, kept as the truth: every other engine must give its numbers.

A module with its own tensors in their usual layout, the network's formulas as they are written in the paper, a torch
optimizer over its parameters, one task after another.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from metaseg.adapt import Adapter
from metaseg.engine.flat import gather, ordered_parameters, running_statistics
from metaseg.episode import Batch
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
        if next(self.phi.parameters()).device.type != "cuda":
            return nullcontext()
        cudnn = torch.backends.cudnn
        return cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)

    def _reset(self, theta: nn.Module) -> None:
        self.phi.load_state_dict(theta.state_dict())
        self.phi.requires_grad_(False)
        for parameter in self.update.select(self.phi):
            parameter.requires_grad_(True)
        norms = batchnorm_parameters(self.phi)
        self.weights = ordered_parameters(self.phi)[len(norms) :]
        self.optimizer = self.update.make_optimizer(self.weights, norms)

    def _step(self, batch: Batch, lr: float, seed: int, everything: bool) -> Tensor:
        if everything:
            self.phi.requires_grad_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.phi.train()
        with torch.enable_grad(), torch_seed(seed), self.computing():
            loss = self.update.loss(self.phi(batch.images.contiguous()), batch.masks)
            objective = loss
            if self.update.l1:
                objective = loss + self.update.l1 * torch.stack([w.abs().sum() for w in self.weights]).sum()
            self.optimizer.zero_grad()
            objective.backward()  # type: ignore[no-untyped-call]
        for parameter in self.phi.parameters():
            if parameter.requires_grad and parameter.grad is None:  # the loss does not reach it, but it decays
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        return loss.detach()
