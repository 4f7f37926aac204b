"""Which layer an exporter failed at, and why, in a line: exporters answer with pages."""

from __future__ import annotations

import re
import traceback

import torch
from torch import nn

__all__ = ["layer_at", "operator_at", "reason_of"]

_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'")
_MOST_CHARACTERS = 200


def layer_at(error: BaseException, model: nn.Module) -> str:
    """The innermost layer of a model whose call an error came through.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(2, 3))
        >>> try:
        ...     model(torch.zeros(1, 4))
        ... except RuntimeError as error:
        ...     layer_at(error, model)
        "layer '1' (Linear)"
    """
    names = {id(module): name for name, module in model.named_modules()}
    inner = model
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in names:
                inner = module
        cause = cause.__cause__ if inner is model else None
    return _layer(names[id(inner)], type(inner).__name__)


def reason_of(error: BaseException) -> str:
    """Why tracing a model failed, in a line.

    Example:
        >>> reason_of(ValueError("no such size, and forty more lines"))
        'no such size, and forty more lines'
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            "what it does depends on the values of its input (an if, a loop or a size); write it with torch.where, "
            "or leave the choice outside"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_MOST_CHARACTERS] if lines else type(error).__name__


def operator_at(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """The operator that an exporter could not translate, and the layer that it belongs to."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = _OPERATOR.search(str(error))
    if found is None:
        return f"the model cannot be translated: {reason_of(error)}"
    layer = "the model"
    for node in program.run_decompositions().graph.nodes:
        if str(node.target).startswith(found[1]):
            name, kind = [*node.meta.get("nn_module_stack", {"": ("", "")}).values()][-1]
            layer = _layer(name, str(kind).rsplit(".", 1)[-1])
            break
    return f"{layer} cannot be translated: the format has no operator for {found[1]}; replace it"


def _layer(name: str, kind: str) -> str:
    return f"layer {name!r} ({kind})" if name else f"the model ({kind})"
