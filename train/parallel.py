"""What happens to a model before it trains: frozen weights, memory format, recomputation, sharding, compilation."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from mmengine.dist import get_dist_info
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.optim import Optimizer

from .._errors import did_you_mean, first_line
from .errors import TrainError
from .recipe import EngineRecipe, Recipe


def prepare_net(net: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Apply model.freeze and the engine keys that change the model itself, and move it to the device.

    Raises:
        TrainError: a pattern that matches nothing, or a key that the model, the device or the processes do not support.
    """
    freeze(net, recipe.model.freeze)
    engine = recipe.engine
    if engine.parallel == "fsdp" and not torch.distributed.is_initialized():
        raise TrainError("engine.parallel fsdp: divides a model among processes; start them with torchrun or srun")
    if engine.grad_checkpointing:
        _recompute(net, recipe.model.name)
    if engine.sync_bn:
        net = _synchronize_norms(net, recipe.model.name, device)
    net = net.to(device)
    return net.to(memory_format=torch.channels_last) if engine.channels_last else net


def freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradients of parameters whose names match; a pattern with "!" in front turns them on again.

    Raises:
        TrainError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters, frozen = dict(net.named_parameters()), set[str]()
    for pattern in patterns:
        matched = {name for name in parameters if fnmatchcase(name, pattern.removeprefix("!"))}
        if not matched:
            raise TrainError(f"model.freeze: {pattern!r} matches no parameter of the model")
        frozen = frozen - matched if pattern.startswith("!") else frozen | matched
    for name in frozen:
        parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise TrainError("model.freeze: nothing is left to train")


def frozen_norms(net: nn.Module) -> list[nn.Module]:
    """Return the BatchNorms whose weights do not train: their statistics must not move either."""
    norms = (module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]


def shard(net: nn.Module, device: torch.device) -> None:
    """Divide weights, gradients and optimizer states among all processes, in place (FSDP2, torch's fully_shard).

    Every residual block is gathered before it runs and freed after it. Weights must be equal in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_dist_info()[1],))
    for block in residual_blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def residual_blocks(net: nn.Module) -> list[nn.Module]:
    """Return the innermost items of lists and sequences of modules that are modules of layers themselves."""
    found = [m for parent in net.modules() if _is_list(parent) for m in parent.children() if _is_block(m)]
    return [block for block in found if not any(other is not block and other in found for other in block.modules())]


def compile_net(net: nn.Module, engine: EngineRecipe) -> None:
    """Let torch.compile compile the model's forward pass; names of parameters stay.

    Raises:
        TrainError: unknown backend.
    """
    if engine.compile is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if engine.compile not in known:
        raise TrainError(f"engine.compile: unknown backend {engine.compile!r}{did_you_mean(engine.compile, known)}")
    net.compile(backend=engine.compile)


def model_state(model: nn.Module, sharded: bool) -> dict[str, Tensor]:
    """Return the whole state dict; where it is sharded all processes must call this, and process 0 gets it."""
    if not sharded:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]  # of tensors and extra states


def load_model_state(model: nn.Module, state: dict[str, Tensor], sharded: bool) -> None:
    """Load a whole state dict, strictly; every process passes all of it."""
    if not sharded:
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state, options=options)  # type: ignore[arg-type]  # tensors are among its values


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the whole state of a sharded model's optimizer, by names of parameters; process 0 gets it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _recompute(net: nn.Module, name: str) -> None:
    try:
        net.set_grad_checkpointing(True)  # type: ignore[operator]  # of timm's models
    except Exception as error:  # models refuse it in different ways
        raise TrainError(f"engine.grad_checkpointing: {name} does not support it: {first_line(error)}") from error


def _synchronize_norms(net: nn.Module, name: str, device: torch.device) -> nn.Module:
    if device.type == "cpu":
        raise TrainError("engine.sync_bn: torch's SyncBatchNorm needs GPUs, got cpu")
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        raise TrainError(f"engine.sync_bn: {name} has no BatchNorm")
    return convert_sync_batchnorm(net)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _is_block(module: nn.Module) -> bool:
    return not _is_list(module) and any(True for _ in module.children()) and any(True for _ in module.parameters())
