"""What a plan says of the architecture: how its entry was found, what is not balanced, what stays as it is."""

from __future__ import annotations

from calibration.architectures import ArchitectureSpec, described
from calibration.model.checkpoint import CheckpointReader


def architecture_remarks(reader: CheckpointReader, spec: ArchitectureSpec) -> list[str]:
    """Sentences, each of them once for all blocks of a kind."""
    blocks = [spec.block(index) for index in range(spec.n_blocks)]
    remarks = [f"not in the architecture table: derived and proved: {described(spec)}"] if spec.derived else []
    remarks += [f"not balanced: {reason}" for block in blocks for reason in block.unbalanced]
    remarks += [f"stays float: {name}" for block in blocks for name in block.kept]
    return remarks + _further_layers(reader, spec)


def _further_layers(reader: CheckpointReader, spec: ArchitectureSpec) -> list[str]:
    """Layers behind those that the config counts: they predict further tokens, and no class here runs them."""
    behind = [n for n in reader.infos if n.startswith(spec.blocks + ".") and spec.block_of(n) is None]
    layers = sorted({n[len(spec.blocks) + 1 :].partition(".")[0] for n in behind})
    said = f"copied as they are: {len(behind)} tensors of layer {', '.join(layers)}, behind the {spec.n_blocks} that "
    return [said + "config.json counts"] if behind else []
