"""One attempt to deliver a webhook: to an address that was checked, and no further."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from controller.requests.egress import Address, Target

TIMEOUT_S = 15.0
GONE = 410


class DeliveryFailed(Exception):
    """The receiver did not take the message.

    Args:
        reason: What happened.
        is_final: Whether it says never to try again.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Posts messages.

    Attributes:
        timeout_s: Longest attempt, all of it.
        tls: Whom to trust; None for the usual authorities.
    """

    timeout_s: float = TIMEOUT_S
    tls: ssl.SSLContext | None = None

    async def post(
        self, target: Target, address: Address, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Post a message.

        Raises:
            DeliveryFailed: Nobody there, no answer in time, or one that is not a 2xx.
        """
        url = httpx.URL(
            scheme=target.scheme,
            host=str(address),
            port=target.port,
            raw_path=target.path.encode(),
        )
        sent = {"host": target.authority, "content-type": "application/json", **headers}
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                # No proxy or credentials from the environment, no redirect, no cookie.
                httpx.AsyncClient(
                    trust_env=False, follow_redirects=False, verify=self.tls or True, timeout=None
                ) as client,
                client.stream(
                    "POST",
                    url,
                    content=body,
                    headers=sent,
                    extensions={"sni_hostname": target.host},
                ) as response,
            ):
                status = response.status_code
        except TimeoutError as error:
            raise DeliveryFailed(f"no answer within {self.timeout_s:g} s") from error
        except (httpx.HTTPError, ssl.SSLError, OSError) as error:
            raise DeliveryFailed(f"{type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            raise DeliveryFailed(f"answered with {status}", is_final=status == GONE)
