"""Times torch's scaled_dot_product_attention for `speed.py`, which runs in another environment.

One JSON object a line on stdin, one answer a line on stdout, until stdin ends:

    {"op": "hello"}                       -> {"version": "2.13.0", "threads": 2}
    {"op": "case", "seq": 2048, …}        -> {"ready": true}       makes the inputs of a `Case`
    {"op": "run"}                         -> {"seconds": 0.084}    one repetition
    whatever fails                        -> {"error": "RuntimeError: …"}

Needs torch and the standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]


def prepare(case: dict[str, Any]) -> Callable[[], object]:
    """One repetition of ``case`` on inputs made here; [B, H, S, D], torch's own layout."""
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch"], case["heads"], case["seq"], case["head_dim"])
    q, k, v, cotangent = (
        torch.randn(shape, generator=generator).to(getattr(torch, case["dtype"])) for _ in range(4)
    )

    def forward() -> torch.Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=case["causal"])

    if not case["backward"]:
        return torch.no_grad()(forward)
    for x in (q, k, v):
        x.requires_grad_()
    return lambda: torch.autograd.grad(forward(), (q, k, v), cotangent)


def seconds(repetition: Callable[[], object]) -> float:
    """Wall-clock time of one repetition."""
    start = time.perf_counter()
    repetition()
    return time.perf_counter() - start


def main() -> None:
    """Answers requests until stdin ends."""
    repetition: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            if op == "hello":
                answer = {"version": torch.__version__, "threads": torch.get_num_threads()}
            elif op == "case":
                repetition = prepare(request)
                answer = {"ready": True}
            else:
                answer = {"seconds": seconds(repetition)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
