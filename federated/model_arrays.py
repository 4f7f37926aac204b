"""A model's arrays by name: what travels between a server and owners, and what a checkpoint keeps."""

from __future__ import annotations

import torch

from tacit.federated.clipping import Arrays

__all__ = ["joined", "read_arrays", "write_arrays"]


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
