"""``ChunkedLoss``: no full logits, with an unmodified training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_memsave.callbacks._session import Session
from lightning_memsave.callbacks.model_transform import ModelTransform
from lightning_memsave.errors import raise_problems
from lightning_memsave.transforms._deferred_audit import first_report
from lightning_memsave.transforms._pass import Applied, Stage
from lightning_memsave.transforms.chunked_loss import ChunkOptions, chunk_problems
from lightning_memsave.transforms.deferred_logits import defer_logits, step_context

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ChunkedLoss"]


class ChunkedLoss(ModelTransform):
    """Compute the loss of a large vocabulary without ever holding its logits.

    The output head returns a tensor that stands for its logits. ``F.cross_entropy``, ``nn.CrossEntropyLoss``,
    ``nll_loss(log_softmax)`` and the losses of transformers (``model(**batch).loss``) run over chunks of tokens and
    make the gradients in the same pass; ``argmax``, ``max``, ``topk``, ``logsumexp`` and ``gather`` over the vocabulary
    run in chunks too, and ``argmax`` after the loss is free. Slices and views of the tokens, casts, scaling and
    soft-caps are kept for later. Anything else gets the real logits, with their graph, and is reported: never wrong,
    only not saved.

    **Saves** for N tokens, V classes and logits of ``itemsize`` bytes: the logits, their fp32 copy, its softmax and its
    gradient, up to ``N * V * (itemsize + 12)`` bytes, but for one chunk of c tokens, ``4 * c * V`` bytes (``6 * c * V``
    in 16 bits, ``4 * c * V`` more with a soft-cap). Ignored tokens cost nothing.
    **Costs** no time in most cases (0.87 of the plain loss on a CPU, V = 49152). The gradients of the hidden states and
    of a trainable head, ``V * D`` values for hidden size D, are held from the forward on; a 16-bit head's is summed in
    fp32 meanwhile. Heads with adapters are called once per chunk. ``reduction="none"`` computes the chunks a second
    time in backward.
    **Numerics** are bounded: fp32 losses and gradients within 1e-6 of the largest; in 16 bits the products are the same
    and the sums are fp32, so losses are fp32 and closer to the exact ones. The gradient cannot be differentiated again.
    **Does not combine with** tensor parallelism of the head and ZeRO-3, where the full logits are made and that is
    said. So it is for a head that ``torch.compile`` traces, and for adapters with dropout on the head.

    Heads are found: ``get_output_embeddings``, a linear layer tied with an embedding, or one outside the repeated
    blocks that is named like a head or ends a network, with as many outputs as an embedding has rows, or 512 and more.
    Works in ``training_step``, ``validation_step`` and ``test_step``, in ``eval()`` mode too; ``predict_step`` gets
    plain logits. Logits that leave a step (returned, kept on the module) are made real at its end, before weights
    change.

    Args:
        chunk_tokens: Tokens in a chunk. ``"auto"`` takes chunks of 64 MiB of fp32 logits on a CPU, 256 MiB on an
            accelerator, and no fewer than 64 tokens.
        backend: ``native`` is ours; ``torch`` is ``F.linear_cross_entropy`` (torch 2.13, fp32 mean and sum only);
            ``liger`` are Liger's CUDA kernels. A loss that the one asked for cannot do runs on ``native``, and says so.
            ``auto`` takes Liger on CUDA where it is installed, else ``native``.

    Raises:
        ConfigurationError: At construction, for a wrong argument or a backend that is not installed; in a step, if
            logits are used after the weights or the hidden states they are made from were changed.
        NothingToTransformError: At ``fit``, if no head is found.

    Example:
        >>> from lightning_memsave import ChunkedLoss
        >>> ChunkedLoss(chunk_tokens=512)
        ChunkedLoss(chunk_tokens=512)

    Source:
        Gradients in forward: Hsu et al. 2024 (Liger Kernel), https://arxiv.org/abs/2410.10989, section 3.2.

    """

    # After everything that changes what a head computes: it is then called, or its weight read, as it will stay.
    stage = Stage.CHECKPOINT + 5

    def __init__(
        self,
        chunk_tokens: int | Literal["auto"] = "auto",
        backend: Literal["auto", "torch", "native", "liger"] = "auto",
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self.backend = backend
        raise_problems(type(self).__name__, chunk_problems(chunk_tokens, backend))

    def apply(self, module: nn.Module) -> Applied:
        """Let the output heads defer their logits, in place."""
        return defer_logits(module, ChunkOptions(self.chunk_tokens, self.backend))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the transform on the run's pass, and bound the life of deferred logits by the step."""
        super().setup(trainer, pl_module, stage)
        Session.of(trainer).add_context(type(self).__name__, lambda phase: step_context(pl_module, phase))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once, after the first batch, where full logits were made."""
        session = Session.of(trainer)
        session.shared(type(self).__name__, lambda: _FirstReport(session, pl_module))


class _FirstReport:
    """Reports when it is made, once a run."""

    def __init__(self, session: Session, module: nn.Module) -> None:
        for line, warning in first_report(module):
            session.report("ChunkedLoss", line, warning=warning)

    def close(self) -> None:
        """Have nothing to undo."""
