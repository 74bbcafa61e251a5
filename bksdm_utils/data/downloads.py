"""Files from the network: resumed, whole, and unpacked into their own folder only (notebooks 03 to 05)."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import ROOT, check_disk

_BUCKET = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"
_COCO = "data/mscoco_val2014_41k_full"


@dataclass(frozen=True)
class Download:
    """A file on the network and its path in the repository.

    Attributes:
        path: relative to the repository; a .tar.gz is unpacked into the folder of the same name.
        disk_factor: disk needed altogether, as a multiple of the file's size; archives need space for their contents.
    """

    url: str
    path: str
    disk_factor: float = 1.0


DOWNLOADS: Mapping[str, Download] = {
    f"laion_aes_{size}": Download(f"{_BUCKET}/improved_aesthetics_{score}plus/preprocessed_{size}.tar.gz",
                                  f"data/laion_aes/preprocessed_{size}.tar.gz", disk_factor=2.1)
    for size, score in (("11k", "6.5"), ("212k", "6.5"), ("2256k", "6.25"))
} | {
    "coco_captions": Download(f"{_BUCKET}/mscoco_val2014_30k/metadata.csv", "data/mscoco_val2014_30k/metadata.csv"),
    "dreambooth": Download("https://github.com/google/dreambooth/archive/refs/heads/main.tar.gz",
                           "data/dreambooth.tar.gz", disk_factor=2.1),
    "inception_pytorch_fid": Download(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "data/weights/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
    "inception_clean_fid": Download(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "data/weights/inception-2015-12-05.pt"),
    "inception_torch_fidelity": Download(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "data/weights/weights-inception-2015-12-05-6726825d.pth"),
    "coco_images": Download("http://images.cocodataset.org/zips/val2014.zip", f"{_COCO}/val2014.zip"),
    "coco_statistics": Download(f"{_BUCKET}/mscoco_val2014_41k_full/real_im256.npz", f"{_COCO}/real_im256.npz"),
}  # fmt: skip
VIT_G = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
_NETWORKS = ("inception_torch_fidelity", VIT_G)
GROUPS = {  # all that scoring by a protocol of notebook 04 needs; what has a / is a model of the hub
    "paper-protocol": ("coco_captions", "coco_statistics", "inception_pytorch_fid", *_NETWORKS),
    "clean-protocol": ("coco_captions", "coco_images", "inception_clean_fid", *_NETWORKS),
}


def download(names: Sequence[str]) -> int:
    """Fetches by name and unpacks archives, printing each path or error; returns the number of failures.

    Args:
        names: of `DOWNLOADS`, or of `GROUPS` for all in them.
    """
    if unknown := set(names) - {*DOWNLOADS, *GROUPS}:
        expected = ", ".join([*DOWNLOADS, *GROUPS])
        raise ValueError(f"no download is called {', '.join(sorted(unknown))}: expected {expected}")
    failures = 0
    for name in dict.fromkeys(part for given in names for part in GROUPS.get(given, (given,))):
        try:
            print(f"{name}: {_fetch(name)}", flush=True)
        except Exception as error:  # the network raises many kinds; the other downloads still get their turn
            print(f"{name}: FAILED: {error}", file=sys.stderr)
            failures += 1
    return failures


def _fetch(name: str) -> Path:
    if "/" in name:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
    return (fetch_folder if DOWNLOADS[name].path.endswith(".tar.gz") else fetch)(DOWNLOADS[name])


def fetch(download: Download, root: Path = ROOT) -> Path:
    """The file, downloaded if it does not exist yet; an interrupted download continues where it stopped.

    Raises:
        ValueError: no such file, or not enough disk; no incomplete file ever has the name.
        OSError: the network or the server failed; the part received so far is kept for the next call.
    """
    from huggingface_hub.file_download import http_get  # resumes, retries, and checks the length

    path, part = root / download.path, root / f"{download.path}.part"
    if path.exists():
        return path
    size = _size(download.url)
    part.parent.mkdir(parents=True, exist_ok=True)
    if size is not None and part.exists() and part.stat().st_size > size:  # of another version of the file
        part.unlink()
    with part.open("ab") as file:
        need = int((size or 0) * download.disk_factor) - file.tell()
        print(f"{download.path}: {need / 1e9:.2f} GB of disk needed", flush=True)
        check_disk(part.parent, need, download.path)
        http_get(download.url, file, resume_size=file.tell(), expected_size=size)
    os.replace(part, path)
    return path


def _size(url: str) -> int | None:
    """Bytes of the file by its server's answer; None where it names no size."""
    from huggingface_hub.utils import get_session

    response = get_session().head(url, follow_redirects=True)
    if response.status_code >= 400:
        kind = ValueError if response.status_code < 500 else OSError
        raise kind(f"{url} answers {response.status_code}: the file does not exist, or the server has failed")
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def fetch_folder(download: Download, root: Path = ROOT) -> Path:
    """The folder that an archive contains, fetched and unpacked if it does not exist yet, completely or not at all.

    Raises as `fetch`, and ValueError where the archive is incomplete or has paths that lead outside the folder.
    """
    folder = root / download.path.removesuffix(".tar.gz")
    if folder.is_dir():
        return folder
    archive, part = fetch(download, root), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.unpack_archive(archive, part, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{archive} could not be unpacked ({error}): delete it and fetch it again") from error
    inner = list(part.iterdir())  # the known archives contain one folder
    os.replace(inner[0] if len(inner) == 1 and inner[0].is_dir() else part, folder)
    shutil.rmtree(part, ignore_errors=True)
    return folder
