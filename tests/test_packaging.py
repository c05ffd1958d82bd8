"""Build of Detectron2's wheel in ``packaging/detectron2``.

Only the tests of the real archive need a network; they are skipped without one.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from email.message import Message
from pathlib import Path

import detectron2_build
import pytest
from detectron2_build import index, source, stand_in
from detectron2_build.errors import PackagingError
from detectron2_build.patches import PATCHES, Patch, apply_patches
from detectron2_build.wheel import WHEEL_NAME, write_wheel

FILENAME = source.FILENAME


def make_archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{path}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


# --- repairs ------------------------------------------------------------------------------------


def test_patch_replaces_every_expected_occurrence():
    files = {"a.py": "np.bool) np.bool) np.bool_)"}
    patched = apply_patches(files, (Patch("a.py", "renamed", "np.bool)", "bool)", 2),))
    assert patched == {"a.py": "bool) bool) np.bool_)"}
    assert files == {"a.py": "np.bool) np.bool) np.bool_)"}


@pytest.mark.parametrize("text", ["nothing of the kind", "old\nold\n"])
def test_patch_without_its_target_raises_one_line(text):
    with pytest.raises(PackagingError) as failure:
        apply_patches({"a.py": text}, (Patch("a.py", "it was renamed", "old\n", "new\n"),))
    message = str(failure.value)
    assert "a.py" in message and "it was renamed" in message and "expected 1" in message
    assert "\n" not in message


def test_patch_of_a_missing_file_is_named():
    with pytest.raises(PackagingError, match="b.py.*no such file"):
        apply_patches({"a.py": ""}, (Patch("b.py", "why", "old", "new"),))


# --- the archive --------------------------------------------------------------------------------


def test_only_detectron2s_own_files_are_taken_from_the_archive():
    archive = make_archive(
        {
            "LICENSE": "the licence",
            "setup.py": "raise SystemExit('executed')",
            "detectron2/__init__.py": "x = 1\n",
            "detectron2/model_zoo/configs/a.yaml": "A: 1\n",
            "projects/PointRend/point_rend/__init__.py": "y = 2\n",
            "tools/train_net.py": "",
            "../../outside.py": "",
        }
    )
    files, licence = source.read_files(archive)
    assert files == {
        "detectron2/__init__.py": "x = 1\n",
        "detectron2/model_zoo/configs/a.yaml": "A: 1\n",
        "detectron2/projects/point_rend/__init__.py": "y = 2\n",
    }
    assert licence == "the licence"


def test_another_archive_is_refused_in_one_line(tmp_path, monkeypatch):
    wrong = tmp_path / FILENAME
    wrong.write_bytes(b"something else")
    monkeypatch.setenv(source.SDIST_VARIABLE, str(wrong))
    with pytest.raises(SystemExit) as stop:
        detectron2_build.build_wheel(tmp_path)
    message = str(stop.value)
    assert str(wrong) in message and "\n" not in message
    assert hashlib.sha256(b"something else").hexdigest() in message and source.SHA256 in message
    assert not list(tmp_path.glob("*.whl"))


def test_an_absent_archive_is_named():
    with pytest.raises(PackagingError, match="DETECTRON2_SDIST=/none cannot be read"):
        source.read_archive({source.SDIST_VARIABLE: "/none"})


# --- the index ----------------------------------------------------------------------------------

PAGE = "https://index.example/simple/detectron2-cdo/"
HTML = (
    b"<!DOCTYPE html><html><body>"
    b'<a href="../../files/other-0.4.tar.gz#sha256=00">other-0.4.tar.gz</a>'
    b'<a data-requires-python="&gt;=3.6" href="../../files/d.tar.gz?key=1&amp;b=2#sha256=00">'
    b" detectron2-cdo-0.5.tar.gz </a></body></html>"
)


def answer(body: bytes, content_type: str, url: str = PAGE) -> index.Answer:
    return index.Answer(body, content_type, url)


def test_html_page_is_read():
    url = index.find_file(answer(HTML, "text/html; charset=utf-8"), FILENAME)
    assert url == "https://index.example/files/d.tar.gz?key=1&b=2"


def test_html_base_moves_relative_links():
    page = b'<base href="https://mirror.example/x/"><a href="f">' + FILENAME.encode() + b"</a>"
    assert index.find_file(answer(page, "text/html"), FILENAME) == "https://mirror.example/x/f"


def test_json_page_is_read():
    files = [
        {"filename": "other-0.4.tar.gz", "url": "/files/o", "hashes": {}},
        {"filename": FILENAME, "url": "/files/d.tar.gz", "hashes": {"sha256": "00"}},
    ]
    page = json.dumps({"name": "detectron2-cdo", "files": files}).encode()
    url = index.find_file(answer(page, "application/vnd.pypi.simple.v1+json"), FILENAME)
    assert url == "https://index.example/files/d.tar.gz"


@pytest.mark.parametrize(
    ("page", "content_type"), [(b"<html></html>", "text/html"), (b'{"files": []}', "x/v1+json")]
)
def test_page_without_the_file(page, content_type):
    assert index.find_file(answer(page, content_type), FILENAME) is None


def test_settings_of_pip():
    listing = (
        ":env:.cert='/ignored.pem'\n"
        "global.index-url='https://a.example/simple'\n"
        "install.index-url='https://b.example/simple'\n"
        "global.extra-index-url='https://c.example/simple file:///d/simple'\n"
        "global.proxy='http://proxy.example:8080'\n"
        "freeze.index-url='https://never.example'\n"
    )
    settings = index.parse_settings(listing, {"PIP_CERT": "/ca.pem"})
    assert settings == index.PipSettings(
        ("https://b.example/simple", "https://c.example/simple", "file:///d/simple"),
        "/ca.pem",
        "http://proxy.example:8080",
    )


def test_settings_without_pip():
    assert index.parse_settings("", {}) == index.PipSettings()
    environ = {"PIP_INDEX_URL": "https://a.example/simple", "REQUESTS_CA_BUNDLE": "/ca.pem"}
    assert index.parse_settings("", environ) == index.PipSettings(
        ("https://a.example/simple",), "/ca.pem"
    )


def test_unreadable_certificates_are_named(tmp_path):
    with pytest.raises(PackagingError, match=r"absent\.pem.*PIP_CERT"):
        index.build_opener(index.PipSettings(cert=str(tmp_path / "absent.pem")))


@pytest.fixture
def served(monkeypatch):
    """Serve a package index; yield its pages by path, the requests it got, and its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            status, body = pages.get(self.path, [(404, b"")])[0]
            if len(pages.get(self.path, [])) > 1:
                pages[self.path].pop(0)
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    pages: dict[str, list[tuple[int, bytes]]] = {}
    seen: list[tuple[str, str | None]] = []
    monkeypatch.setattr(index.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield pages, seen, f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_tries_again_and_goes_on_to_the_next_index(served, monkeypatch):
    pages, seen, host = served
    link = f'<a href="/files/d">{FILENAME}</a>'.encode()
    pages["/second/detectron2-cdo/"] = [(503, b""), (200, link)]
    pages["/files/d"] = [(200, b"archive")]
    indexes = (f"http://{host}/first", f"http://us%40er:pass@{host}/second/")
    monkeypatch.setattr(index, "pip_settings", lambda: index.PipSettings(indexes))

    data, url = index.download("detectron2-cdo", FILENAME)

    login = "Basic " + base64.b64encode(b"us@er:pass").decode()
    assert data == b"archive" and url == f"http://{host}/files/d"
    assert seen[:3] == [
        ("/first/detectron2-cdo/", None),
        ("/second/detectron2-cdo/", login),
        ("/second/detectron2-cdo/", login),
    ]


def test_missing_file_raises_one_line_without_passwords(served, monkeypatch):
    pages, _, host = served
    pages["/b/detectron2-cdo/"] = [(200, b"<html></html>")]
    indexes = (f"http://user:secret@{host}/a", f"http://{host}/b")
    monkeypatch.setattr(index, "pip_settings", lambda: index.PipSettings(indexes))
    with pytest.raises(PackagingError) as failure:
        source.read_archive({})
    message = str(failure.value)
    assert f"{host}/a/detectron2-cdo/: Not Found" in message
    assert f"{host}/b/detectron2-cdo/: not listed" in message
    assert "DETECTRON2_SDIST" in message
    assert "secret" not in message and "\n" not in message


def test_an_index_in_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "simple" / "detectron2-cdo"
    folder.mkdir(parents=True)
    (folder / FILENAME).write_bytes(b"archive")
    (folder / "index.html").write_text(f'<a href="{FILENAME}">{FILENAME}</a>')
    indexes = ((tmp_path / "simple").as_uri(),)
    monkeypatch.setattr(index, "pip_settings", lambda: index.PipSettings(indexes))
    assert index.download("detectron2-cdo", FILENAME)[0] == b"archive"


# --- the wheel ----------------------------------------------------------------------------------


def check_record(path: Path) -> None:
    """Check that RECORD has every file of the wheel once, with its hash and size."""
    with zipfile.ZipFile(path) as wheel:
        assert wheel.testzip() is None
        names = wheel.namelist()
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = [row.rsplit(",", 2) for row in wheel.read(record).decode().splitlines()]
        assert sorted(row[0] for row in rows) == sorted(names) and len(set(names)) == len(names)
        for name, digest, size in rows:
            if name == record:
                assert (digest, size) == ("", "")
                continue
            data = wheel.read(name)
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={sha256}", str(len(data)))


def wheel_metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        message = Message()
        for line in wheel.read(name).decode().splitlines():
            key, _, value = line.partition(": ")
            message[key] = value
    return message


def test_wheel_is_valid_and_the_same_every_time(tmp_path):
    files = {"detectron2/b.py": "b = 'ü'\n", "detectron2/__init__.py": ""}
    written = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        assert write_wheel(folder, files, "the licence") == WHEEL_NAME
        check_record(folder / WHEEL_NAME)
        written.append((folder / WHEEL_NAME).read_bytes())
    assert written[0] == written[1]

    metadata = wheel_metadata(tmp_path / "1" / WHEEL_NAME)
    assert metadata["Name"] == "detectron2"
    assert WHEEL_NAME.startswith(f"detectron2-{metadata['Version']}-")
    requires = metadata.get_all("Requires-Dist")
    assert "black" not in " ".join(requires) and "yacs>=0.1.8" in requires


def test_metadata_does_not_need_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv(source.SDIST_VARIABLE, "/none")
    folder = tmp_path / detectron2_build.prepare_metadata_for_build_wheel(tmp_path)
    assert {path.name for path in folder.iterdir()} >= {"METADATA", "WHEEL"}


def test_sdist_holds_the_backend(tmp_path):
    name = detectron2_build.build_sdist(tmp_path)
    with tarfile.open(tmp_path / name) as archive:
        paths = {member.name.partition("/")[2] for member in archive}
    assert {"pyproject.toml", "detectron2_build/__init__.py"} <= paths


def test_stand_in_names_the_missing_operator():
    assert not hasattr(stand_in, "COCOevalEvaluateImages")
    with pytest.raises(AttributeError, match="_C.nms_rotated is a compiled operator"):
        _ = stand_in.nms_rotated


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    try:
        archive = source.read_archive()
    except PackagingError as error:
        pytest.skip(str(error))
    path = folder / FILENAME
    path.write_bytes(archive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(source.SDIST_VARIABLE, str(path))
        return folder / detectron2_build.build_wheel(folder)


def test_real_wheel_has_no_removed_names(real_wheel):
    check_record(real_wheel)
    removed = re.compile(r"pkg_resources|\bnp\.(bool|int|float|str|object)\b|Image\.LINEAR")
    with zipfile.ZipFile(real_wheel) as wheel:
        names = set(wheel.namelist())
        for name in (name for name in names if name.endswith(".py")):
            text = wheel.read(name).decode()
            compile(text, name, "exec")
            code = "\n".join(line.partition("#")[0] for line in text.splitlines())
            assert not removed.search(code), name
    assert {patch.file for patch in PATCHES} <= names
    assert "detectron2/_C.py" in names and "detectron2/projects/deeplab/__init__.py" in names


def test_real_wheel_imports_and_has_the_model_zoo(real_wheel, tmp_path):
    with zipfile.ZipFile(real_wheel) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from detectron2 import _C, model_zoo\n"
        "from detectron2.evaluation.coco_evaluation import HAS_FAST_EVAL\n"
        "print(model_zoo.get_config_file('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml'))\n"
        "print(HAS_FAST_EVAL, _C.__file__)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    config, evaluator = result.stdout.splitlines()
    assert Path(config).is_file() and Path(config).is_relative_to(tmp_path)
    assert evaluator == f"False {tmp_path / 'detectron2' / '_C.py'}"
