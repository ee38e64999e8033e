"""`foveate outliers MODEL --data DIR`: the largest norm and the kurtosis of a model's activations, by role of layer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..export import load_model, real_images
from ..export.inputs import image_files
from ..export.outliers import by_role, measure_outliers
from ._options import MAX_BATCH, Checkpoint, ImgSize, ModelArgs, ModelName, Pretrained, name_weights, parse_model_args

MOST_IMAGES = 100_000


def outliers_command(
    model: ModelName,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of images; its sub-folders too.")],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    images: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images to run on, sorted by name.")] = 256,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images of a batch.")] = 8,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
) -> None:
    """Measure outliers of activations, which int8 quantization suffers from: one line per role of layer."""
    loaded = load_model(model, checkpoint, pretrained=pretrained, **parse_model_args(model_arg))
    count = min(images, len(list(image_files(data))))
    inputs = real_images(loaded, data, count=count, img_size=img_size)
    found = by_role(measure_outliers(loaded, inputs.split(batch)))
    title = f"foveate outliers: {type(loaded).__name__}, {len(inputs)} images, weights: "
    table = Table(title=Text(title + name_weights(model, checkpoint, pretrained)))
    for column in ("role", "modules", "max. norm", "mean kurtosis", "max. kurtosis"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, one in found.items():
        numbers = (f"{one.max_inf_norm:.3g}", f"{one.mean_kurtosis:.3g}", f"{one.max_kurtosis:.3g}")
        table.add_row(Text(role), str(one.modules), *numbers)
    Console().print(table)
