"""--checkpoint_dir: an SFT adapter that is merged into the model in memory before a new adapter is trained."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

from stagewise.adapters.attach import merge_in_memory
from stagewise.adapters.files import read_adapter_config, refuse_unmergeable
from stagewise.artifacts.manifest import read_manifest
from stagewise.config.arguments import AdapterArguments, PredecessorArguments
from stagewise.errors import AdapterError, ArgumentError
from stagewise.training.run import Run

Model = TypeVar("Model", bound=PreTrainedModel)


def check_predecessor(run: Run, args: PredecessorArguments, adapter: AdapterArguments) -> None:
    """Checks --checkpoint_dir and --peft_path before any weights are read.

    Raises:
        ArgumentError: for an adapter that cannot be merged, ZeRO-3, or a --peft_path that makes another reference.
    """
    if args.checkpoint_dir:
        if run.zero3:
            raise ArgumentError(
                "--checkpoint_dir: ZeRO-3 loads the model in parts, into which nothing can be merged; merge first: "
                f"python merge_peft_adapter.py --lora_model {args.checkpoint_dir} --output_dir MERGED"
            )
        try:
            refuse_unmergeable(read_adapter_config(args.checkpoint_dir), args.checkpoint_dir)
        except AdapterError as error:
            raise ArgumentError(f"--checkpoint_dir {error}") from error
    earlier = read_manifest(adapter.peft_path) if adapter.peft_path else None
    if earlier is None:  # an adapter from elsewhere has no run.json
        return
    if earlier.get("stage") != run.stage:
        raise ArgumentError(
            f"--peft_path {adapter.peft_path}: an adapter of stage {earlier.get('stage')}, and the reference would be "
            f"the model without it; --checkpoint_dir {adapter.peft_path} makes it a part of both"
        )
    merged = (earlier.get("lineage") or [{}])[-1].get("merged_adapter")
    if merged != args.checkpoint_dir:
        raise ArgumentError(
            f"--peft_path {adapter.peft_path}: was trained with --checkpoint_dir {merged}, found "
            f"{args.checkpoint_dir}; give the same"
        )


def merge_predecessor(run: Run, args: PredecessorArguments, model: Model) -> Model:
    """The model with --checkpoint_dir merged into it; run.json's lineage then continues from that adapter's."""
    if not args.checkpoint_dir:
        return model
    earlier = read_manifest(args.checkpoint_dir) or {}
    *base, step = run.manifest["lineage"]
    if "continued_adapter" not in step:  # its lineage says what was merged
        base = earlier.get("lineage", base)
    run.note(lineage=[*base, {**step, "merged_adapter": args.checkpoint_dir}])
    return merge_in_memory(model, args.checkpoint_dir)
