"""Write the files that later versions must still read: `python tests/files_of_0_1/record.py`, on the oldest torch.

They are recorded once a release and then kept: a change that cannot read them says so in the CHANGELOG.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import foveate
from foveate.export import export_program
from foveate.pruning import plan
from foveate.train import train

HERE = Path(__file__).parent
MODEL = {"name": "biformer_tiny", "num_classes": 2, "dims": [8, 16], "depths": [1, 1], "topks": [2, None]}
MODEL |= {"head_dim": 8, "regions": 2, "mlp_ratio": 1.0}
SIZE = 32
RECIPE = '''"""Fine-tune what is left of a small BiFormer."""

from mmengine.config import read_base

from foveate.pruning.hook import KeepMasks

with read_base():
    from .base import *

model = {model!r}
data = dict(root="images", img_size={size}, workers=0)
optimizer = dict(lr=1e-3, weight_decay=0.05)
schedule = dict(epochs=1)
batch_size = 2
ema = 0.5
hooks = [dict(type=KeepMasks, plan="plan.json")]
'''


def images(size: int = SIZE) -> torch.Tensor:
    """Two images that any machine makes alike."""
    return torch.arange(2 * 3 * size * size, dtype=torch.float64).mul(0.37).sin().view(2, 3, size, size).float()


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def main() -> None:
    os.chdir(HERE)  # the files then hold no path of this machine
    torch.manual_seed(0)
    arguments = {key: value for key, value in MODEL.items() if key != "name"}
    model = timm.create_model(MODEL["name"], **arguments).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.5)
    decided = plan(model, "dimap", 0.5, img_size=SIZE)
    decided.save(HERE / "plan.json")
    plan(model, "magnitude", 0.5, structure=["heads", "mlp"], img_size=SIZE).save(HERE / "structured_plan.json")
    (HERE / "base.py").write_text("seed = 3\n")
    (HERE / "recipe.py").write_text(RECIPE.format(model=MODEL, size=SIZE))
    export_program(model, HERE / "program.pt2", img_size=SIZE)
    with torch.no_grad():
        program = torch.export.export(model, (images(),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, HERE / "program_of_ops.pt2")
    torch.save(model.state_dict(), HERE / "model.pth")
    with torch.no_grad():
        expected = {"model": model(images()).tolist()}
    with TemporaryDirectory() as work:
        write_images(Path(work) / "images")
        recipe = {"model": MODEL, "data": {"root": f"{work}/images", "img_size": SIZE, "workers": 0}}
        recipe |= {"optimizer": {"lr": 1e-3, "weight_decay": 0.05}, "schedule": {"epochs": 1}, "batch_size": 2}
        result = train(recipe | {"hooks": [{"type": "KeepMasks", "plan": "plan.json"}]}, work_dir=work)
        for kind, file in {"best": result.best_checkpoint, "last": result.last_checkpoint}.items():
            (HERE / f"{kind}.pth").write_bytes(file.read_bytes())
    expected |= {"versions": {"foveate": foveate.__version__, "torch": torch.__version__, "timm": timm.__version__}}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
