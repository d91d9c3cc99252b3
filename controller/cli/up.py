"""`coldspark up`: the controller in the foreground."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.errors import CliError, UsageProblem

if TYPE_CHECKING:
    from controller.settings import Settings


def up(
    host: Annotated[
        str | None, typer.Option(envvar="COLDSPARK_HOST", help="Address to listen on.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(envvar="COLDSPARK_PORT", help="TCP port; 0 picks a free one.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(envvar="COLDSPARK_HOME", help="Snapshots, database, sockets and logs."),
    ] = None,
) -> None:
    """Run the controller until Ctrl-C. COLDSPARK_* variables set the rest."""
    # The whole control plane: 1 s that no other command needs.
    from controller.main import AlreadyRunning, serve
    from controller.store.errors import StoreError

    settings = read_settings(host=host, port=port, home=home)
    try:
        serve(settings)
    except AlreadyRunning as error:
        raise CliError(str(error)) from error
    except StoreError as error:
        raise CliError(
            str(error), hint="docs/guides/operations.md says what is in the database and its place"
        ) from error
    except OSError as error:
        raise CliError(
            f"the controller cannot run at {settings.host}:{settings.port} with "
            f"{str(settings.home)!r}: {error}",
            hint="`coldspark doctor` checks the port and the directory",
        ) from error


def read_settings(**options: Any) -> "Settings":
    """Return the settings in force; options that were given win over the environment."""
    from pydantic import ValidationError  # 0.2 s that most commands do not need

    from controller.settings import PREFIX, load_settings

    given = {name: value for name, value in options.items() if value is not None}
    hint = "docs/reference/settings.md lists every setting"
    try:
        return load_settings(**given)
    except ValidationError as error:
        problems = (
            f"{PREFIX}{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        )
        raise UsageProblem("; ".join(problems), hint=hint) from error
    except ValueError as error:
        raise UsageProblem(str(error), hint=hint) from error
