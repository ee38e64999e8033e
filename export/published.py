"""Download the published weights of models, and check that they are what this package expects."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, list_modules

from .._errors import did_you_mean, first_line
from .accuracy import measure_top1
from .errors import ExportError
from .load import load_model
from .metadata import metadata_of
from .runtimes import run_model

_HASH = re.compile(r"-([0-9a-f]{8,64})\.")  # torch.hub's convention for file names
_CHUNK = 2**22  # bytes


@dataclass(frozen=True)
class Published:
    """Weights of one model, as their authors published them."""

    name: str  # with the tag
    url: str


@dataclass(frozen=True)
class Checked:
    """What was found; `problem` is None where everything was as expected."""

    name: str
    size_bytes: int | None
    sha256: str | None
    hash_known: bool
    top1: float | None  # %
    problem: str | None


def list_published(pattern: str) -> list[Published]:
    """Return all published weights of a model, of a family (its module, such as "nat"), or of names with wildcards.

    Raises:
        ExportError: there are none.
    """
    family = pattern in list_modules()
    names = timm.list_models("*" if family else pattern, module=pattern if family else "", pretrained=True)
    found = [Published(name, url) for name in names if (url := weights_url(get_pretrained_cfg(name)))]
    if not found:
        near = did_you_mean(pattern, [*list_modules(), *timm.list_models()])
        raise ExportError(f"no published weights of {pattern} are known by URL{near}")
    return found


def weights_url(cfg: PretrainedCfg | None) -> str | None:
    """Return where the weights of a pretrained_cfg can be downloaded, or None."""
    if cfg is None:
        return None
    if isinstance(cfg.url, str) and cfg.url.startswith(("http://", "https://", "file://")):
        return cfg.url
    if cfg.hf_hub_id:
        return f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    return None


def check_published(
    published: list[Published], folder: Path, data: Path | None = None, most: int | None = None
) -> Iterator[Checked]:
    """Download each file to `folder`, check its hash where the name holds one, and load it strictly. Yield results.

    Args:
        folder: files that are there already are not downloaded again.
        data: an ImageNet folder of class folders; top-1 is measured on it.
        most: images of it; None: all.
    """
    for entry in published:
        path = folder / f"{entry.name}-{_file_name(entry.url)}"
        size = sha = top1 = problem = None
        known = _HASH.search(_file_name(entry.url))
        try:
            _download(entry.url, path)
            size, sha = path.stat().st_size, _sha256(path)
            if known and not sha.startswith(known[1]):
                raise ExportError(f"its SHA-256 begins with {sha[: len(known[1])]}, its name says {known[1]}")
            model = load_model(entry.name, path)
            top1 = None if data is None else _top1(model, data, most)
        except (ExportError, OSError) as error:
            problem = first_line(error)
        yield Checked(entry.name, size, sha, known is not None, top1, problem)


def _file_name(url: str) -> str:
    return Path(url.partition("?")[0]).name


def _download(url: str, path: Path) -> None:
    if path.exists():
        return
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except Exception as error:  # urllib raises many types
        raise ExportError(f"{url} cannot be downloaded: {first_line(error)}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _top1(model: torch.nn.Module, data: Path, most: int | None) -> float:
    metadata = metadata_of(model)
    assert metadata is not None  # timm created it
    found, _ = measure_top1({"model": run_model(model)}, metadata, data, most=most)
    return found["model"]
