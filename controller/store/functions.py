"""Deployed functions: immutable revisions, and which of them was current when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, insert, select, update

from controller.store.errors import NotStored
from controller.store.tables import deployments, functions, revisions

_IS_CURRENT = deployments.c.until_us.is_(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedFunction:
    """A function with one of its revisions.

    Attributes:
        created_us: When it was first deployed.
        deployed_us: When the revision became current.
    """

    name: str
    revision: str
    backend: str
    spec: Mapping[str, Any]
    created_us: int
    deployed_us: int


class Functions:
    """The functions table and its history, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(
        self, name: str, *, spec: Mapping[str, Any], revision: str, backend: str, at_us: int
    ) -> bool:
        """Make a revision the current one; says whether anything changed."""
        query = _deployments().where(_IS_CURRENT, functions.c.name == name)
        current = self._connection.execute(query).one_or_none()
        if current is not None and (current.revision, current.backend) == (revision, backend):
            return False
        if current is None:
            self._ensure_function(name, at_us)
        else:
            self._close(name, at_us)
        self._ensure_revision(name, revision, spec, at_us)
        self._connection.execute(
            insert(deployments).values(
                function=name, revision=revision, backend=backend, from_us=at_us
            )
        )
        return True

    def earlier(self, function: DeployedFunction, *, limit: int) -> Sequence[DeployedFunction]:
        """Return what was current before, the newest first, back to when it was deployed anew."""
        query = _deployments().where(functions.c.name == function.name)
        rows = self._connection.execute(query.order_by(deployments.c.id.desc())).all()
        found: list[DeployedFunction] = []
        since_us = function.deployed_us
        for row in rows:
            if row.until_us == since_us and len(found) < limit:
                found.append(_deployed(row))
                since_us = row.from_us
        return found

    def list(self) -> Sequence[DeployedFunction]:
        """Return every deployed function by name."""
        rows = self._connection.execute(
            _deployments().where(_IS_CURRENT).order_by(functions.c.name)
        )
        return [_deployed(row) for row in rows]

    def delete(self, name: str, *, at_us: int) -> None:
        """Mark a function deleted; its history stays.

        Raises:
            NotStored: None of this name is deployed.
        """
        if self._close(name, at_us) == 0:
            raise NotStored(f"no function {name!r} is deployed")

    def _close(self, name: str, at_us: int) -> int:
        is_this = (deployments.c.function == name) & _IS_CURRENT
        return self._connection.execute(
            update(deployments).where(is_this).values(until_us=at_us)
        ).rowcount

    def _ensure_function(self, name: str, at_us: int) -> None:
        known = select(functions.c.name).where(functions.c.name == name)
        if self._connection.execute(known).one_or_none() is None:
            self._connection.execute(insert(functions).values(name=name, created_us=at_us))

    def _ensure_revision(
        self, name: str, revision: str, spec: Mapping[str, Any], at_us: int
    ) -> None:
        is_this = (revisions.c.function == name) & (revisions.c.revision == revision)
        if self._connection.execute(select(revisions.c.revision).where(is_this)).first() is None:
            self._connection.execute(
                insert(revisions).values(
                    function=name, revision=revision, spec=dict(spec), created_us=at_us
                )
            )


def _deployments() -> Select[Any]:
    return (
        select(
            functions.c.name,
            functions.c.created_us,
            deployments.c.revision,
            deployments.c.backend,
            deployments.c.from_us,
            deployments.c.until_us,
            revisions.c.spec,
        )
        .join_from(functions, deployments, deployments.c.function == functions.c.name)
        .join(
            revisions,
            (revisions.c.function == deployments.c.function)
            & (revisions.c.revision == deployments.c.revision),
        )
    )


def _deployed(row: Row[Any]) -> DeployedFunction:
    return DeployedFunction(
        name=row.name,
        revision=row.revision,
        backend=row.backend,
        spec=row.spec,
        created_us=row.created_us,
        deployed_us=row.from_us,
    )
