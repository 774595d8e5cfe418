"""A caller's network made ready for an audit: a float64 copy in eval mode.

The caller's module is never touched. A network whose outputs are probabilities is wrapped so that
log p, its natural parameters, comes out. An exported graph (pt2) frozen in training mode is
refused: it stays stochastic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import predict
from flataudit.errors import InputError

# Graph operators that behave differently in training, with the position of their `train` flag.
_TRAIN_FLAGS = {
    "aten.dropout.default": 2,
    "aten.dropout_.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.batch_norm.default": 5,
    "aten._native_batch_norm_legit.default": 5,
    "aten.native_batch_norm.default": 5,
    "aten.instance_norm.default": 5,
}


@dataclass(frozen=True, slots=True, eq=False)
class PreparedModel:
    """The audited copy, what dtype it runs in, and what was assumed about its outputs."""

    module: nn.Module
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


# Hooks, not wrappers: a wrapper would rename the parameters that penalties are given by.
def _log_probabilities(module: nn.Module, args: object, p: Tensor) -> Tensor:
    """A network that outputs class probabilities, read as its natural parameters log p."""
    return torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))


def _log_odds(module: nn.Module, args: object, p: Tensor) -> Tensor:
    """A network that ends in a sigmoid, read as its logit."""
    tiny = torch.finfo(p.dtype).tiny
    return torch.log(p.clamp_min(tiny)) - torch.log((1.0 - p).clamp_min(tiny))


def prepare(model: Any, x: Tensor, device: torch.device) -> PreparedModel:
    """The audited copy of `model` on `device`, checked by running it on the first samples of x.

    Float64; float32 where the graph holds casts that float64 breaks. x: (n, ...), already in the
    dtype it will be audited in (floats as float64).

    Raises:
        InputError: not a torch network, frozen in training mode, or x does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(_unsupported(model))
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "expected an eager or exported network, got a TorchScript one, whose parameters cannot"
            " be swapped; log the eager module, or torch.export it"
        )
    refuse_training_export(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "expected a model with trained parameters, got none with requires_grad=True;"
            " flatness is undefined without parameters"
        )
    module = copy.deepcopy(model)
    if not is_exported(module):
        module.eval()
    module = module.to(device)
    head = x[: min(len(x), 64)]
    if is_exported(module) and len(head) == 1:
        head = head.expand(2, *head.shape[1:])
    dtype, notes = torch.float64, []
    try:
        double = copy.deepcopy(module).double()
        outputs = predict(double, head)
        module = double
    except InputError:
        raise
    except Exception:  # whatever the network raises: does it run in its own dtype?
        dtype = torch.float32
        single = head.float() if head.is_floating_point() else head
        try:
            outputs = predict(module.float(), single)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"expected x that the model accepts, got shape {tuple(x.shape)} {x.dtype} and this"
                f" from the model: {_first_line(error)}"
            ) from error
        notes.append("the network does not run in float64: float32 with float64 accumulation")
    if outputs.shape[1] == 0:
        raise InputError("expected at least one model output per sample, got none; check the model")
    if outputs.shape[1] > 1 and _sums_to_one(outputs):
        module.register_forward_hook(_log_probabilities)
        notes.append("the outputs are probabilities: log p are the natural parameters")
    elif outputs.shape[1] == 1 and _ends_in_sigmoid(module):
        module.register_forward_hook(_log_odds)
        notes.append("the output is a probability: its log odds are the natural parameter")
    return PreparedModel(module, dtype, tuple(notes))


def is_exported(model: nn.Module) -> bool:
    """Whether `model` is a graph made by torch.export (pt2)."""
    return isinstance(model, torch.fx.GraphModule)


def refuse_training_export(model: nn.Module) -> None:
    """InputError for a pt2 graph exported in training mode.

    The graph's own `training` flag is True either way: the operators' arguments tell.
    """
    if not isinstance(model, torch.fx.GraphModule):
        return
    for node in model.graph.nodes:
        position = _TRAIN_FLAGS.get(str(node.target))
        if position is None:
            continue
        flag = node.args[position] if len(node.args) > position else node.kwargs.get("train")
        if flag:
            raise InputError(
                f"expected a network exported in eval mode, got {node.target} frozen in training"
                " mode; call model.eval() before torch.export and log it again"
            )


def _unsupported(model: Any) -> str:
    kind = type(model).__name__
    trees = ("Forest", "Tree", "Boost", "XGB", "LGBM", "Isolation")
    if any(word in kind for word in trees):
        return (
            f"expected a network with differentiable parameters, got {kind}; a tree ensemble has"
            " no gradient, so flatness is undefined for it"
        )
    return (
        f"expected a torch.nn.Module, got {type(model).__module__.split('.')[0]} {kind};"
        " audit a PyTorch network, or log the model with the pytorch flavor"
    )


def _sums_to_one(outputs: Tensor) -> bool:
    if float(outputs.min()) < 0.0:
        return False
    return bool(((outputs.sum(dim=1) - 1.0).abs() < 1e-5).all())


def _ends_in_sigmoid(module: nn.Module) -> bool:
    if isinstance(module, torch.fx.GraphModule):
        output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
        return any("sigmoid" in str(node.target) for node in output.all_input_nodes)
    leaves = [m for m in module.modules() if not list(m.children())]
    return bool(leaves) and isinstance(leaves[-1], nn.Sigmoid)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
