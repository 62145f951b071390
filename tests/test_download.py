"""Downloads: resumed after a cut, used only if size and hash are right, and one line where no source is of use."""

import hashlib
import http.server
import random
import re
import shutil
import socket
import threading
import time
from collections import namedtuple

import pytest

from d3lib.artefacts import locked
from d3lib.cli import main
from d3lib.data import download
from d3lib.data.download import fetch
from d3lib.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
SIZE, MD5 = len(CONTENT), hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Each path is a server with a habit of its own."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        try:
            getattr(self, self.path.strip("/"))(start)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def head(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def ranged(self, start, content=CONTENT, end=None):
        self.head(
            206 if start else 200,
            Content_Length=len(content) - start,
            **({"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}),
        )
        self.wfile.write(content[start:end])

    def good(self, start):
        self.ranged(start)

    def cutting(self, start):
        self.ranged(start, end=start + 100_000)

    def stingy(self, start):
        self.ranged(start, end=start + 10)

    def rangeless(self, _):
        self.ranged(0)

    def rangeless_cutting(self, _):
        self.ranged(0, end=200_000)

    def wrong(self, start):
        self.ranged(start, bytes(SIZE))

    def short(self, start):
        self.ranged(start, CONTENT[:-1])

    def long(self, start):
        self.ranged(start, CONTENT + b"x")

    def endless(self, _):
        self.head(200)
        while True:
            self.wfile.write(CONTENT)

    def unmeasured(self, start):
        self.head(200)
        self.wfile.write(CONTENT)

    def misplaced(self, start):
        self.head(206, Content_Length=SIZE - start, Content_Range=f"bytes {start + 1}-{SIZE}/{SIZE}")
        self.wfile.write(CONTENT[start:])

    def page(self, _):
        self.head(200, Content_Type="text/html", Content_Length=5)
        self.wfile.write(b"sorry")

    def away(self, _):
        self.head(404)

    def broken(self, _):
        self.send_response(500, "out of\x1b[31m order\x07")
        self.end_headers()

    def garbled(self, _):
        self.wfile.write(b"what?\r\n")

    def silent(self, _):
        time.sleep(3)

    def stalling(self, start):
        self.ranged(start, end=start + 10)
        self.wfile.flush()
        time.sleep(3)

    def trickling(self, _):
        self.head(200, Content_Length=SIZE)
        for byte in CONTENT[:100]:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def moved(self, _):
        self.head(302, Location="/good")

    def to_file(self, _):
        self.head(302, Location=f"file://{self.server.secret}")

    def to_ftp(self, _):
        self.head(302, Location="ftp://127.0.0.1/x")

    def to_data(self, _):
        self.head(302, Location="data:,x")

    def circling(self, _):
        self.head(302, Location="/circling")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for name, value in {"TIMEOUT": 1.0, "PAUSE": 0.0, "GAIN": 1000, "WINDOW": 0.5}.items():
        monkeypatch.setattr(download, name, value)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.asked, server.secret = [], tmp_path / "secret"
        server.secret.write_bytes(CONTENT)
        server.at = lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "file.mat"


def part_of(path):
    return path.with_name(path.name + ".part")


def leave_part(path, content):
    path.parent.mkdir(exist_ok=True)
    part_of(path).write_bytes(content)


def refused(path, *urls):
    """The one line that says why there is no file."""
    with pytest.raises(UserError) as caught:
        fetch(urls, path, SIZE, MD5)
    assert not path.exists() and str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ["good", "moved", "rangeless", "cutting", "unmeasured"])
def test_the_file_comes_whole_and_leaves_no_part(server, path, name):
    said = []
    assert fetch([server.at(name)], path, SIZE, MD5, said.append) == path
    assert path.read_bytes() == CONTENT and not part_of(path).exists()
    assert any("0.00 of 0.00 GB" in line for line in said)


def test_after_a_cut_only_what_is_missing_is_asked_for(server, path):
    fetch([server.at("cutting")], path, SIZE, MD5)
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("name", ["good", "rangeless", "unmeasured", "moved"])
def test_a_later_call_goes_on_from_the_part(server, path, name):
    leave_part(path, CONTENT[:123_456])
    fetch([server.at(name)], path, SIZE, MD5)
    assert path.read_bytes() == CONTENT
    assert {wanted for _, wanted in server.asked} == {"bytes=123456-"}


def test_the_next_source_goes_on_from_what_the_one_before_gave(server, path):
    said = []
    fetch([server.at("stingy"), server.at("rangeless_cutting"), server.at("good")], path, SIZE, MD5, said.append)
    assert path.read_bytes() == CONTENT
    assert server.asked[0] == ("/stingy", None) and server.asked[1] == ("/rangeless_cutting", "bytes=10-")
    assert server.asked[-1] == ("/good", "bytes=200000-")
    assert any("cut after 10 of 300000 bytes" in line for line in said)


def test_a_server_without_ranges_that_cuts_does_not_cost_what_is_there(server, path):
    leave_part(path, CONTENT[:250_000])
    assert "cut after 200000 of 300000 bytes" in refused(path, server.at("rangeless_cutting"))
    assert part_of(path).read_bytes() == CONTENT[:250_000] and len(server.asked) == 1


def test_a_complete_part_is_used_without_asking_anyone(server, path):
    leave_part(path, CONTENT)
    assert fetch([server.at("good")], path, SIZE, MD5).read_bytes() == CONTENT
    assert not server.asked


@pytest.mark.parametrize("content", [bytes(SIZE), CONTENT + b"x"], ids=["wrong", "too long"])
def test_a_wrong_complete_part_is_deleted_and_the_file_fetched_anew(server, path, content):
    leave_part(path, content)
    said = []
    fetch([server.at("good")], path, SIZE, MD5, said.append)
    assert path.read_bytes() == CONTENT and server.asked == [("/good", None)]
    assert "not the right file; deleted" in said[0]


def test_with_a_wrong_hash_the_part_is_deleted_and_the_next_source_begins_anew(server, path):
    said = []
    fetch([server.at("wrong"), server.at("good")], path, SIZE, MD5, said.append)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/wrong", None), ("/good", None)]
    assert any("wrong MD5" in line and "deleted" in line for line in said)


def test_with_a_wrong_hash_and_no_other_source_nothing_is_left(server, path):
    assert "wrong MD5, what came was deleted" in refused(path, server.at("wrong"))
    assert not part_of(path).exists()


def test_a_foreign_part_costs_one_call_and_no_more(server, path):
    leave_part(path, bytes(1000))
    assert "wrong MD5" in refused(path, server.at("good"))
    assert fetch([server.at("good")], path, SIZE, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", "another file: 299999 bytes"),
        ("long", "another file: 300001 bytes"),
        ("page", "another file: 5 bytes"),
        ("endless", "more than 300000 bytes"),
        ("away", "HTTP 404"),
        ("broken", "HTTP 500 out of"),
        ("garbled", "what?"),
        ("silent", "timed out"),
        ("stalling", "timed out"),
        ("trickling", "less than 1000 bytes a second"),
        ("stingy", "cut after 10 of 300000 bytes"),
        ("to_file", "HTTP 302"),
        ("to_data", "HTTP 302"),
        ("to_ftp", "unknown url type: ftp"),
        ("circling", "infinite loop"),
    ],
)
def test_what_a_useless_source_did_is_said(server, path, name, words):
    start = time.monotonic()
    assert words in refused(path, server.at(name))
    assert time.monotonic() - start < 10
    assert len(server.asked) < 20
    assert not part_of(path).exists() or CONTENT.startswith(part_of(path).read_bytes())


def test_another_part_of_the_file_than_asked_for_is_not_appended(server, path):
    leave_part(path, CONTENT[:1000])
    assert "another part" in refused(path, server.at("misplaced"))
    assert part_of(path).read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("scheme", ["file://{}", "ftp://127.0.0.1{}", "{}", "data:,x"])
def test_only_http_and_https_are_opened(server, path, scheme):
    assert "unknown url type" in refused(path, scheme.format(server.secret))


def test_when_all_sources_are_down_one_line_names_each_failure(server, path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = refused(path, f"http://127.0.0.1:{port}/x", server.at("away"), f"https://127.0.0.1:{port}/x")
    assert f"http://127.0.0.1:{port}: Connection refused" in said
    assert f"http://127.0.0.1:{server.server_port}: HTTP 404" in said
    assert f"https://127.0.0.1:{port}: Connection refused" in said


def test_the_right_file_is_not_fetched_again_and_another_never_overwritten(server, path):
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch([server.at("good")], path, SIZE, MD5) == path
    for other in (b"thesis", bytes(SIZE)):
        path.write_bytes(other)
        with pytest.raises(UserError, match="move it away"):
            fetch([server.at("good")], path, SIZE, MD5)
        assert path.read_bytes() == other and not server.asked


def test_too_little_room_is_said_before_anything_comes(server, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(SIZE))
    assert "free some space" in refused(path, server.at("good"))
    assert not server.asked


def test_two_processes_do_not_write_the_same_part(server, path):
    with locked(path.with_name(f".{path.name}.lock")):
        with pytest.raises(UserError, match="another process"):
            fetch([server.at("good")], path, SIZE, MD5)
    assert not server.asked


def test_a_disk_that_fails_is_not_blamed_on_the_source(server, path):
    part_of(path).mkdir(parents=True)
    assert "cannot write" in refused(path, server.at("good"), server.at("good"))
    assert len(server.asked) == 1


def test_the_command_downloads_then_prepares(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "LABELLED_URLS", (server.at("away"), server.at("good")))
    monkeypatch.setattr(download.nyu, "BYTES", SIZE)
    monkeypatch.setattr(download.nyu, "MD5", MD5)
    # what comes is no HDF5 file, which preparing is the first to notice
    assert main(["data", "nyu-labeled", "--download", str(tmp_path / "nyu"), "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nyu_depth_v2_labeled.mat: not a sound labelled set" in last
    assert (tmp_path / "nyu" / "nyu_depth_v2_labeled.mat").read_bytes() == CONTENT


def test_the_command_says_what_to_do_when_nyus_server_is_down(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "LABELLED_URLS", (server.at("away"), server.at("silent")))
    assert main(["data", "nyu-labeled", "--download", str(tmp_path / "nyu"), "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "HTTP 404" in last and "timed out" in last
    assert "by hand from https://cs.nyu.edu" in last and "d3lib data nyu-labeled PATH" in last
