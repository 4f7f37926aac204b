"""The model families of recipes, and models of the user's own, built from a recipe's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType

import torch
from torch import nn

from tacit.federated.models_image import cnn, ds_cnn, mobilenet, resnet8, vit_tiny
from tacit.federated.models_parts import ACTIVATIONS
from tacit.federated.models_sequence import conv1d, gru, lstm, transformer
from tacit.federated.models_tabular import autoencoder, mlp

__all__ = ["FAMILIES", "Family", "build_family"]

# A recipe may always give these; a family without a use for them does not look.
_TOLERATED = frozenset({"groups", "norm", "activation"})
_WIDTHS = frozenset({"channels", "hidden"})
_NUMBERS = frozenset({"width", "depth", "heads", "patch", "groups"})
_WORDS = {"norm": ("group", "batch", "none"), "activation": tuple(ACTIVATIONS)}
_CONVOLUTIONS = frozenset({"channels", "groups", "norm", "activation"})
_RECURRENT = frozenset({"width", "depth", "patch"})
_ATTENTION = frozenset({"width", "depth", "heads", "patch", "activation"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that a recipe names.

    Attributes:
        title: for people.
        parameters: keys of a recipe's model table that it takes.
        build: the model from `shape`, `outputs` and these keys; where one is missing, the family's default holds.
    """

    title: str
    parameters: frozenset[str]
    build: Callable[..., nn.Module]


def _cnn(*, outputs: int, **options: object) -> nn.Module:
    return cnn(classes=outputs, **options)  # type: ignore[arg-type]  # checked by build_family


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "mlp": Family(title="fully connected", parameters=frozenset({"hidden", "activation"}), build=mlp),
        "cnn": Family(title="convolutions", parameters=_CONVOLUTIONS, build=_cnn),
        "ds-cnn": Family(title="depthwise separable convolutions", parameters=_CONVOLUTIONS, build=ds_cnn),
        "resnet-8": Family(title="residual convolutions", parameters=_CONVOLUTIONS, build=resnet8),
        "mobilenet": Family(title="inverted residuals", parameters=_CONVOLUTIONS | {"depth"}, build=mobilenet),
        "vit-tiny": Family(title="transformer over patches", parameters=_ATTENTION, build=vit_tiny),
        "conv1d": Family(title="convolutions over time", parameters=_CONVOLUTIONS, build=conv1d),
        "gru": Family(title="gated recurrent units", parameters=_RECURRENT, build=gru),
        "lstm": Family(title="long short-term memory", parameters=_RECURRENT, build=lstm),
        "transformer": Family(title="transformer over time", parameters=_ATTENTION, build=transformer),
        "autoencoder": Family(
            title="bottleneck; rebuilds its input", parameters=frozenset({"hidden", "activation"}), build=autoencoder
        ),
    }
)


