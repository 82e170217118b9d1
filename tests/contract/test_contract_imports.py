"""The package needs torch and Lightning: optional libraries may be old, broken or absent."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
    import sys
    {first}
    for name in [n for n in sys.modules if n.split(".")[0] in {blocked!r}]:
        del sys.modules[name]

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Blocked())
"""
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "gguf",
    "jsonargparse",
    "matplotlib",
    "peft",
    "psutil",
    "safetensors",
    "torchmetrics",
    "transformers",
)


def _python(code: str, blocked: tuple[str, ...], first: str = "") -> None:
    """Run ``first``, then ``code`` in a process in which the blocked libraries can no longer be imported."""
    source = textwrap.dedent(BLOCK).format(blocked=set(blocked), first=first) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_public_name_needs_an_optional_library() -> None:
    # Lightning comes first: it imports torchmetrics of any version, which imports what it finds. After that, nothing
    # of ours may ask for any of them, so that their versions and their absence do not matter.
    _python(
        """
        import lightning_memsave
        for name in lightning_memsave.__all__:
            if name != "PeakMemory":  # a metric of torchmetrics
                getattr(lightning_memsave, name)
        """,
        OPTIONAL,
        first="import lightning.pytorch, pytorch_lightning",
    )


@pytest.mark.parametrize(("only", "other"), [("lightning", "pytorch_lightning"), ("pytorch_lightning", "lightning")])
def test_one_namespace_alone_is_enough(only: str, other: str) -> None:
    # `lightning` brings `pytorch_lightning` along only as a separate distribution; either may be missing
    module = "lightning.pytorch" if only == "lightning" else only
    _python(
        f"""
        import torch
        import {module} as pl
        from lightning_memsave import Applied, ModelTransform, Stage

        class Halve(ModelTransform):
            stage = Stage.KERNEL
            def apply(self, module):
                with torch.no_grad():
                    module.layer.weight.mul_(0.5)
                return Applied(summary="halved", num_modules=1)

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch).mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.0)

        module = Module()
        before = module.layer.weight.item()
        pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[Halve()],
                   enable_progress_bar=False, enable_model_summary=False,
                   ).fit(module, torch.utils.data.DataLoader(torch.ones(2, 1)))
        assert module.layer.weight.item() == before / 2
        assert not any(n.split(".")[0] == {other!r} for n in sys.modules)
        """,
        (other,),
    )
