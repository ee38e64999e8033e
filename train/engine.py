"""MMEngine's Runner with our device, models and checkpoints. Its detailed log goes to a file, not to the terminal."""

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_dist_info, master_only
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from .._errors import RequestError, first_line
from .._files import atomic_path
from .checkpoints import read_checkpoint
from .errors import MissingPackageError, TrainError
from .hooks import start_hook
from .parallel import load_model_state, load_optimizer_state
from .recipe import Recipe
from .together import unwrapped

TENSORBOARD = "tensorboard"  # folder in the work_dir


class RecipeRunner(Runner):
    def __init__(self, *, recipe: Recipe, device: torch.device, named_hooks: Sequence[Hook], **kwargs: Any) -> None:
        """Args:
        named_hooks: those of custom_hooks that the recipe names: errors of their start are errors of the recipe.
        """
        self.recipe = recipe
        self.device = device
        self.named_hooks = list(named_hooks)
        self.sharded = recipe.engine.parallel == "fsdp"
        super().__init__(experiment_name=uuid.uuid4().hex[:8], **kwargs)  # key of MMEngine's global objects
        self.optim_wrapper.message_hub = self.message_hub  # it was made before the hub of this run

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Write everything to the log file, and only errors to the terminal."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                # a full disk is reported when a checkpoint is written
                handler.handleError = lambda record: None  # type: ignore[method-assign]
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """Return a visualizer that writes for TensorBoard, or nothing: scalars.jsonl is the record."""
        if not self.recipe.log.tensorboard or get_dist_info()[0] != 0:
            return Visualizer(name=self.experiment_name)
        try:
            import torch.utils.tensorboard  # noqa: F401 - the backend fails only later
        except ImportError as error:
            raise MissingPackageError('log.tensorboard: pip install "foveate[tensorboard]"') from error
        folder = str(Path(self.work_dir) / TENSORBOARD)
        backend = {"type": "TensorboardVisBackend", "save_dir": folder}
        return Visualizer(name=self.experiment_name, vis_backends=[backend], save_dir=folder)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Move the model to our device. Buffers are broadcast from process 0, which saves them."""
        model = model.to(self.device)
        if not self.distributed or self.sharded:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return MMDistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=True)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Load weights, optimizer, position and the states of hooks, strictly."""
        checkpoint = read_checkpoint(filename)
        rank, processes = get_dist_info()
        parts = checkpoint.get("processes", ())
        checkpoint["process"] = dict(parts[rank]) if len(parts) == processes else {}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)  # averages take their part of the weights
        model = unwrapped(self.model)
        load_model_state(model, checkpoint["state_dict"], self.sharded)
        if self.sharded:
            load_optimizer_state(model, self.optim_wrapper.optimizer, checkpoint["optimizer"])
        else:
            self.optim_wrapper.load_state_dict(checkpoint["optimizer"])
        self.call_hook("after_resume", checkpoint=checkpoint)
        self.train_loop.go_to(checkpoint["meta"], self.recipe.batch_size * processes)
        self._has_loaded = True

    def load_or_resume(self) -> None:
        """Raise a TrainError if the parts of a checkpoint do not fit the run."""
        try:
            super().load_or_resume()
        except TrainError as error:
            raise TrainError(f"checkpoint {self._load_from} cannot be resumed: {error}") from error
        except Exception as error:  # model and optimizer raise many types
            raise TrainError(f"checkpoint {self._load_from} cannot be resumed: {first_line(error)}") from error

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call all hooks. Those that the recipe names may refuse to start."""
        if fn_name not in ("before_run", "before_train"):
            super().call_hook(fn_name, **kwargs)
            return
        for hook in self.hooks:
            if hook in self.named_hooks:
                start_hook(hook, fn_name, self)
            elif hasattr(hook, fn_name):
                getattr(hook, fn_name)(self)

    @master_only
    def dump_config(self) -> None:
        """Write the whole recipe, overrides included, to work_dir, from where it can be trained again."""
        with atomic_path(Path(self.work_dir) / "recipe.py") as part:
            self.cfg.dump(part)

    def close(self) -> None:
        """Close the log files, which MMEngine's global logger and TensorBoard keep open."""
        for handler in self.logger.handlers:
            handler.close()
        try:
            self.visualizer.close()
        except (OSError, RequestError):  # a full disk is reported when a checkpoint is written
            return

    def _init_model_weights(self) -> None:
        """Broadcast the weights of process 0; those that are sharded were equal in all processes before."""
        if not self.sharded:
            super()._init_model_weights()

    def _log_env(self, env_cfg: dict) -> None:
        """Skip MMEngine's report of compilers and drivers, which takes seconds. Checkpoints hold the versions."""
