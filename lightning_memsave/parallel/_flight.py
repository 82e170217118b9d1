"""One bucket under way: packed, reduced in the background, unpacked into the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_memsave.parallel.buckets import Bucket, is_dense, same_shaped

__all__ = ["Flight"]


class Flight:
    """The all-reduce of one bucket, begun at construction.

    The gradients are divided by the number of ranks and then summed, in that order, as ``DistributedDataParallel``
    does, so that the results are the same bits. Beside them travels one flag a parameter, 1 where a rank used it, so
    that a rank without a gradient learns whether there is one.

    Args:
        bucket: What to reduce.
        parameters: Its parameters; a gradient that exists is sent even where the flag says unused (it was
            accumulated before), a missing one is sent as zeros.
        used: Which of them this rank used since gradients were last averaged.
        group: The process group.
        world_size: Its number of ranks.

    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[nn.Parameter],
        used: Sequence[bool],
        group: dist.ProcessGroup | None,
        world_size: int,
    ) -> None:
        self.bucket, self.parameters, self.used = bucket, parameters, list(used)
        scale = 1.0 / world_size
        flags = torch.tensor([float(flag) for flag in used], dtype=bucket.dtype)
        self.in_place = False
        if bucket.alone:  # on every rank two messages, wherever the values are
            self.flags = flags.to(bucket.device)
            values = self._values_in_place()
            self.in_place = values is not None
            self.values = self._buffer(bucket.num_values) if values is None else values
            sent = [self.values, self.flags]
        else:
            buffer = self._buffer(bucket.num_values + len(used))
            self.values, self.flags = buffer[: bucket.num_values], buffer[bucket.num_values :]
            self.flags.copy_(flags)
            sent = [buffer]
        if self.in_place:
            self.values.mul_(scale)
        else:
            self._pack(scale)
        self._works = [dist.all_reduce(_real(tensor), group=group, async_op=True) for tensor in sent]

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.bucket.dtype, device=self.bucket.device)

    def land(self) -> list[bool]:
        """Wait, write the averages into ``p.grad`` and return which parameters were used by any rank.

        The flags are read (a wait for the device) only if this rank lacks a gradient.
        """
        for work in self._works:
            if work is not None:
                work.wait()
        used = list(self.used)
        if not all(used):
            used = [flag > 0.5 for flag in self.flags.real.tolist()]
        for parameter, view, flag in zip(self.parameters, self._views(), used):
            if not flag:
                continue
            if parameter.grad is None:
                parameter.grad = view.clone()
            elif not self.in_place:
                parameter.grad.copy_(view)
        return used

    def _values_in_place(self) -> Tensor | None:
        """Return the memory of a gradient that is alone in its bucket, if it can be reduced where it is.

        One that this rank did not use may have to stay as it was.
        """
        parameter = self.parameters[0]
        gradient = parameter.grad
        if (
            gradient is None
            or not self.used[0]
            or gradient.dtype != self.bucket.dtype
            or gradient.stride() != parameter.stride()
            or not is_dense(gradient)
        ):
            return None
        return gradient.as_strided((gradient.numel(),), (1,), gradient.storage_offset())

    def _pack(self, scale: float) -> None:
        for parameter, view in zip(self.parameters, self._views()):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.dtype == view.dtype:
                torch.mul(parameter.grad, scale, out=view)
            else:
                view.copy_(parameter.grad).mul_(scale)

    def _views(self) -> list[Tensor]:
        parts = torch.split(self.values, list(self.bucket.sizes))
        return [same_shaped(part, parameter) for part, parameter in zip(parts, self.parameters)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
