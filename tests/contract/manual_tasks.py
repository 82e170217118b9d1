"""Small modules with manual optimization: several optimizers, GANs, several backwards or steps in one step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import WIDTH, Task


class Manual(Task):
    """Two optimizers, each with a loss and a scheduler of its own."""

    automatic = False

    def make_network(self) -> None:
        self.left = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)))
        self.right = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)))

    def loss(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.right(self.left(batch)), batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
            loss = self.record(self.loss(batch))
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (self.left, self.right)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class GAN(Task):
    """``toggle_optimizer`` flips ``requires_grad`` of the other network."""

    automatic = False

    def make_network(self) -> None:
        self.generator = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)))
        self.critic = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, 1))

    def loss(self, batch: Tensor) -> Tensor:
        return -self.critic(self.generator(batch)).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self.record(self.loss(torch.randn_like(batch)))
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        fake = self.generator(torch.randn_like(batch)).detach()
        loss = self.record(F.softplus(-self.critic(batch)).mean() + F.softplus(self.critic(fake)).mean())
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.5, 0.9)) for m in (self.generator, self.critic)]


class RetainGraph(Manual):
    """Two losses on one graph: ``retain_graph=True``, then a second backward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        hidden = self.left(batch)
        out = self.right(hidden)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.record(F.mse_loss(out, batch)), retain_graph=True)
        self.manual_backward(self.record(out.pow(2).mean() * 0.1 + hidden.abs().mean() * 0.1))
        first.step()
        second.step()


class SeveralSteps(Manual):
    """Three optimizer steps in one ``training_step``; ``global_step`` counts each."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in batch.chunk(3):
            optimizer.zero_grad()
            self.manual_backward(self.record(self.loss(part)))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
