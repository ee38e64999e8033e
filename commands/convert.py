"""`foveate convert MODEL -o OUT`: official, timm or hub weights as ours; `--check-published` checks the originals."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from .._errors import RequestError, first_line
from .._timm import pretrained_cfg
from ..export import save_hub
from ..export.convert import compare_files, save_weights
from ..export.files import check_empty_folder, check_target, require_packages
from ..export.published import check_published, list_published
from ..export.weights import explain_mismatch, read_model_weights
from ..train.loading import trained_meta
from ._models import open_model
from ._options import Checkpoint, ModelArgs, OptionalModel, Pretrained, name_weights, parse_model_args
from ._terminal import FAILED, print_facts

WEIGHT_SUFFIXES = (".safetensors", ".pth")
_NO_OUTPUT = "wanted one of --output, --push, --verify and --check-published"


def convert_command(
    model: OptionalModel = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (.safetensors, .pth), or folder in hub layout.")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter, merged into the weights.")] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Compare with weights, an exported file, or recorded outputs (.npz: images, logits)."),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="ORG/REPO", help="Upload to the Hugging Face hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the new repository of --push private.")] = False,
    published: Annotated[
        bool, typer.Option("--check-published", help="Download and check all published weights of MODEL or family.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of --check-published's files; kept.")] = None,
    data: Annotated[Path | None, typer.Option(help="ImageNet folder for --check-published: prints top-1.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images of --data.", show_default="all")] = None,
    model_arg: ModelArgs = None,
) -> None:
    """Convert weights to our layout: a file, a timm hub folder, or a repository of the hub."""
    if published:
        if model is None:
            raise RequestError("--check-published: wanted the name of a model or family")
        _check_published(model, cache, data, images)
        return
    if wrong := [name for name, value in {"--cache": cache, "--data": data, "--images": images}.items() if value]:
        raise RequestError(f"{wrong[0]}: has no effect without --check-published")
    if private and push is None:
        raise RequestError("--private: has no effect without --push")
    if output is None and push is None and verify is None:
        raise RequestError(_NO_OUTPUT)
    _check_targets(output, push)
    kwargs = parse_model_args(model_arg)
    loaded = open_model(model, checkpoint, pretrained, adapter=adapter, arguments=kwargs)
    facts = {"weights": name_weights(model, checkpoint, pretrained)}
    facts |= {} if adapter is None else {"adapter": f"{adapter}, merged"}
    if verify is not None:
        facts["compared"] = compare_files(loaded, verify, lambda path: _open_other(model, path, loaded, kwargs))
    if output is not None:
        _write(loaded, output)
        facts["written"] = str(output)
    if push is not None:
        facts["pushed"] = _push(loaded, push, private)
    facts["parameters"] = f"{sum(p.numel() for p in loaded.parameters()) / 1e6:.2f} M"
    print_facts(f"foveate convert: {type(loaded).__name__}", facts)


def _open_other(name: str | None, path: Path, model: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """Load other weights into a model like `model`."""
    if trained_meta(path) is not None:
        return open_model(None, path)
    if name is not None and trained_meta(name) is None and not os.path.isdir(name):
        return open_model(name, path, arguments=kwargs)
    other = deepcopy(model)
    try:
        other.load_state_dict(read_model_weights(path))
    except RuntimeError as error:
        raise RequestError(f"--verify {path}: {explain_mismatch(error)}") from error
    return other


def _check_targets(output: Path | None, push: str | None) -> None:
    if output is not None and output.suffix in WEIGHT_SUFFIXES:
        check_target(output, output.suffix)
    elif output is not None and output.suffix in (".onnx", ".pt2", ".xml", ".pte", ".bin", ".pt"):
        raise RequestError(f"--output {output}: wanted .safetensors, .pth or a folder; foveate export writes graphs")
    elif output is not None:
        check_empty_folder(output)
    if push is not None:
        require_packages("hub", "huggingface_hub")
        if push.count("/") != 1 or not all(push.split("/")):
            raise RequestError(f"--push: wanted ORG/REPO, got {push!r}")


def _write(model: nn.Module, output: Path) -> None:
    if output.suffix in WEIGHT_SUFFIXES:
        save_weights(model, output)
    else:
        save_hub(model, output)


def _push(model: nn.Module, repository: str, private: bool) -> str:
    from timm.models import push_to_hf_hub

    try:
        card = {"license": pretrained_cfg(model).get("license") or "unknown"}  # timm's default is apache-2.0
        return str(push_to_hf_hub(model, repository, private=private, safe_serialization=True, model_card=card))
    except Exception as error:  # the client raises many types
        raise RequestError(f"--push {repository}: {first_line(error)}") from error


def _check_published(pattern: str, cache: Path | None, data: Path | None, images: int | None) -> None:
    """Print a line per file as soon as it is checked; exit code 1 if one is not as expected."""
    if cache is None or not cache.is_dir():
        raise RequestError(f"--cache: wanted an existing folder for the downloaded files, got {cache}")
    if data is not None and not data.is_dir():
        raise RequestError(f"--data: {data} is not a folder")
    if images is not None and data is None:
        raise RequestError("--images: has no effect without --data")
    entries = list_published(pattern)
    table = Table("weights", "MB", "SHA-256", "top-1, %", "result")
    failed = 0
    for found in check_published(entries, cache, data, images):
        failed += found.problem is not None
        typer.echo(f"{found.name}: {found.problem or 'loads'}", err=True)
        size = "-" if found.size_bytes is None else f"{found.size_bytes / 1e6:.1f}"
        sha = "-" if found.sha256 is None else found.sha256[:16] + (" (known)" if found.hash_known else "")
        table.add_row(
            found.name, size, sha, "-" if found.top1 is None else f"{found.top1:.2f}", found.problem or "loads"
        )
    Console().print(table)
    if failed:
        typer.echo(f"foveate convert: {failed} of {len(entries)} published weights are not as expected", err=True)
        raise typer.Exit(FAILED)
