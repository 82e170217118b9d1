"""``memsave merge``: adapters into a model, and by how much that changes what it computes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["HELP", "add_arguments", "run"]

HELP = """
Merge trained adapters into a Hugging Face model, and report the largest difference it makes.

Examples:
  memsave merge --base HuggingFaceTB/SmolLM2-135M --adapter checkpoints/last.ckpt --output merged
  memsave merge --base ./base --adapter checkpoints/last-peft --output merged --base-weights original --json

The merged model is compared with the model as it was trained, adapters unmerged. QLoRA trains on rounded weights:
"dequantized" (the default then) merges into what training saw; "original" merges into the weights of the base, which
training never saw, so that the difference is larger by the rounding.

The base is a folder or hub name as for transformers' from_pretrained; other modules are merged in Python
(lightning_memsave.merge_adapters).

Exit code: 0 if the model was written, 1 if the difference is larger than --max-difference, 2 for bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "--base", required=True, metavar="FOLDER_OR_NAME", help="the Hugging Face model that was adapted"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        type=Path,
        metavar="PATH",
        help="a checkpoint of a run with LoRA or QLoRA, or a folder in PEFT's format",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder; never overwritten")
    parser.add_argument(
        "--base-weights",
        choices=("auto", "original", "dequantized"),
        default="auto",
        help="what to add the adapters to; auto: dequantized if they were trained on a quantized base",
    )
    parser.add_argument(
        "--quantized-as",
        choices=("nf4", "fp4", "int8"),
        help="how the base was stored in training, for adapters that do not say (PEFT folders)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; that of the base by default")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to compare on; may be repeated"
    )
    parser.add_argument("--max-difference", type=float, metavar="X", help="write nothing if a logit differs by more")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and say what came out."""
    from lightning_memsave.cli._merge import MergeRequest, merge_files

    result = merge_files(
        MergeRequest(
            base=args.base,
            adapter=args.adapter,
            output=args.output,
            base_weights=args.base_weights,
            quantized_as=args.quantized_as,
            dtype=args.dtype,
            prompts=tuple(args.prompt),
            max_difference=args.max_difference,
        )
    )
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0 if result.output else 1
    trained = f" (trained on {result.trained_on})" if result.trained_on else ""
    print(f"merged {result.num_layers} layers into {result.base_weights} weights{trained}")
    print(
        f"largest logit difference to the unmerged model: {result.max_logit_difference:.3g} "
        f"(largest logit {result.max_logit:.3g}, on {result.samples})"
    )
    if result.untied:
        print(f"no longer shared: {', '.join(result.untied)}")
    if result.output is None:
        print(f"that is more than --max-difference {args.max_difference:g}: nothing was written")
        return 1
    print(f"wrote {result.output}")
    return 0
