"""A caller's network made ready for an audit: a float64 copy in eval mode.

The caller's module is never touched. A network whose outputs are probabilities is hooked so that
log p, its natural parameters, comes out; of an output object only its logits are taken. An exported
graph (pt2) frozen in training mode is refused: it stays stochastic.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import predict
from flataudit.errors import InputError
from flataudit.inputs import Inputs

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
def _in_order(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments by name for a graph that was exported with arguments by position."""
    return inspect.signature(module.forward).bind(*args, **kwargs).args, {}


def _logits_alone(module: nn.Module, args: object, out: Any) -> Any:
    """The logits of an output object or mapping that has some; anything else as it is."""
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "logits", None)
    if found is None and isinstance(out, Mapping):
        found = out.get("logits")
    return found if isinstance(found, Tensor) else out


def _log_probabilities(module: nn.Module, args: object, p: Tensor) -> Tensor:
    """A network that outputs class probabilities, read as its natural parameters log p."""
    return torch.log(p.clamp_min(torch.finfo(p.dtype).tiny))


def _log_odds(module: nn.Module, args: object, p: Tensor) -> Tensor:
    """A network that ends in a sigmoid, read as its logit."""
    tiny = torch.finfo(p.dtype).tiny
    return torch.log(p.clamp_min(tiny)) - torch.log((1.0 - p).clamp_min(tiny))


def prepare(model: Any, x: Inputs | Tensor, device: torch.device) -> PreparedModel:
    """The audited copy of `model` on `device`, checked by running it on the first samples of x.

    Float64; float32 where the graph holds casts that float64 breaks. x: n samples first, already
    in the dtype it will be audited in (floats as float64).

    Raises:
        InputError: not a torch network, frozen in training mode, or x does not fit it.
    """
    x = Inputs.of(x)
    model = _unwrapped(model)
    if not isinstance(model, nn.Module):
        raise InputError(_unsupported(model))
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "expected an eager or exported network, got a TorchScript one, whose parameters cannot"
            " be swapped; log the eager module, or torch.export it"
        )
    refuse_training_export(model)
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise InputError(
            "expected trained parameters, got lazy ones that have no values yet; log the network"
            " after its training"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "expected a model with trained parameters, got none with requires_grad=True;"
            " flatness is undefined without parameters"
        )
    check_arguments(model, x)
    module = _differentiable_copy(model).to(device)
    module.register_forward_hook(_logits_alone)
    head = x[:64].to(torch.float64, device)
    if is_exported(module):
        head = head if len(head) > 1 else head[[0, 0]]
        if x.names is not None and not _takes_names(module, head):
            module.register_forward_pre_hook(_in_order, with_kwargs=True)
    dtype, notes = torch.float64, []
    try:
        double = copy.deepcopy(module).double()
        outputs = predict(double, head)
        module = double
    except InputError:
        raise
    except Exception:  # whatever the network raises: does it run in its own dtype?
        dtype = torch.float32
        try:
            outputs = predict(module.float(), head.to(dtype))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"expected x that the model accepts, got shape {x.description} and this from the"
                f" model: {_first_line(error)}"
            ) from error
        notes.append("the network does not run in float64: float32 with float64 accumulation")
    if outputs.shape[1] == 0:
        raise InputError("expected at least one model output per sample, got none; check the model")
    if _fused_differs(module, head.to(dtype), outputs):
        notes.append(
            "torch's fused attention zeroes padding that this model's outputs depend on: audited as"
            " trained; without gradients it gives other outputs"
        )
    if outputs.shape[1] > 1 and _sums_to_one(outputs):
        module.register_forward_hook(_log_probabilities)
        notes.append("the outputs are probabilities: log p are the natural parameters")
    elif outputs.shape[1] == 1 and _ends_in_sigmoid(module):
        module.register_forward_hook(_log_odds)
        notes.append("the output is a probability: its log odds are the natural parameter")
    return PreparedModel(module, dtype, tuple(notes))


def _unwrapped(model: Any) -> Any:
    """The network inside DataParallel or torch.compile, which calls with other weights bypass."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def check_arguments(model: nn.Module, x: Inputs) -> None:
    """InputError where `forward` cannot be called with these inputs, by its signature alone."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward without a readable signature: running it tells
        return
    args, kwargs = x.arguments
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        got = f"{len(x.parts)} by position" if x.names is None else ", ".join(x.names)
        raise InputError(
            f"expected inputs for forward({', '.join(signature.parameters)}), got {got}: {error};"
            " give x as a dict of arrays by these names, or as a tuple in this order"
        ) from error


def _takes_names(graph: nn.Module, x: Inputs) -> bool:
    try:
        with torch.no_grad():
            x.to(next(graph.parameters()).dtype).call(graph)
    except ValueError:  # names that the graph does not know
        return False
    except Exception:  # everything else is reported where the graph is really run
        return True
    return True


def _differentiable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, whose layers give dense gradients on every device."""
    # Products of parameters that torch.nn.utils.weight_norm and the like keep between calls.
    kept = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    try:
        module = copy.deepcopy(model, memo)
    except Exception as error:  # locks, open files: whatever the class holds
        raise InputError(
            f"expected a network that can be copied, got: {_first_line(error)}; drop the attribute"
            " that cannot be"
        ) from error
    if is_exported(module):
        return module
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            layer.sparse = False
        elif isinstance(layer, nn.RNNBase):
            layer.dropout = 0.0
            layer.train()  # cuDNN differentiates recurrent layers in training mode only
    return module


def _fused_differs(module: nn.Module, x: Inputs, outputs: Tensor) -> bool:
    """Whether the kernels that torch takes without gradients change the outputs (`Inputs.call`)."""
    if not any(isinstance(layer, nn.TransformerEncoderLayer) for layer in module.modules()):
        return False
    args, kwargs = x.arguments
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on nested tensors, which the kernels make
            fused = module(*args, **kwargs).reshape(outputs.shape)
    except Exception:  # what the kernels do not take, nobody serves with them
        return False
    scale = float(outputs.abs().max()) + 1.0
    return float((fused - outputs).abs().max()) > 1e-4 * scale


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
