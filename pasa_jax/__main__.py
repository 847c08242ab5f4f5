"""The command line: `python -m pasa_jax demo | accuracy | explain | inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit('The command line needs typer and rich: pip install "pasa-jax[cli]"')

import jax
import jax.numpy as jnp

from pasa_jax import Schedule
from pasa_jax import explain as explain_call

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Output = Annotated[Path, typer.Option(help="Folder for the figures and the JSON.")]


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=64, max=4096, help="Length of the text.")] = 1024,
    output: Output = Path("out"),
) -> None:
    """A real language model under every scheme of attention, and the biased benchmark."""
    from pasa_jax.evidence.demo import main

    main(tokens, output)


@app.command()
def accuracy(
    output: Output = Path("out"),
    heads: Annotated[int, typer.Option(min=1)] = 8,
    seq: Annotated[int, typer.Option(min=128)] = 1280,
    quick: Annotated[bool, typer.Option(help="Every fifth case.")] = False,
) -> None:
    """Every scheme against float64 on the paper's biased data."""
    from pasa_jax.evidence.accuracy import main

    main(output, heads, seq, quick)


@app.command()
def explain(
    batch: int = 1,
    query_length: int = 1024,
    key_length: int = 1024,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "float16",
    shift: str = "auto",
    precision: Annotated[str | None, typer.Option(help="Default: the dtype's.")] = None,
    target: Annotated[str | None, typer.Option(help="A chip to follow; default: this one.")] = None,
    causal: bool = False,
) -> None:
    """Which implementation, schedule and shift a call would use, and why not others."""
    schedule = target and Schedule.for_target(target, head_dim=head_dim, dtype=dtype)
    q = jax.ShapeDtypeStruct((batch, query_length, heads, head_dim), jnp.dtype(dtype))
    k = jax.ShapeDtypeStruct((batch, key_length, kv_heads, head_dim), jnp.dtype(dtype))
    told = explain_call(
        q, k, k, is_causal=causal, shift=shift, precision=precision, schedule=schedule or None
    )
    typer.echo(told)


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face directory, a .gguf file, smollm2 or minilm.")
    ],
    text: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What the model reads.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="How many of its tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = "float32",
    error_rows: Annotated[
        int, typer.Option(min=0, help="Queries of a call to measure errors on; 0: none.")
    ] = 64,
    rows: Annotated[int, typer.Option(min=1, help="Calls in the table.")] = 20,
    output: Output = Path("out"),
) -> None:
    """Which heads of a model overflow in 16 bits, and what to do: a table, HTML and JSON."""
    from pasa_jax.diagnostics._command import main

    main(
        source,
        text,
        tokens=tokens,
        dtype=dtype,
        error_rows=error_rows,
        rows=rows,
        output=output,
    )


def main() -> None:
    """Runs a command; a wrong call or a missing extra is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, ModuleNotFoundError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
