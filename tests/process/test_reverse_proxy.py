"""The reverse proxy of docs/http.md passes on what signatures need."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from archiver.inbound import signatures
from archiver.settings import Settings
from tests.support.payloads import WEBHOOK, created
from tests.support.ports import free_port
from tests.support.receivers import serving
from tests.support.versions import on_one_version
from tests.support.waiting import until

DOCUMENT = Path(__file__).parents[2] / "docs" / "http.md"
NGINX = [path for path in (shutil.which("nginx"), "/usr/sbin/nginx") if path and Path(path).exists()][:1]
SECRET = "a secret of sixteen characters and more"
CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def documented(port: int) -> str:
    """The `location` of the documentation, before a receiver at this port."""
    (location,) = re.findall(r"```\n(location = .*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "http://127.0.0.1:8000" in location
    return str(location).replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@contextmanager
def proxying(nginx: str, location: str, folder: Path) -> Iterator[int]:
    """nginx at a free port, which is not that of its scheme."""
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port, location=location))
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(configuration)], stderr=subprocess.PIPE)
    try:
        until(lambda: _listens(port) or process.poll() is not None, "nginx listens")
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=240)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@on_one_version
@pytest.mark.parametrize("nginx", NGINX)
def test_a_signature_over_the_url_passes_the_documented_proxy_on_any_port(
    nginx: str, database_url: str, tmp_path: Path
) -> None:
    settings = {
        "ARCHIVER_WEBHOOK_SCHEME": "hmac",
        "ARCHIVER_WEBHOOK_SECRETS": SECRET,
        "ARCHIVER_HMAC_TEMPLATE": "{method} {url}\n{timestamp}.{body}",
    }
    signer = signatures.verifier(Settings.model_validate(settings))
    body = created("behind a proxy")
    with (
        serving(database_url, **settings) as receiver,
        proxying(nginx, documented(int(receiver.url.rpartition(":")[2])), tmp_path) as port,
    ):
        url = f"http://127.0.0.1:{port}{WEBHOOK}"
        headers = signer.sign(body, time.time(), "m1", "POST", url)
        reply = httpx2.post(url, content=body, headers=headers, timeout=120)
        assert (reply.status_code, reply.json()["status"]) == (200, "stored")
        tampered = httpx2.post(url.replace("127.0.0.1", "localhost"), content=body, headers=headers, timeout=120)
        assert tampered.status_code == 401
