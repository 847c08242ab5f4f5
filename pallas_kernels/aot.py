"""Compiles for chips that are not there, and reads what the compilers say about it.

libtpu compiles for every TPU and estimates its cycles; JAX's CUDA plugin compiles Triton kernels
to PTX, which ptxas turns into machine code. Neither needs a chip. The compilers take their
settings from the environment when they load, so they run in a process of their own, a `Compiler`;
`worker` is its program. Install them with `pip install pasa-jax[aot]`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.worker import COMPILED, Report
from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.call.backends import choose
from pasa_jax.core.errors import check_choice
from pasa_jax.core.target import find_target

MakeArray = Callable[[Any, str], jax.ShapeDtypeStruct]


def attention(
    array: MakeArray,
    *,
    batch: int = 1,
    queries: int = 1024,
    keys: int | None = None,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    arrays: dict[str, tuple[Any, str]] | None = None,
    schedule: dict[str, Any],
    precision: dict[str, str] | str | None = None,
    gradient: bool = False,
    head_major: bool = False,
    repair: bool = True,
    **keywords: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The public function on a kernel, and its arguments.

    Arguments:
      array: makes an argument of a shape and a type.
      arrays: further array arguments by name: shape and type.
      schedule: the fields of a `Schedule`.
      precision: as the public function takes it, or the fields of a `Precision`.
      gradient: compile the output's pullback of the queries instead: the cotangents of queries,
        keys and values, the forward pass included.
      head_major: operands and output lie [B, N, T, D], as other Pallas kernels take them.
      repair: compile the lax walk too, which repairs a result that is not finite. (It hardly ever
        runs, but a compiler's estimate counts it.) Without it the test is still compiled.
      keywords: of `dot_product_attention`.
    """
    kind = find_target(schedule["target"]).kind
    options: dict[str, Any] = {"implementation": f"pallas_{kind}", "schedule": Schedule(**schedule)}
    if precision is not None:
        options["precision"] = precision if isinstance(precision, str) else Precision(**precision)

    def turned(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2) if head_major else x

    def forward(q: Any, k: Any, v: Any, further: dict[str, Any]) -> Any:
        operands, all_keywords = map(turned, (q, k, v)), further | keywords | options
        if not repair:
            out, others = kernel_alone(kind, *operands, **all_keywords)
            return turned(out), others
        return turned(dot_product_attention(*operands, **all_keywords))

    def pullback(q: Any, k: Any, v: Any, further: dict[str, Any]) -> Any:
        if not repair:
            all_keywords = further | keywords | options
            operands = (turned(q), turned(k), turned(v))
            *found, others = gradient_alone(kind, *operands, **all_keywords)
            return [turned(x) for x in found], others
        out, pull = jax.vjp(partial(forward, further=further), q, k, v)
        return pull(q.astype(out.dtype))

    def operand(length: int, n: int) -> jax.ShapeDtypeStruct:
        shape = (batch, n, length, head_dim) if head_major else (batch, length, n, head_dim)
        return array(shape, dtype)

    kv = (keys or queries, kv_heads or heads)
    args = (operand(queries, heads), operand(*kv), operand(*kv))
    further = {name: array(*x) for name, x in (arrays or {}).items()}
    return pullback if gradient else forward, (*args, further)


def kernel_alone(kind: str, *args: Any, **keywords: Any) -> tuple[jax.Array, Any]:
    """The kernel's own output; its log-sum-exp, and whether something would have to repair it."""
    call = canonical(*args, **keywords)
    chosen = choose(keywords["implementation"], call.operands, call.mask, call.plan)
    module = importlib.import_module(f"pallas_kernels.{kind}")
    wanted = "lse" if keywords.get("return_residual") else "out"
    result, bad = module.kernel(call.operands, call.mask, chosen.plan, wanted=wanted)
    return call.unbatch(result.out), (result.lse, bad)


def gradient_alone(kind: str, *args: Any, **keywords: Any) -> tuple[Any, ...]:
    """As `kernel_alone`, the kernels' own pullback of the queries; the last also has the gradients
    of biases and data.
    """
    call = canonical(*args, **keywords)
    chosen = choose(keywords["implementation"], call.operands, call.mask, call.plan)
    module = importlib.import_module(f"pallas_kernels.{kind}")
    rest = call.operands, call.mask, chosen.plan
    result, bad = module.kernel(*rest, wanted="residuals")
    found = module.backward_kernel(*rest, result, call.operands.query, None)
    gradients = (call.unbatch(x) for x in (found.query, found.key, found.value))
    return *gradients, (found.bias, found.factors, found.data, bad)


class Compiler:
    """A process that holds the compilers. If one crashes, the process is started again.

    Arguments:
      limit: seconds that one compilation may take. (Some take minutes and all of the memory.)

    >>> with Compiler() as compiler:  # doctest: +SKIP
    ...     compiler("pallas_kernels.aot:attention", "tpu_v6e", schedule={"target": "tpu_v6e"})
    """

    def __init__(self, limit: float = 300) -> None:
        self._limit = limit
        self._dump = Path(tempfile.mkdtemp(prefix="pasa_aot_"))
        self._worker: subprocess.Popen[str] | None = None
        self._estimates = True

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        shutil.rmtree(self._dump, ignore_errors=True)

    def __call__(
        self,
        function: str,
        target: str,
        *,
        x64: bool = False,
        estimates: bool = True,
        **arguments: Any,
    ) -> Report:
        """Compiles for ``target`` what ``function`` ("module:name") makes of the arguments.

        It is called with a maker of arguments and returns a function and what to call it with.

        Arguments:
          estimates: whether to ask for cycles, which can take far longer than compiling.
        """
        check_choice("target", target, COMPILED)
        job = {"function": function, "target": target, "x64": x64, "arguments": arguments}
        # The estimator itself may take the process with it.
        for with_cycles in (True, False) if estimates else (False,):
            line = self._ask(job, with_cycles)
            if line:
                return Report(**json.loads(line))
            self._stop()
            if line is None:
                return Report(target, error=f"not compiled within {self._limit:.0f} seconds")
        last_words = (self._dump / "stderr").read_text().strip().splitlines()
        return Report(target, error=f"the compiler crashed: {' '.join(last_words[-3:])}"[:500])

    def _ask(self, job: dict[str, Any], estimates: bool) -> str | None:
        """The worker's answer; "" if it died, None if it took too long."""
        if self._worker is None or self._estimates != estimates:
            self._stop()
            with (self._dump / "stderr").open("w") as stderr:
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "pallas_kernels.worker", str(self._dump)],
                    env=_environment(self._dump, estimates),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            self._estimates = estimates
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            print(json.dumps(job), file=self._worker.stdin, flush=True)
        except BrokenPipeError:
            return ""
        ready, _, _ = select.select([self._worker.stdout], [], [], self._limit)
        return self._worker.stdout.readline() if ready else None

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            with contextlib.suppress(BrokenPipeError), self._worker:
                pass  # closes the pipes and waits
            self._worker = None


def _environment(dump: Path, estimates: bool) -> dict[str, str]:
    paths = [path for path in sys.path if path]  # the worker imports what its caller can
    libtpu = [
        f"--xla_jf_dump_to={dump}/tpu",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final_hlo-static-per.*",
    ]
    if estimates:
        libtpu.append(f"--xla_jf_dump_static_llo_profile_to={dump}/cycles")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        # No metadata server is asked, and several processes may hold the library at once.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(libtpu),
        "XLA_FLAGS": f"--xla_dump_to={dump}/gpu --xla_dump_emitter_re=.*",
    }
