"""`python -m pallas_kernels`: tunes the schedules of a chip."""

from pathlib import Path
from typing import Annotated

import typer

from pallas_kernels.tune import tune
from pasa_jax.core.schedule import TUNED

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """PASA's Pallas kernels."""


@app.command("tune")
def tune_command(
    target: Annotated[str, typer.Option(help="The chip, as pasa_jax.target names it.")],
    output: Annotated[Path, typer.Option(help="The folder for <target>.json.")] = TUNED,
    only: Annotated[str, typer.Option(help="Measure shapes whose name contains this.")] = "",
) -> None:
    """Measures schedules: by time on the chip itself, else by the TPU compiler's cycles."""
    try:
        path = tune(target, output, only, typer.echo)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
