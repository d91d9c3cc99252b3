import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.requests.egress import (
    Address,
    EgressRefused,
    Target,
    allowed_target,
    is_public,
    parse_target,
    reachable,
    system_resolve,
)

ALLOWED = ("https://hooks.example.com/answers/", "http://10.0.0.5:8080")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/answers",
        "https://hooks.example.com/answers/",
        "https://hooks.example.com/answers/a/b?c=d&e",
        "https://HOOKS.example.COM/answers/x",
        "https://hooks.example.com:443/answers/x",
        "https://hooks.example.com./answers/x",
        "http://10.0.0.5:8080/anything",
        "http://10.0.0.5:8080",
    ],
)
def test_what_is_below_a_prefix_is_allowed(url: str) -> None:
    assert allowed_target(url, ALLOWED).host in ("hooks.example.com", "10.0.0.5")


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/answers/",
        "https://hooks.example.com/",
        "https://hooks.example.com/answersX",
        "https://hooks.example.com/answers/../admin",
        "https://hooks.example.com/answers/%2e%2e/admin",
        "https://hooks.example.com/answers/..%2fadmin",
        "https://hooks.example.com/answers/%2E./admin",
        "https://hooks.example.com:444/answers/",
        "https://hooks.example.com.evil.org/answers/",
        "https://evil.org/https://hooks.example.com/answers/",
        "https://hooks.example.com@evil.org/answers/",
        "https://evil.org#@hooks.example.com/answers/",
        "https://evil.org\\@hooks.example.com/answers/",
        "https://hooks.example.com\t/answers/",
        "https://hooks.example.com /answers/",
        "https://hooks.example.com/answers/\r\nHost: evil.org",
        "https://hooks.ex\u0430mple.com/answers/",  # a Cyrillic letter
        "http://10.0.0.5:8081/",
        "http://167772165:8080/",
        "file:///etc/passwd",
        "gopher://10.0.0.5:8080/",
        "//hooks.example.com/answers/",
        "https:///answers/",
        "https://[::1/answers/",
        "https://hooks.example.com:99999/answers/",
        "https://hooks.example.com:0/answers/",
        "https://hooks.example.com/answers/" + "x" * 2048,
        "",
    ],
)
def test_everything_else_is_refused(url: str) -> None:
    with pytest.raises(EgressRefused):
        allowed_target(url, ALLOWED)


def test_nothing_is_allowed_unless_the_spec_says_so() -> None:
    with pytest.raises(EgressRefused, match=r"webhooks\.allow"):
        allowed_target("https://example.com/", ())


@given(st.text(max_size=60))
def test_no_text_at_all_gets_past_the_list(text: str) -> None:
    for url in (text, f"https://{text}", f"https://hooks.example.com{text}"):
        try:
            target = allowed_target(url, ALLOWED[:1])
        except EgressRefused:
            continue
        assert (target.scheme, target.host, target.port) == ("https", "hooks.example.com", 443)
        assert target.path.partition("?")[0].startswith("/answers")
        assert ".." not in target.path.partition("?")[0].split("/")


@pytest.mark.parametrize(
    ("url", "expected", "authority"),
    [
        ("https://a.b", Target(scheme="https", host="a.b", port=443, path="/"), "a.b"),
        (
            "http://[::1]:81/p?q",
            Target(scheme="http", host="::1", port=81, path="/p?q"),
            "[::1]:81",
        ),
    ],
)
def test_url_is_taken_apart(url: str, expected: Target, authority: str) -> None:
    assert parse_target(url) == expected
    assert expected.authority == authority


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


def resolver(*addresses: str) -> "Resolver":
    return Resolver([ipaddress.ip_address(address) for address in addresses])


class Resolver:
    """Gives a host the addresses it was told."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        return self.addresses


TARGET = parse_target("https://hooks.example.com/")


async def test_one_address_inside_spoils_the_host() -> None:
    with pytest.raises(EgressRefused, match=r"10\.0\.0\.1, which is not public"):
        await reachable(TARGET, allow_private=False, resolve=resolver("93.184.216.34", "10.0.0.1"))
    found = await reachable(TARGET, allow_private=True, resolve=resolver("10.0.0.1"))
    assert str(found) == "10.0.0.1"
    found = await reachable(TARGET, allow_private=False, resolve=resolver("93.184.216.34"))
    assert str(found) == "93.184.216.34"


async def test_host_without_an_address_is_refused() -> None:
    with pytest.raises(EgressRefused, match="no address"):
        await reachable(TARGET, allow_private=True, resolve=resolver())
    with pytest.raises(EgressRefused, match="cannot be found"):
        await system_resolve("no-such-host.invalid", 443)


async def test_numbers_of_any_notation_are_seen_for_what_they_are() -> None:
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "::1"):
        for address in await system_resolve(host, 80):
            assert not is_public(address), host
