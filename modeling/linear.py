"""When the matrix of a linear layer may be used by itself, and the layer not be called."""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The (O, I) weight of a layer that does nothing but multiply by it; None for any other.

    A fast path may put such a matrix elsewhere in its computation. Whatever wraps, replaces,
    parametrises, shards, quantises or watches the layer need not be linear or may act at some
    positions only, so then the layer is called.
    """
    if type(layer) is not nn.Linear or layer.bias is not None:
        return None
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    watched = any(hooks) or torch_module._has_any_global_hook() or "forward" in vars(layer)
    plain = type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
    return layer.weight if plain and not watched else None
