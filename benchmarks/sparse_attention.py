"""Sparsifiner's attention on a CPU: dense, dense with a mask, copied keys, and the predictor that chooses the keys.

    python -m foveate.benchmarks.sparse_attention

Layers: milliseconds of one image with 6 heads of 64, medians; the op takes copies where `gathers` says so. Models:
milliseconds of a batch of 4 at 224 px, random weights.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from ..attention_ops import MaskPredictor, sparse_attention
from ..attention_ops.sparse import gathers, mask_of_columns, sparse_attention_reference
from ..attention_ops.sparsified import best_columns

HEADS, DIM = 6, 64
LAYERS = ((14, 4), (14, 28), (32, 4), (32, 48), (48, 48), (48, 96), (64, 256))  # side of the map, keys over budget
SECONDS = 0.3
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deit_small_patch16_224", {}),
    ("sparsifiner_deit_small", {}),
    ("sparsifiner_deit_small", {"token_rate": 0.7}),
)


def milliseconds(statement: str, **names: object) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median


def layer(side: int, share: int) -> str:
    keys = side * side
    budget = max(keys // share, 1)
    q, k, v = torch.randn(3, 1, keys, HEADS, DIM).unbind(0)
    queries, others, values = (x.transpose(1, 2) for x in (q, k, v))
    predictor = MaskPredictor(HEADS * DIM, HEADS, map_size=(side, side), prefix_tokens=0)

    def choose() -> Tensor:
        return best_columns(predictor(queries, others, size=(side, side)), budget)

    columns = choose()
    mask = mask_of_columns(columns, keys)
    times = (
        milliseconds("f(q, k, v)", f=F.scaled_dot_product_attention, q=queries, k=others, v=values),
        milliseconds("f(q, k, v, m)", f=F.scaled_dot_product_attention, q=queries, k=others, v=values, m=mask),
        milliseconds("f(q, k, v, c, 0.125)", f=sparse_attention_reference, q=q, k=k, v=v, c=columns),
        milliseconds("f(q, k, v, c)", f=sparse_attention, q=q, k=k, v=v, c=columns),
        milliseconds("f()", f=choose),
    )
    return f"{keys:6} {budget:6} " + " ".join(f"{time:9.2f}" for time in times) + f"  {gathers(keys, budget)}"


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("  keys budget     dense    masked    copied    the op predictor  copies")
    with torch.inference_mode():
        for one in LAYERS:
            print(layer(*one))
        x = torch.randn(4, 3, 224, 224)
        for name, options in MODELS:
            model = timm.create_model(name, **options).eval()
            print(f"{name} {options or ''}: {milliseconds('f(x)', f=model, x=x):.0f} ms")


if __name__ == "__main__":
    main()
