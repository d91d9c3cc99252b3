"""One attempt: to the address that was checked, as the host that was asked for."""

import asyncio
import ipaddress
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from controller.requests.egress import parse_target
from controller.requests.sender import DeliveryFailed, Sender

LOOPBACK = ipaddress.ip_address("127.0.0.1")
HOST = "hooks.example.com"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a certificate for the host, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST}", "-out", str(certificate)]
    subprocess.run([*command, "-keyout", str(key)], check=True, capture_output=True)
    return certificate, key


async def listen(tls: ssl.SSLContext) -> tuple[asyncio.Server, int, list[str]]:
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    return server, server.sockets[0].getsockname()[1], heads


async def test_certificate_must_be_the_hosts_although_an_address_is_connected_to(
    certificate: tuple[Path, Path],
) -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*certificate)
    ours = ssl.create_default_context(cafile=str(certificate[0]))
    server, port, heads = await listen(theirs)
    sender = Sender(timeout_s=5, tls=ours)
    good = parse_target(f"https://{HOST}:{port}/a?b")
    await sender.post(good, LOOPBACK, {"webhook-id": "1"}, b"{}")
    (head,) = heads
    assert head.startswith("POST /a?b HTTP/1.1\r\n")
    assert f"host: {HOST}:{port}" in head.lower()
    other = parse_target(f"https://other.example.com:{port}/")
    with pytest.raises(DeliveryFailed, match="certificate"):
        await sender.post(other, LOOPBACK, {}, b"{}")
    with pytest.raises(DeliveryFailed, match="certificate"):
        await Sender(timeout_s=5).post(good, LOOPBACK, {}, b"{}")  # nobody has signed it
    server.close()
    await server.wait_closed()


async def test_nobody_there_is_a_failure() -> None:
    with pytest.raises(DeliveryFailed, match="ConnectError"):
        await Sender().post(parse_target("http://localhost:9/"), LOOPBACK, {}, b"{}")


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    received = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        received.set()
        writer.write(b"HTTP/1.1 204 x\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await Sender().post(parse_target(f"http://localhost:{port}/"), LOOPBACK, {}, b"{}")
    assert received.is_set()
    server.close()
    await server.wait_closed()
