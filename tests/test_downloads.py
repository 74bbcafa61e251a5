"""A server that misbehaves, and what must come of it: the right file, or a clear error and no file."""

import gzip
import hashlib
import io
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.file_download
import pytest
from conftest import disk_full_beyond

from bksdm_utils.data.downloads import DOWNLOADS, Download, fetch, fetch_folder, main

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `files`; `faults` are taken one for each GET: "cut", "no_range", a status, or None."""

    files: dict = {}
    faults: list = []
    asked: list = []

    def do_HEAD(self):
        self.send_response(200 if self.path in self.files else 404)
        self.send_header("Content-Length", str(len(self.files.get(self.path, b""))))
        self.end_headers()

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else None
        self.asked.append(self.headers.get("Range"))
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
    monkeypatch.setattr(Server, "asked", [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # it keeps whole chunks only
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    huggingface_hub.utils.close_session()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    huggingface_hub.utils.close_session()


def test_a_file_is_fetched_once_and_its_checksum_recorded(server, tmp_path):
    download = Download(f"{server}/file.bin", "data/file.bin")
    path = fetch(download, tmp_path)
    assert path.read_bytes() == CONTENT and fetch(download, tmp_path) == path and len(Server.asked) == 1
    assert (tmp_path / "data" / "file.bin.sha256").read_text().split()[0] == SHA256
    assert sorted(p.name for p in path.parent.iterdir()) == ["file.bin", "file.bin.sha256"]


@pytest.mark.parametrize("faults", [["cut"], ["cut", "cut", "cut"], ["cut", "no_range"]])
def test_cut_connections_are_taken_up_again(faults, server, tmp_path):
    Server.faults.extend(faults)
    assert fetch(Download(f"{server}/file.bin", "file.bin", SHA256), tmp_path).read_bytes() == CONTENT
    assert Server.asked[1] == f"bytes={len(CONTENT) // 2}-"


def test_what_came_before_a_failure_is_kept_for_the_next_call(server, tmp_path):
    download = Download(f"{server}/file.bin", "file.bin", SHA256)
    Server.faults.extend(["cut", 500])
    with pytest.raises(OSError):
        fetch(download, tmp_path)
    assert not (tmp_path / "file.bin").exists() and (tmp_path / "file.bin.part").stat().st_size == len(CONTENT) // 2
    assert fetch(download, tmp_path).read_bytes() == CONTENT
    assert Server.asked[-1] == f"bytes={len(CONTENT) // 2}-"


def test_a_missing_file_is_said_to_be_missing(server, tmp_path):
    with pytest.raises(ValueError, match="answers 404"):
        fetch(Download(f"{server}/other.bin", "other.bin"), tmp_path)
    assert not (tmp_path / "other.bin").exists()


def test_a_wrong_checksum_leaves_no_file(server, tmp_path):
    with pytest.raises(ValueError, match="expected 00.*was deleted"):
        fetch(Download(f"{server}/file.bin", "file.bin", "00"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    fetch(Download(f"{server}/file.bin", "file.bin"), tmp_path)
    (tmp_path / "file.bin").write_bytes(b"changed")
    with pytest.raises(ValueError, match="delete .* to fetch it again"):
        fetch(Download(f"{server}/file.bin", "file.bin"), tmp_path)


def test_a_part_of_a_longer_older_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert fetch(Download(f"{server}/file.bin", "file.bin"), tmp_path).read_bytes() == CONTENT


def test_too_little_disk_is_said_before_the_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    with pytest.raises(ValueError, match="Make room"):
        fetch(Download(f"{server}/file.bin", "file.bin", disk_factor=2.0), tmp_path)
    assert Server.asked == [] and "of disk needed" in capsys.readouterr().out


def test_a_disk_that_fills_up_keeps_what_came_and_goes_on_later(server, tmp_path):
    download = Download(f"{server}/file.bin", "file.bin")
    with disk_full_beyond(100_000), pytest.raises(OSError):
        fetch(download, tmp_path)
    assert not (tmp_path / "file.bin").exists()
    assert fetch(download, tmp_path).read_bytes() == CONTENT


def archive(names, cut=False, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 5
            file.addfile(entry, io.BytesIO(b"hello"))
        if link:
            entry = tarfile.TarInfo("pictures/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            file.addfile(entry)
    data = buffer.getvalue()
    return gzip.compress(gzip.decompress(data)[:700]) if cut else data


def test_an_archive_becomes_its_folder(server, tmp_path):
    Server.files["/pictures.tar.gz"] = archive(["pictures/1.jpg", "pictures/metadata.csv"])
    download = Download(f"{server}/pictures.tar.gz", "data/pictures.tar.gz", disk_factor=2)
    folder = fetch_folder(download, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["1.jpg", "metadata.csv"]
    assert fetch_folder(download, tmp_path) == folder and len(Server.asked) == 1


@pytest.mark.parametrize(
    "bad", [{"names": ["../escaped.txt"]}, {"names": ["pictures/a"], "link": "../../../etc/passwd"},
            {"names": ["pictures/a", "pictures/b"], "cut": True}],
)  # fmt: skip
def test_archives_that_are_cut_or_reach_out_are_refused_whole(bad, server, tmp_path):
    Server.files["/pictures.tar.gz"] = archive(**bad)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        fetch_folder(Download(f"{server}/pictures.tar.gz", "data/pictures.tar.gz"), tmp_path)
    assert not (tmp_path / "escaped.txt").exists() and not (tmp_path / "data" / "pictures").exists()
    assert not (tmp_path / "data" / "pictures.part").exists()


def test_the_originals_files_have_their_places():
    assert DOWNLOADS["laion_aes_212k"].url.endswith("improved_aesthetics_6.5plus/preprocessed_212k.tar.gz")
    assert DOWNLOADS["laion_aes_2256k"].url.endswith("improved_aesthetics_6.25plus/preprocessed_2256k.tar.gz")
    assert DOWNLOADS["laion_aes_212k"].path == "data/laion_aes/preprocessed_212k.tar.gz"


def test_the_command_line_goes_on_after_a_failure(server, tmp_path, monkeypatch, capsys):
    good = Download(f"{server}/file.bin", str(tmp_path / "file.bin"))
    bad = Download(f"{server}/other.bin", str(tmp_path / "other.bin"))
    monkeypatch.setattr("bksdm_utils.data.downloads.DOWNLOADS", {"bad": bad, "good": good})
    assert main(["bad", "good"]) == 1
    printed = capsys.readouterr()
    assert "answers 404" in printed.err and "file.bin" in printed.out and (tmp_path / "file.bin").exists()
    with pytest.raises(SystemExit):
        main(["unknown"])
