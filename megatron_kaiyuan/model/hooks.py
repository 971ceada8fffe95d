"""Using a module's weight without calling the module, as a fused kernel does."""

from torch import Tensor, nn

__all__ = ["weight_for_kernel"]


def weight_for_kernel(module: nn.Module, given: Tensor | None = None) -> Tensor:
    """The module's weight, ready to be read.

    Megatron overlaps the all-gather of parameters with the forward pass: a forward pre-hook of each module waits for
    its own. A kernel that reads the weight in the module's place has to run these hooks, or it may read weights of the
    step before.

    Args:
        module: Has the hooks, and the weight.
        given: What the module would be called with in the place of its own weight. With tied embeddings on several
            pipeline stages this is the module's own, named by the caller, so that the hooks are needed here too.
    """
    for hook in tuple(module._forward_pre_hooks.values()):
        hook(module, ())
    weight = module.weight if given is None else given
    assert isinstance(weight, Tensor)
    return weight
