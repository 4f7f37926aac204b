"""A model's arrays by name: what travels between a server and owners, and what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tacit.federated.clipping import Arrays

__all__ = ["channels_last", "joined", "read_arrays", "write_arrays"]


def channels_last(model: torch.nn.Module, shape: Sequence[int]) -> bool:
    """Lays a model's two-dimensional convolutions out with channels last, where its code allows; True where it does.

    On a processor torch pools and convolves such memory with vector instructions: a step of two convolutions with
    pooling takes three quarters of the time, one without pooling about as long as before (`benchmarks/simulation.py`).
    What a model calculates is the same up to float32 rounding.

    Args:
        model: its weights are moved in memory, and keep their shapes and values.
        shape: of one input, without the batch.

    >>> convolution = torch.nn.Conv2d(3, 4, 3)
    >>> channels_last(torch.nn.Sequential(convolution, torch.nn.Flatten()), (3, 8, 8))
    True
    >>> convolution.weight.is_contiguous(memory_format=torch.channels_last)
    True
    >>> channels_last(torch.nn.Linear(4, 2), (4,))
    False
    """
    if not any(isinstance(layer, torch.nn.Conv2d) for layer in model.modules()):
        return False
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    training = model.training
    try:
        with torch.no_grad():  # in eval mode nothing is remembered or drawn
            model.eval()(torch.zeros(2, *shape))
    except RuntimeError:  # a `view` of what a convolution gives, which is a copy in this order
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above
        return False
    finally:
        model.train(training)
    return True


def read_arrays(model: torch.nn.Module, arrays: Arrays) -> None:
    """Sets a model's float parameters and buffers; integer buffers stay as they are and never travel.

    Raises:
        ValueError: names or shapes that are not the model's.

    >>> import numpy as np
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> read_arrays(model, {"weight": np.float32([[2.0]])})
    >>> model.weight.item()
    2.0
    """
    state = _travelling(model)
    if list(arrays) != list(state):
        raise ValueError(f"expected arrays named {', '.join(state)}, got {', '.join(arrays)}")
    with torch.no_grad():
        for name, tensor in state.items():
            if tuple(arrays[name].shape) != tuple(tensor.shape):
                raise ValueError(f"expected {name} of shape {tuple(tensor.shape)}, got {tuple(arrays[name].shape)}")
            tensor.copy_(torch.from_numpy(arrays[name]))


def write_arrays(model: torch.nn.Module) -> Arrays:
    """A model's float parameters and buffers, copied.

    >>> {name: array.shape for name, array in write_arrays(torch.nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tensor.detach().numpy().copy() for name, tensor in _travelling(model).items()}


def _travelling(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}


def joined(model: torch.nn.Module, shared: Arrays, own: Arrays) -> Arrays:
    """What is shared and what an owner keeps to itself, in the order of the model.

    Raises:
        ValueError: a name that is in neither.

    >>> import numpy as np
    >>> joined(torch.nn.Linear(1, 1), {"bias": np.float32([2.0])}, {"weight": np.float32([[1.0]])})
    {'weight': array([[1.]], dtype=float32), 'bias': array([2.], dtype=float32)}
    """
    if not own:
        return shared
    both = {**shared, **own}
    lacking = [name for name in _travelling(model) if name not in both]
    if lacking:
        raise ValueError(f"expected arrays for every part of the model, got none named {lacking[0]!r}")
    return {name: both[name] for name in _travelling(model)}
