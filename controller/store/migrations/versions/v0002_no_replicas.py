"""No table of replicas: the backends know what runs.

Revision: 0002, after 0001.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.drop_table("replicas")
