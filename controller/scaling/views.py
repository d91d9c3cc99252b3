"""Functions as the admin API and the dashboard show them: plain JSON values."""

from dataclasses import asdict
from typing import Any

from controller.scaling.entry import Entry
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.replica import Replica
from functions.spec import revision
from runtime.rpc import inference_pb2 as pb
from snapshots.profiles import Profile


def entry_view(entry: Entry) -> dict[str, Any]:
    """Return everything that can be said about a deployed function."""
    build = entry.build
    view: dict[str, Any] = {
        "name": entry.spec.name,
        "revision": revision(entry.spec),
        "backend": entry.backend,
        "served_names": list(entry.spec.served_names),
        "source": entry.spec.model.source,
        "snapshot": entry.snapshot,
        "snapshot_state": str(entry.snapshot_state),
        "build": build
        and {
            "phase": build.phase,
            "done_bytes": build.done_bytes,
            "total_bytes": build.total_bytes,
        },
        "tier": str(Tier.STOPPED),
        "in_flight": 0,
        "queued": 0,
        "replicas": [],
        "last_error": entry.error or (entry.function and entry.function.last_error) or None,
        "spec": entry.spec.to_json(),
    }
    return view if entry.function is None else view | function_view(entry.function)


def function_view(function: Function) -> dict[str, Any]:
    """Return what can be said about a function that has its snapshot."""
    return {
        "tier": str(function.tier),
        "in_flight": function.set.in_flight,
        "queued": function.set.num_queued,
        "replicas": [replica_view(function, replica) for replica in function.set.replicas.values()],
    }


def profile_view(snapshot: str, profile: Profile) -> dict[str, Any]:
    """Return what a snapshot's profile says; of its kernels, only how much they are."""
    return {
        "snapshot": snapshot,
        "key": profile.key,
        "fingerprint": dict(profile.fingerprint),
        "memory": asdict(profile.memory),
        "steps": [asdict(step) for step in profile.steps],
        "kernels": {
            "num_files": len(profile.kernels),
            "size_bytes": sum(file.size_bytes for file in profile.kernels),
        },
        "cold_starts": {tier: asdict(times) for tier, times in profile.cold_starts.items()},
    }


def _profile_use(use: pb.ProfileUse) -> dict[str, Any] | None:
    """Return whether a start could use its snapshot's profile; None before it has said so."""
    if not use.key:
        return None
    return {
        "key": use.key,
        "is_used": use.is_used,
        "reason": use.reason,
        "num_compilations": use.num_compilations,
    }


def replica_view(function: Function, replica: Replica) -> dict[str, Any]:
    """Return what can be said about one replica."""
    link = function.links.get(replica.id)
    idle_s = None
    if replica.state is ReplicaState.READY and replica.in_flight == 0:
        idle_s = round(function.clock.monotonic() - replica.idle_since, 3)
    memory = None if link is None else link.status.memory
    return {
        "id": replica.id,
        "state": str(replica.state),
        "in_flight": replica.in_flight,
        "devices": list(function.homes[replica.id].device_ids)
        if replica.id in function.homes
        else [],
        "idle_s": idle_s,
        "freed_bytes": 0 if link is None else link.freed_bytes,
        "memory": memory
        and {
            "weights_bytes": memory.weights_bytes,
            "kv_cache_bytes": memory.kv_cache_bytes,
            "host_rss_bytes": memory.host_rss_bytes,
            "kept_bytes": memory.kept_bytes,
            "kept_reason": memory.kept_reason,
        },
        "profile": None if link is None else _profile_use(link.status.profile),
        "last_error": None if link is None else link.status.error or None,
        "history": [
            {"state": str(move.target), "reason": move.reason} for move in replica.lifecycle.history
        ],
    }
