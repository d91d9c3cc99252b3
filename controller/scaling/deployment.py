"""From an accepted spec and a built snapshot to what a runtime is told."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from controller.errors import InvalidSpec
from controller.scaling.embedding import Pooling, pooling_of
from controller.scaling.placement import Demand, demand_of
from functions.spec import FunctionSpec, revision
from snapshots.errors import SnapshotError
from snapshots.manifest import Manifest, rank_path
from snapshots.profiles import read_profiles
from snapshots.store import MANIFEST_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One accepted revision of a function, with what it needs to run.

    Attributes:
        spec: The revision's spec.
        revision: Its content hash.
        backend: Name of the backend that starts its runtimes.
        snapshot: Directory name of the built snapshot, name@digest12.
        runtime_hash: Hash of what a running runtime cannot change.
        max_model_len: Longest prompt plus output, in tokens.
        pooling: How it embeds; None for one that generates.
        demand: What each replica needs of its devices.
        weight_files: Size of each file that a load reads, in bytes, by path.
        reload_s: Seconds that bringing a replica up took earlier, by the tier it came from.
    """

    spec: FunctionSpec
    revision: str
    backend: str
    snapshot: str
    runtime_hash: str
    max_model_len: int
    demand: Demand
    pooling: Pooling | None = None
    weight_files: Mapping[str, int] = field(default_factory=dict)
    reload_s: Mapping[str, float] = field(default_factory=dict)


def deployment_of(spec: FunctionSpec, backend: str, snapshot: Path) -> Deployment:
    """Join a spec with its snapshot directory.

    Raises:
        InvalidSpec: The spec asks for more context, or another task, than the model has, or the
            snapshot does not say what it has.
    """
    limit = _context_length(snapshot)
    pooling = pooling_of(spec, snapshot)
    usual = limit if pooling is None else min(limit, pooling.max_tokens or limit)
    max_model_len = spec.model.max_model_len or usual
    if max_model_len > limit:
        raise InvalidSpec(
            f"model.max_model_len is {max_model_len} and the model's own limit is {limit}; lower "
            "it, or leave it out to take the limit"
        )
    return Deployment(
        spec=spec,
        revision=revision(spec),
        backend=backend,
        snapshot=snapshot.name,
        runtime_hash=_runtime_hash(spec, backend, snapshot.name, pooling),
        max_model_len=max_model_len,
        pooling=pooling,
        demand=demand_of(
            spec,
            lambda: _weights_bytes(snapshot),
            working_bytes=None if pooling is None else _working_bytes(spec, pooling, max_model_len),
        ),
        weight_files=_weight_files(snapshot, spec.engine.tensor_parallel_size),
        reload_s=_reload_s(snapshot, on_gpu=spec.resources.gpus > 0),
    )


def _reload_s(snapshot: Path, *, on_gpu: bool) -> dict[str, float]:
    """Return what the newest profile says of such a device; only a runtime knows if it fits."""
    for profile in read_profiles(snapshot):
        if ("compute capability" in profile.fingerprint) == on_gpu:
            return {tier: times.total_s for tier, times in profile.cold_starts.items()}
    return {}


def _weight_files(snapshot: Path, tensor_parallel_size: int) -> dict[str, int]:
    paths = [snapshot / rank_path(tensor_parallel_size, n) for n in range(tensor_parallel_size)]
    return {str(path): path.stat().st_size for path in paths if path.exists()}


def _working_bytes(spec: FunctionSpec, pooling: Pooling, max_model_len: int) -> int:
    """Return what the largest step of an engine that embeds takes beside the weights."""
    num_tokens = max(spec.engine.max_num_batched_tokens, max_model_len)
    return num_tokens * pooling.bytes_per_token


def _weights_bytes(snapshot: Path) -> int:
    try:
        manifest = Manifest.from_json((snapshot / MANIFEST_FILE).read_text())
    except (OSError, SnapshotError) as error:
        raise InvalidSpec(f"the snapshot {snapshot.name!r} is not usable: {error}") from error
    return sum(rank.size_bytes for rank in manifest.ranks)


def _context_length(snapshot: Path) -> int:
    try:
        config = json.loads((snapshot / "config.json").read_text())
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSpec(
            f"the config.json of snapshot {snapshot.name!r} has no usable max_position_embeddings: "
            f"{error!r}; build the snapshot again"
        ) from error


def _runtime_hash(spec: FunctionSpec, backend: str, snapshot: str, pooling: Pooling | None) -> str:
    meaning = {
        "backend": backend,
        "snapshot": snapshot,
        "max_model_len": spec.model.max_model_len,
        "dtype": spec.model.dtype,
        "engine": spec.engine.model_dump(mode="json"),
        "resources": spec.resources.model_dump(mode="json"),
    }
    if pooling is not None:
        meaning["pooling"] = {"mode": pooling.mode, "normalize": pooling.normalize}
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
