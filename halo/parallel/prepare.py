"""How a model is prepared to run on this rank: everything that is done to its layers from outside, in one order."""

from transformers import PreTrainedModel

from halo.models.fuse import fuse
from halo.parallel.activations import KeptLayers, checkpoint_activations, tile_mlps
from halo.parallel.exchanges import parallelize
from halo.parallel.sequence import SequenceGroup


def prepare_model(
    model: PreTrainedModel,
    *,
    fused: bool = False,
    sequence: SequenceGroup | None = None,
    tiled: bool = False,
    activation_checkpointing: bool = False,
    kept_layers: int = 0,
    activation_offload: bool = False,
) -> KeptLayers | None:
    """Change a model's layers in place. Its weights stay as they are.

    The order matters: attention can be split over ranks only once it is fused, and checkpointing wraps all the rest.

    Args:
        fused: 1. A teacher's layers run with HypeNet's kernels. Not for training: rounding changes.
        sequence: 2. The ranks that share each sequence with this one. None: there are none.
        tiled: 3. MLPs take a tile of tokens at a time, which saves memory.
        activation_checkpointing: 4. A layer keeps little more than its input, and its MLP works in tiles.
        kept_layers: the number of layers that keep everything all the same; -1: as many as fit.
        activation_offload: 5. Those inputs wait for backward in host memory.

    Returns:
        The layers that keep everything, where layers are checkpointed.

    Raises:
        ValueError: a layer cannot be split over ranks.
    """
    if fused:
        fuse(model)
    if sequence is not None:
        parallelize([layer.get_submodule("self_attn") for layer in model.model.layers], sequence)
    if tiled or activation_checkpointing:
        tile_mlps(model)
    if activation_checkpointing:
        return checkpoint_activations(model, kept_layers=kept_layers, offload=activation_offload)
    return None
