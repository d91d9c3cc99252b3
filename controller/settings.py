"""Settings of one controller, read once from COLDSPARK_* variables and frozen.

A malformed or unknown variable stops the start with its name.
"""

import os
import socket
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
PREFIX = "COLDSPARK_"
CLIENT_ONLY = frozenset({"COLDSPARK_URL", "COLDSPARK_API_KEY", "COLDSPARK_OUTPUT"})


class Settings(BaseSettings):
    """Everything that can be set about a controller."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    home: Path = Field(
        default=Path("~/.coldspark"),
        description="Directory of the snapshots, the database, sockets and logs.",
    )
    host: str = Field(default="127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    require_api_keys: bool = Field(
        default=False, description="Refuse calls without a key; forced on off loopback."
    )
    cluster: str = Field(
        default="local", pattern=r"^[a-z0-9][-a-z0-9]{0,62}$", description="Label on runtimes."
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Largest request body.")
    max_unread_bytes: int = Field(
        default=256 << 20,
        ge=1024,
        description="Bytes of all request bodies that are still being received, together.",
    )
    body_timeout_s: float = Field(default=30.0, gt=0, description="Longest wait for a whole body.")
    max_file_bytes: int = Field(
        default=512 << 20, ge=1024, description="Largest file that can be uploaded."
    )
    max_files_bytes: int = Field(
        default=10 << 30, ge=1024, description="Bytes of all files together, outputs included."
    )
    async_retention_s: float = Field(
        default=86_400.0,
        gt=0,
        description="Seconds that answers to asynchronous requests are kept for their callers.",
    )
    response_retention_s: float = Field(
        default=30 * 86_400.0,
        gt=0,
        description="Seconds that responses are kept for their callers.",
    )
    max_responses_bytes: int = Field(
        default=1 << 30,
        ge=1024,
        description="Bytes of all kept responses together; the oldest go first.",
    )
    max_prompts: int = Field(default=256, ge=1, description="Most prompts in one completion call.")
    heartbeat_s: float = Field(
        default=2.0, gt=0, description="Silence before a waiting stream gets an SSE comment."
    )
    tick_s: float = Field(default=0.25, gt=0, description="Period of the idle and expiry sweep.")
    reconcile_s: float = Field(default=5.0, gt=0, description="Period of the orphan sweep.")
    shutdown_timeout_s: float = Field(
        default=30.0, ge=0, description="Time given to running streams at shutdown."
    )
    stop_runtimes_on_exit: bool = Field(
        default=False, description="Stop runtimes at shutdown; off, the next start adopts them."
    )
    gpu_hour_usd: Decimal = Field(
        default=Decimal("2.50"), ge=0, description="Price of a device-hour nobody holds."
    )
    history_days: int = Field(
        default=90, ge=1, description="Days that requests, cold starts and transitions are kept."
    )
    standby_replicas: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Runtimes kept without a model, imports done, for each backend in use.",
    )
    max_concurrent_starts: int | None = Field(
        default=None,
        ge=1,
        description="Most starts of replicas and standbys at a time; others wait, those without "
        "clients longest. By default half the cores, at least 2. Waking is no start.",
    )
    host_cache_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Memory in which weights of deployed functions are held, pinned for a GPU and "
        "locked for the processor, so that starts need not read the disk; by default a quarter of "
        "the machine's if it has a GPU, else none.",
    )
    park_floor_bytes: int = Field(
        default=2 << 30,
        ge=0,
        description="Available host memory below which replicas on GPUs are stopped instead of "
        "parked deep; 0 for never.",
    )
    min_residency_s: float = Field(
        default=1.0,
        ge=0,
        description="Shortest stay of a ready replica before it is parked to make room for others.",
    )
    device_turn_s: float = Field(
        default=30.0,
        ge=0,
        description="How long a busy replica may serve while another function waits for its place.",
    )
    docker_image: str = Field(
        default="coldspark-runtime:latest", description="Image of the docker backend."
    )
    docker_gpu_access: Literal["toolkit", "devices"] = Field(
        default="toolkit",
        description="How containers get GPUs: from the engine with the NVIDIA Container Toolkit, or "
        "as device files, with the driver's libraries from `docker_gpu_mounts`.",
    )
    docker_gpu_mounts: tuple[Path, ...] = Field(
        default=(),
        description="Directories of this machine, as a JSON list, that containers with GPUs see "
        "read-only at the same place.",
    )

    @property
    def snapshot_store(self) -> Path:
        """The directory of built snapshots."""
        return self.home / "snapshots"

    @property
    def runtimes_dir(self) -> Path:
        """One directory a runtime: socket, log, record."""
        return self.home / "runtimes"

    @property
    def files_dir(self) -> Path:
        """Uploaded files and the outputs of batches."""
        return self.home / "files"

    @property
    def webhook_secret_path(self) -> Path:
        """What the secrets of webhooks are derived from; made at the first start."""
        return self.home / "webhook.secret"

    @property
    def container_kernels_dir(self) -> Path:
        """Compiled kernels of runtimes in containers, which run as another user."""
        return self.home / "kernel-cache-containers"

    @property
    def last_logs_dir(self) -> Path:
        """One file a function: the end of the log of its last runtime that is gone."""
        return self.home / "last-logs"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the embedded database."""
        return f"sqlite:///{self.home / 'coldspark.db'}"


def url_of(host: str, port: int) -> str:
    """Return the URL of a controller; an IPv6 address needs brackets there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """Return the kind of socket that listens at an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def load_settings(**overrides: object) -> Settings:
    """Read settings from the environment; keyword arguments win.

    Raises:
        ValueError: A value is malformed, or a COLDSPARK_* variable is not known.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_ONLY
    unknown = sorted(key for key in os.environ if key.startswith(PREFIX) and key not in known)
    if unknown:
        raise ValueError(f"unknown settings {unknown}; known ones: {sorted(known)}")
    settings = Settings(**overrides)  # type: ignore[arg-type]  # checked by pydantic
    home = settings.home.expanduser().resolve()
    keys_needed = settings.require_api_keys or settings.host not in LOOPBACK_HOSTS
    return settings.model_copy(update={"home": home, "require_api_keys": keys_needed})