def build_family(parameters: Mapping[str, object], *, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """An untrained model from a recipe's model table.

    *Guarantees*: a built-in family has no buffers, no dropout and no layer that mixes records, unless norm is "batch".
    A model of the user's own is only tried on one input; training refuses it if it mixes records.

    Args:
        parameters: `family`, one of `FAMILIES` or "package.module:name" of an importable nn.Module class or function
            that returns one, "cnn" if absent; the others for the family. What is absent or None is its default. A
            model of the user's own is called with those of `shape`, `outputs` and the others that its signature names.
        shape: of one example, without the batch.
        outputs: width of the output; an autoencoder's has the example's shape instead.

    Raises:
        ValueError: no such family, a key it does not take, a value or shape that does not fit, or a model of the
            user's own that cannot be imported, called, or used.

    >>> build_family({"family": "mlp", "hidden": [8]}, shape=(4,), outputs=2)[1]
    Linear(in_features=4, out_features=8, bias=True)
    >>> build_family({"family": "gru", "hidden": [8]}, shape=(3, 5), outputs=2)
    Traceback (most recent call last):
        ...
    ValueError: expected keys among depth, patch, width for family='gru', got hidden=[8]; remove it
    """
    if not shape or min(shape) < 1 or outputs < 1:
        raise ValueError(f"expected positive sizes, got shape={shape}, outputs={outputs}; give one example's")
    options = {key: value for key, value in parameters.items() if value is not None and key != "family"}
    name = parameters.get("family") or "cnn"
    if isinstance(name, str) and ":" in name:
        return _own_model(name, options, shape=shape, outputs=outputs)
    if not isinstance(name, str) or name not in FAMILIES:
        near = get_close_matches(str(name), FAMILIES, n=1)
        raise ValueError(
            f"expected a family among {', '.join(FAMILIES)}, or package.module:name, got family={name!r}; "
            + (f"did you mean {near[0]!r}?" if near else "choose one")
        )
    taken = FAMILIES[name].parameters
    _expect_keys(name, options, taken)
    for key, value in options.items():
        _expect_value(key, value)
    return FAMILIES[name].build(shape=shape, outputs=outputs, **{k: v for k, v in options.items() if k in taken})


def _expect_keys(name: str, options: Mapping[str, object], taken: frozenset[str]) -> None:
    unknown = [f"{key}={value!r}" for key, value in options.items() if key not in taken | _TOLERATED]
    if unknown:
        keys = ", ".join(sorted(taken)) or "none"
        raise ValueError(f"expected keys among {keys} for family={name!r}, got {', '.join(unknown)}; remove it")


def _expect_value(key: str, value: object) -> None:
    if key in _WORDS and value not in _WORDS[key]:
        raise ValueError(f"expected {key} among {', '.join(_WORDS[key])}, got {key}={value!r}; choose one")
    if key in _NUMBERS and not _is_size(value):
        raise ValueError(f"expected a whole number of at least 1, got {key}={value!r}; change it")
    if key in _WIDTHS and not (isinstance(value, list | tuple) and all(map(_is_size, value))):
        raise ValueError(f"expected a list of whole numbers of at least 1, got {key}={value!r}; change it")
    if key == "channels" and not value:
        raise ValueError(f"expected at least one width, got {key}={value!r}; give one or more")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _own_model(name: str, options: Mapping[str, object], *, shape: tuple[int, ...], outputs: int) -> nn.Module:
    module, _, attribute = name.partition(":")
    with _own_code(name, "to be importable", "install the package or put its folder on PYTHONPATH"):
        factory: object = getattr(import_module(module), attribute)
    if not callable(factory):
        raise ValueError(
            f"expected family={name!r} to be an nn.Module class or a function that returns a model, got "
            f"{type(factory).__name__}; name one"
        )
    arguments = _arguments(name, factory, {"shape": shape, "outputs": outputs}, options)
    with _own_code(name, f"to build a model from {', '.join(arguments) or 'nothing'}", "mend it"):
        model: object = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected family={name!r} to return an nn.Module, got {type(model).__name__}; return a model")
    _try(name, model, shape=shape, outputs=outputs)
    return model


def _arguments(
    name: str, factory: Callable[..., object], always: Mapping[str, object], options: Mapping[str, object]
) -> dict[str, object]:
    """What a factory's signature names, of what there is."""
    with _own_code(name, "to have a signature that Python can read", "write it as a class or a function"):
        signature = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        return {**always, **options}
    named = frozenset(parameter.name for parameter in signature)
    _expect_keys(name, options, named - frozenset(always))
    return {key: value for key, value in {**always, **options}.items() if key in named}


def _try(name: str, model: nn.Module, *, shape: tuple[int, ...], outputs: int) -> None:
    """Refuses a model that does not answer one example with finite outputs."""
    trained = model.training
    with torch.no_grad(), _own_code(name, f"to take an input of shape {(1, *shape)}", "mend its forward"):
        found: object = model.eval()(torch.zeros(1, *shape))
    model.train(trained)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != (1, outputs):
        got = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"expected family={name!r} to answer one example with a tensor of shape {(1, outputs)}, got {got}; "
            "mend its last layer"
        )
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"expected family={name!r} to answer an example of zeros with finite numbers, got others; "
            "mend its first weights"
        )


@contextmanager
def _own_code(name: str, expected: str, advice: str) -> Iterator[None]:
    """Says what went wrong in the user's own code."""
    try:
        yield
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(
            f"expected family={name!r} {expected}, got {type(error).__name__}: {error}; {advice}"
        ) from error
