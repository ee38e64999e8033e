"""MMEngine's Runner with our device and checkpoints. Its detailed log goes to a file, not to the terminal."""

import logging
import uuid
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from .._errors import first_line
from .checkpoints import read_checkpoint
from .errors import TrainError

# The state of an empty message hub.
_NO_HISTORY: dict[str, dict[str, Any]] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}


class RecipeRunner(Runner):
    def __init__(self, *, device: torch.device, **kwargs: Any) -> None:
        self.device = device
        super().__init__(experiment_name=uuid.uuid4().hex[:8], **kwargs)  # key of MMEngine's global objects

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
        """Return a visualizer that draws nothing: scalars.jsonl is the record."""
        return Visualizer(name=self.experiment_name)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Move the model to our device. Buffers are broadcast from process 0, which saves them."""
        model = model.to(self.device)
        if not self.distributed:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return MMDistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=True)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint of `foveate train`, strictly."""
        checkpoint = read_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        model.load_state_dict(checkpoint["state_dict"])
        return checkpoint | {"message_hub": _NO_HISTORY}

    def load_or_resume(self) -> None:
        """Raise a TrainError if the parts of a checkpoint do not fit the run."""
        try:
            super().load_or_resume()
        except TrainError:
            raise
        except Exception as error:  # model and optimizer raise many types
            raise TrainError(f"checkpoint {self._load_from} cannot be resumed: {first_line(error)}") from error

    @master_only
    def dump_config(self) -> None:
        """Write the whole recipe, overrides included, to work_dir, from where it can be trained again."""
        self.cfg.dump(Path(self.work_dir) / "recipe.py")

    def close(self) -> None:
        """Close the log files, which MMEngine's global logger keeps open."""
        for handler in self.logger.handlers:
            handler.close()

    def _log_env(self, env_cfg: dict) -> None:
        """Skip MMEngine's report of compilers and drivers, which takes seconds. Checkpoints hold the versions."""
