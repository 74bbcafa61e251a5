"""Files from the network: resumed where they stopped, checked, and unpacked into their own folder only."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import ROOT, check_disk

_BUCKET = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"


@dataclass(frozen=True)
class Download:
    """A file on the network and where it belongs.

    Attributes:
        path: relative to the repository; an archive's folder is the one it is unpacked into.
        sha256: where known; otherwise the first download's is recorded beside the file and later ones must equal it.
        disk_factor: disk needed altogether, as a multiple of the file's size; archives need room for their contents.
    """

    url: str
    path: str
    sha256: str | None = None
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
    "coco_pictures": Download("http://images.cocodataset.org/zips/val2014.zip",
                              "data/mscoco_val2014_41k_full/val2014.zip"),
    "coco_statistics": Download(f"{_BUCKET}/mscoco_val2014_41k_full/real_im256.npz",
                                "data/mscoco_val2014_41k_full/real_im256.npz"),
}  # fmt: skip


def fetch(download: Download, root: Path = ROOT) -> Path:
    """The file, downloaded if it is not there yet; a download that broke off goes on where it stopped.

    A file stands under its name only when it is whole and its checksum right.

    Raises:
        ValueError: no such file, a wrong checksum, or not enough disk; it says which and what to do.
        OSError: the network or the server failed; what has come so far is kept for the next call.
    """
    path = root / download.path
    expected = download.sha256 or _recorded(path)
    if path.exists():
        _check(path, expected, f"delete {path} to fetch it again")
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = _size(download)
    had = part.stat().st_size if part.exists() else 0
    if size is not None and had > size:  # of another version of the file
        part.unlink()
        had = 0
    _check_disk(download, path.parent, size, had)
    _receive(download.url, part, size)
    try:
        _check(part, expected, "what came was deleted; try again, or ask whoever offers the file")
    except ValueError:
        part.unlink()
        raise
    _record(path, part)
    os.replace(part, path)
    return path


def fetch_folder(download: Download, root: Path = ROOT) -> Path:
    """The folder that an archive holds, fetched and unpacked if it is not there yet.

    Nothing is written outside of it, whatever the archive's names say, and it appears only when it is whole.

    Raises:
        ValueError, OSError: as `fetch`; or the archive is cut off, or tries to write elsewhere.
    """
    folder = root / download.path.removesuffix(".tar.gz")
    if folder.is_dir():
        return folder
    archive = fetch(download, root)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(archive) as file:
            file.extractall(part, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{archive} cannot be unpacked ({error}): delete it and fetch it again") from error
    inner = list(part.iterdir())  # one folder in all archives that we know
    os.replace(inner[0] if len(inner) == 1 and inner[0].is_dir() else part, folder)
    shutil.rmtree(part, ignore_errors=True)
    return folder


def _size(download: Download) -> int | None:
    """Bytes of the file, as its server says; None where it does not."""
    from huggingface_hub.utils import get_session

    answer = get_session().head(download.url, follow_redirects=True)
    if answer.status_code >= 400:
        kind = ValueError if answer.status_code < 500 else OSError
        raise kind(f"{download.url} answers {answer.status_code}: the file is not there, or the server is in trouble")
    length = answer.headers.get("Content-Length")
    return int(length) if length else None


def _check_disk(download: Download, folder: Path, size: int | None, had: int) -> None:
    need = int((size or 0) * download.disk_factor) - had
    print(f"{download.path}: {need / 1e9:.2f} GB of disk needed", flush=True)
    check_disk(folder, need, download.path)


def _receive(url: str, part: Path, size: int | None) -> None:
    from huggingface_hub.file_download import http_get  # resumes, retries, and checks the length

    with part.open("ab") as file:
        http_get(url, file, resume_size=file.tell(), expected_size=size)


def _check(path: Path, expected: str | None, advice: str) -> None:
    if expected and (found := _sha256(path)) != expected:
        raise ValueError(f"{path} has the sha256 {found}, expected {expected}: {advice}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _recorded(path: Path) -> str | None:
    note = path.with_name(path.name + ".sha256")
    return note.read_text(encoding="utf-8").split()[0] if note.exists() else None


def _record(path: Path, part: Path) -> None:
    path.with_name(path.name + ".sha256").write_text(f"{_sha256(part)}  {path.name}\n", encoding="utf-8")


def download(names: Sequence[str]) -> int:
    """Fetches downloads by name, and unpacks archives; prints each path or error.

    Returns:
        the number of downloads that failed.
    """
    failures = 0
    for name in names:
        get = fetch_folder if DOWNLOADS[name].path.endswith(".tar.gz") else fetch
        try:
            print(f"{name}: {get(DOWNLOADS[name])}")
        except Exception as error:  # the network raises many kinds; the other downloads still get their turn
            print(f"{name}: FAILED: {error}", file=sys.stderr)
            failures += 1
    return failures
