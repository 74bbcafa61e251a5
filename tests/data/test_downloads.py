"""Downloads from a server with faults: the right file, or a clear error and no file."""

import gzip
import io
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.file_download
import pytest
from conftest import disk_full_beyond

from bksdm_utils.data.downloads import DOWNLOADS, Download, download, fetch, fetch_folder

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(BaseHTTPRequestHandler):
    """Serves `files`; each GET takes one of `faults`: "cut", "no_range", a status, or None."""

    files: dict = {}
    faults: list = []
    ranges: list = []

    def do_HEAD(self):
        self.send_response(200 if self.path in self.files else 404)
        self.send_header("Content-Length", str(len(self.files.get(self.path, b""))))
        self.end_headers()

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else None
        self.ranges.append(self.headers.get("Range"))
        if isinstance(fault, int):
            self.send_error(fault)
            return
        content, start = self.files[self.path], 0
        if self.headers.get("Range") and fault != "no_range":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else rest)
        if fault == "cut":
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "files", {"/file.bin": CONTENT})
    monkeypatch.setattr(Server, "faults", [])
    monkeypatch.setattr(Server, "ranges", [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # it keeps whole chunks only
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    huggingface_hub.utils.close_session()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    huggingface_hub.utils.close_session()


def test_a_file_is_fetched_once(server, tmp_path):
    item = Download(f"{server}/file.bin", "data/file.bin")
    path = fetch(item, tmp_path)
    assert path.read_bytes() == CONTENT and fetch(item, tmp_path) == path and len(Server.ranges) == 1
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("faults", [["cut"], ["cut", "cut", "cut"], ["cut", "no_range"]])
def test_interrupted_downloads_continue(faults, server, tmp_path):
    Server.faults.extend(faults)
    assert fetch(Download(f"{server}/file.bin", "file.bin"), tmp_path).read_bytes() == CONTENT
    assert Server.ranges[1] == f"bytes={len(CONTENT) // 2}-"


def test_the_part_before_a_failure_is_kept_for_the_next_call(server, tmp_path):
    item = Download(f"{server}/file.bin", "file.bin")
    Server.faults.extend(["cut", 500])
    with pytest.raises(OSError):
        fetch(item, tmp_path)
    assert not (tmp_path / "file.bin").exists() and (tmp_path / "file.bin.part").stat().st_size == len(CONTENT) // 2
    assert fetch(item, tmp_path).read_bytes() == CONTENT
    assert Server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"


def test_a_missing_file_is_an_error(server, tmp_path):
    with pytest.raises(ValueError, match="answers 404"):
        fetch(Download(f"{server}/other.bin", "other.bin"), tmp_path)
    assert not (tmp_path / "other.bin").exists()


def test_a_part_longer_than_the_file_is_deleted(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert fetch(Download(f"{server}/file.bin", "file.bin"), tmp_path).read_bytes() == CONTENT


def test_too_little_disk_is_an_error_before_the_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    with pytest.raises(ValueError, match="Make room"):
        fetch(Download(f"{server}/file.bin", "file.bin", disk_factor=2.0), tmp_path)
    assert Server.ranges == [] and "of disk needed" in capsys.readouterr().out


def test_a_full_disk_keeps_the_part_and_continues_later(server, tmp_path):
    item = Download(f"{server}/file.bin", "file.bin")
    with disk_full_beyond(100_000), pytest.raises(OSError):
        fetch(item, tmp_path)
    assert not (tmp_path / "file.bin").exists()
    assert fetch(item, tmp_path).read_bytes() == CONTENT


def archive(names, cut=False, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 5
            file.addfile(entry, io.BytesIO(b"hello"))
        if link:
            entry = tarfile.TarInfo("images/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            file.addfile(entry)
    data = buffer.getvalue()
    return gzip.compress(gzip.decompress(data)[:700]) if cut else data


def test_an_archive_becomes_its_folder(server, tmp_path):
    Server.files["/images.tar.gz"] = archive(["images/1.jpg", "images/metadata.csv"])
    item = Download(f"{server}/images.tar.gz", "data/images.tar.gz", disk_factor=2)
    folder = fetch_folder(item, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["1.jpg", "metadata.csv"]
    assert fetch_folder(item, tmp_path) == folder and len(Server.ranges) == 1


@pytest.mark.parametrize(
    "bad", [{"names": ["../escaped.txt"]}, {"names": ["images/a"], "link": "../../../etc/passwd"},
            {"names": ["images/a", "images/b"], "cut": True}],
)  # fmt: skip
def test_cut_archives_and_paths_outside_unpack_nothing(bad, server, tmp_path):
    Server.files["/images.tar.gz"] = archive(**bad)
    with pytest.raises(ValueError, match="could not be unpacked"):
        fetch_folder(Download(f"{server}/images.tar.gz", "data/images.tar.gz"), tmp_path)
    assert not (tmp_path / "escaped.txt").exists() and not (tmp_path / "data" / "images").exists()
    assert not (tmp_path / "data" / "images.part").exists()


def test_names_lead_to_the_papers_files():
    assert DOWNLOADS["laion_aes_212k"].url.endswith("improved_aesthetics_6.5plus/preprocessed_212k.tar.gz")
    assert DOWNLOADS["laion_aes_2256k"].url.endswith("improved_aesthetics_6.25plus/preprocessed_2256k.tar.gz")
    assert DOWNLOADS["laion_aes_212k"].path == "data/laion_aes/preprocessed_212k.tar.gz"


def test_the_failure_of_one_download_is_counted_and_the_next_continues(server, tmp_path, monkeypatch, capsys):
    good = Download(f"{server}/file.bin", str(tmp_path / "file.bin"))
    bad = Download(f"{server}/other.bin", str(tmp_path / "other.bin"))
    monkeypatch.setattr("bksdm_utils.data.downloads.DOWNLOADS", {"bad": bad, "good": good})
    assert download(["bad", "good"]) == 1
    printed = capsys.readouterr()
    assert "answers 404" in printed.err and "file.bin" in printed.out and (tmp_path / "file.bin").exists()
    with pytest.raises(ValueError, match="unknown.*expected bad, good"):
        download(["unknown"])


def test_a_group_fetches_each_of_its_parts_once(monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr("bksdm_utils.data.downloads._fetch", lambda name: fetched.append(name) or name)
    assert download(["paper-protocol", "coco_captions", "clean-protocol"]) == 0
    assert len(fetched) == len(set(fetched)) == 7 and sum("/" in name for name in fetched) == 1
    with pytest.raises(ValueError, match="paper-protocol"):
        download(["paper"])
