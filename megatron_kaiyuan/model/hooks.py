"""Using a module's weight without calling the module, as a fused kernel does."""

from torch import Tensor, nn

__all__ = ["weight_for_kernel"]


def weight_for_kernel(module: nn.Module) -> Tensor:
    """The module's weight, ready to be read.

    Megatron overlaps the all-gather of parameters with the forward pass: a forward pre-hook of each module waits for
    its own. A kernel that reads the weight in the module's place has to run these hooks, or it may read weights of the
    step before.
    """
    for hook in tuple(module._forward_pre_hooks.values()):
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
