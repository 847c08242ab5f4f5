"""The accuracy benchmark of docs/algorithm.md, section 7: `python benchmarks/accuracy.py --help`.

The same as `python -m pasa_jax accuracy`; the measuring itself is `pasa_jax.evidence.accuracy`.
"""

from pathlib import Path

import typer

from pasa_jax.evidence.accuracy import main


def cli(output: Path = Path("out"), heads: int = 8, seq: int = 1280, quick: bool = False) -> None:
    """Prints the tables and writes accuracy.json and accuracy.png into OUTPUT."""
    main(output, heads, seq, quick)


if __name__ == "__main__":
    typer.run(cli)
