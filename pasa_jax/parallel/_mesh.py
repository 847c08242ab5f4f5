"""`attention_fn`: attention of whole arrays over a mesh of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from pasa_jax.call.arguments import ARRAYS, Arguments, Call
from pasa_jax.call.backends import choose
from pasa_jax.call.compute import compute
from pasa_jax.call.explanation import Explanation, explained
from pasa_jax.call.observe import announce
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands
from pasa_jax.parallel import _local, _schemes
from pasa_jax.parallel._cost import Cost, Plan, plan
from pasa_jax.parallel._line import Line
from pasa_jax.parallel._padding import padded
from pasa_jax.parallel._schemes import SCHEMES, Job

Array = jax.Array
Axes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """Which axes of a mesh batch entries, heads and tokens are cut over."""

    mesh: Any
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...]
    scheme: str
    ulysses_devices: int | None

    def devices(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def sharing(self) -> int:
        """How many devices share the heads of a sequence."""
        if self.scheme == "ulysses":
            return self.devices(self.sequence)
        if self.ulysses_devices is not None:
            return self.ulysses_devices
        return self.mesh.shape[self.sequence[-1]]

    def spec(self, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The sharding of an array with axes b, n, t (tokens) and others, not of size 1."""
        places = {"b": self.batch, "n": self.heads, "t": self.sequence}
        names = [places.get(a) or None for a in axes]
        return PartitionSpec(
            *(None if size == 1 else name for name, size in zip(names, shape, strict=True))
        )

    def put(self, x: Array, spec: PartitionSpec) -> Array:
        """x sharded by ``spec`` in its type too, where the mesh has axes of type Explicit."""
        explicit = {
            name
            for name, kind in zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        }
        if not explicit:
            return x
        parts = [tuple(n for n in _tuple(part) if n in explicit) or None for part in spec]
        return jax.reshard(x, jax.sharding.NamedSharding(self.mesh, PartitionSpec(*parts)))


@dataclass(frozen=True)
class _Program:
    """The static part of a call over a mesh."""

    layout: Layout
    job: Job
    stats: bool


@partial(jax.jit, static_argnums=0)
def _computed(program: _Program, operands: Operands, mask: Mask) -> tuple[Any, Any, Any]:
    """Output, log-sum-exp and statistics of a call."""
    layout, job = program.layout, program.job
    length, devices = mask.query_length, layout.devices(layout.sequence)
    operands, mask = padded(operands, mask, devices)
    shards = layout.devices(layout.heads)
    operands = operands._replace(
        key=_schemes.repeated(operands.key, shards), value=_schemes.repeated(operands.value, shards)
    )
    specs = jax.tree.map(
        lambda x, axes: layout.spec(axes, x.shape), (operands, mask), _axes(operands, mask)
    )
    given = jax.tree.map(layout.put, (operands, mask), specs)
    names = layout.sequence
    wanted = {
        "out": PartitionSpec(layout.batch or None, names or None, layout.heads or None, None),
        "lse": PartitionSpec(layout.batch or None, names or None, layout.heads or None),
        "stats": PartitionSpec(layout.batch or None, layout.heads or None),
    }
    asked = {"out": True, "lse": job.lse, "stats": program.stats}

    def device(operands: Operands, mask: Mask) -> dict[str, Any]:
        mask = replace(mask, query_length=operands.query.shape[1], key_length=operands.key.shape[1])
        lines = _local.lines_of(layout.scheme, Line.over(names), names, layout.ulysses_devices)
        results = _local.attend(lines, job, operands, mask, stats=program.stats)
        return {name: x for (name, want), x in zip(asked.items(), results, strict=True) if want}

    run = jax.shard_map(
        device,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs={name: wanted[name] for name, want in asked.items() if want},
    )
    found = run(*given)
    out, lse = (_first(layout, found.get(name), length) for name in ("out", "lse"))
    return out, lse, found.get("stats")


def _first(layout: Layout, x: Array | None, length: int) -> Array | None:
    """The first ``length`` tokens, which the devices of the sequence need not divide."""
    if x is None or x.shape[1] == length:
        return x
    return layout.put(x, layout.spec("b.n."[: x.ndim], x.shape))[:, :length]


def _axes(operands: Operands, mask: Mask) -> tuple[Any, Any]:
    """For each array the letters of its axes, as `Layout.spec` takes them."""

    def each(axes: str, tree: Any) -> Any:
        return jax.tree.map(lambda _: axes, tree)

    def of_data(data: Data) -> Data:
        return Data(each("bnt", data.query), each("bnt", data.key), each("bn", data.head))

    factors, mods = operands.factors, mask.mods
    if factors is not None:
        factors = Factors("bn.t", "bn.t", "bn")
    if mods is not None:
        mods = replace(mods, data=of_data(mods.data), entries="b", heads="n")
    letters = {
        "query_lengths": "b",
        "key_lengths": "b",
        "query_segments": "bt",
        "key_segments": "bt",
        "query_positions": "bt",
        "key_positions": "bt",
        "array": "bnt.",
        "kinds": "bn..",
        "dropout": "bn.",
    }
    of_mask = {name: each(axes, getattr(mask, name)) for name, axes in letters.items()}
    of_operands: dict[str, Any] = {
        "query": "btn.",
        "key": "btn.",
        "value": "btn.",
        "bias": each("bnt.", operands.bias),
        "sinks": each("n", operands.sinks),
        "scale": "",
        "factors": factors,
        "data": of_data(operands.data),
    }
    return Operands(**of_operands), replace(mask, **of_mask, mods=mods)


@dataclass(frozen=True)
class ParallelExplanation:
    """What a call over a mesh would do, and what other schemes would cost.

    Arguments:
      reason: why this scheme.
      costs: of every scheme, on paper.
      blocks: whether blocks of keys, and so their means κ, are those of one device.
      device: what `dot_product_attention` says of the whole call; a device computes parts of it.
    """

    scheme: str
    ulysses_devices: int | None
    reason: str
    costs: tuple[Cost, ...]
    blocks: str
    device: Explanation

    def __str__(self) -> str:
        name = (
            self.scheme
            if self.ulysses_devices is None
            else (f"{self.scheme} ({self.ulysses_devices})")
        )
        lines = [
            f"scheme          {name}: {self.reason}",
            f"blocks of keys  {self.blocks}",
            *(f"on paper        {cost}" for cost in self.costs),
            str(self.device),
        ]
        return "\n".join(lines)


def _blocks(layout: Layout, call: Call) -> str:
    """Whether blocks of keys are cut as on one device."""
    as_on_one = "as on one device"
    if layout.scheme in ("all_gather", "ulysses"):
        return as_on_one
    groups = layout.devices(layout.sequence)
    if layout.scheme == "ring_ulysses":
        groups //= layout.sharing
    part, block = -(-call.operands.key.shape[1] // groups), call.plan.schedule.block_kv
    if part % block == 0 or groups == 1:
        return as_on_one
    return f"a device's {part} keys are no multiple of block_kv={block}: other means than on one"


@dataclass(frozen=True)
class ParallelAttention:
    """What `attention_fn` returns: a function like `dot_product_attention`.

    Equal ones compare and hash equal, so that code compiled with one serves the other.
    """

    layout: Layout
    defaults: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of whole arrays; see `attention_fn`."""
        given = self._given(args, kwargs)
        call = Call.of(given)
        if call.empty:
            return compute(given)
        self._check(call.operands)
        chosen = choose(given.implementation, call.operands, call.mask, call.plan)
        announce(call.operands, call.mask, chosen.plan)
        job = Job(given.implementation, call.plan, lse=given.return_residual)
        program = _Program(self._for(call)[0], job, given.return_statistics)
        with jax.disable_jit(False):
            results = _computed(program, call.operands, call.mask)
        parts = [jax.tree.map(call.unbatch, x) for x in results if x is not None]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def explain(self, *args: Any, **kwargs: Any) -> ParallelExplanation:
        """What a call would do: the scheme, every scheme's cost on paper, and what a device runs.

        Arguments: as of the call; arrays may be `jax.ShapeDtypeStruct`.
        """
        given = self._given(args, kwargs)
        call: list[Call] = []

        def trace(arrays: dict[str, Any]) -> None:
            call.append(Call.of(replace(given, **arrays)))

        arrays = {name: getattr(given, name) for name in ARRAYS}
        jax.eval_shape(trace, {name: x for name, x in arrays.items() if x is not None})
        self._check(call[0].operands)
        layout, costs = self._for(call[0])
        return ParallelExplanation(
            scheme=layout.scheme,
            ulysses_devices=layout.sharing if layout.scheme == "ring_ulysses" else None,
            reason=costs.reason if self.layout.scheme == "auto" else "it was asked for",
            costs=costs.costs,
            blocks=_blocks(layout, call[0]),
            device=explained(given),
        )

    def _given(self, args: Any, kwargs: Any) -> Arguments:
        return _local.bound(*args, **{**dict(self.defaults), **kwargs})

    def _for(self, call: Call) -> tuple[Layout, Plan]:
        """The layout with a scheme chosen, and what every scheme costs."""
        layout, o = self.layout, call.operands
        batch, queries, heads, size = o.query.shape
        costs = plan(
            layout.mesh,
            batch,
            queries,
            o.key.shape[1],
            heads,
            o.key.shape[2],
            size,
            o.query.dtype,
            call.mask.is_causal,
            E=max(1, o.value.shape[3]),
            batch=layout.batch,
            heads=layout.heads,
            sequence=layout.sequence,
            ulysses_devices=layout.ulysses_devices,
            balanced=call.mask.query_positions is not None,
            window=call.mask.window,
        )
        if layout.scheme != "auto":
            return layout, costs
        chosen = costs.chosen
        return replace(layout, scheme=chosen.scheme, ulysses_devices=chosen.ulysses_devices), costs

    def _check(self, operands: Operands) -> None:
        """Raises unless the mesh divides batch and heads."""
        layout = self.layout
        for names, axis, what in ((layout.batch, 0, "batch"), (layout.heads, 2, "heads")):
            devices, size = layout.devices(names), operands.query.shape[axis]
            if size % devices:
                allowed = f"have a {what} axis that the {devices} devices of {names} divide"
                way_out = f"Pad it, or leave {what} out of the mesh with {what}=None."
                raise wrong("query", allowed, size, way_out)
        if layout.scheme in ("ulysses", "ring_ulysses"):
            heads = operands.query.shape[2] // layout.devices(layout.heads)
            _schemes.check_heads(heads, layout.sharing)


def attention_fn(
    mesh: Any,
    *,
    batch: Axes = None,
    heads: Axes = None,
    sequence: Axes = None,
    scheme: str = "auto",
    ulysses_devices: int | None = None,
    **defaults: Any,
) -> ParallelAttention:
    """`dot_product_attention` over a mesh of devices: the same arguments, whole arrays in and out.

    For use under `jax.jit`, and as the option ``attention`` of `pasa_jax.plugins`. It is one
    `jax.shard_map` over the mesh. Sequences that the devices do not divide are padded inside.

    Arguments:
      mesh: a `jax.sharding.Mesh` or `AbstractMesh`, with axes of type Auto or Explicit.
      batch, heads, sequence: the names of the axes, each a name, a tuple of names (the outermost
        first), or None, over which batch entries, heads and tokens are cut. The devices of
        ``batch`` must divide B, those of ``heads`` N; key heads are repeated where they do not
        divide K.
      scheme: ``"all_gather"``: every device has all keys and values of its heads. ``"ulysses"``:
        devices exchange tokens for heads, and back; they must divide N. ``"ring"``: keys and values
        travel, and no device has more than two parts of them. ``"ring_ulysses"``: neighbours share
        heads, and keys travel between such groups. ``"auto"``: the fastest on paper (`plan`).
      ulysses_devices: how many devices share heads in ``"ring_ulysses"``; by default those of the
        second axis, where ``sequence`` names two.
      defaults: arguments of `dot_product_attention` for calls that do not give them.

    Returns:
      A `ParallelAttention`; its method ``explain`` says what a call would do. Where tokens stand
      in the arrays is what causality, windows, functions and dropout count by, as on one device;
      with ``q_positions`` and ``kv_positions`` causality and windows go by these.

    Raises:
      ValueError: an unknown scheme or axis, an axis used twice; when called, a wrong argument, or
        heads or batch entries that the mesh does not divide.
    """
    check_choice("scheme", scheme, ("auto", *SCHEMES))
    places = {"batch": batch, "heads": heads, "sequence": sequence}
    named = {name: _names(name, axes, mesh) for name, axes in places.items()}
    every = [axis for axes in named.values() for axis in axes]
    for axis in every:
        if every.count(axis) > 1:
            raise wrong("mesh", "give each of its axes to one of batch, heads and sequence", axis)
    if scheme == "ring_ulysses" and ulysses_devices is None and len(named["sequence"]) != 2:
        allowed = "be given for 'ring_ulysses', unless `sequence` names two axes"
        raise wrong("ulysses_devices", allowed, None)
    layout = Layout(mesh, **named, scheme=scheme, ulysses_devices=ulysses_devices)
    if ulysses_devices is not None and layout.devices(layout.sequence) % ulysses_devices:
        allowed = f"divide the {layout.devices(layout.sequence)} devices of the sequence"
        raise wrong("ulysses_devices", allowed, ulysses_devices)
    return ParallelAttention(layout, tuple(sorted(defaults.items())))


def _tuple(axes: Axes) -> tuple[str, ...]:
    """What a PartitionSpec, or a caller, has for one axis of an array."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _names(argument: str, axes: Axes, mesh: Any) -> tuple[str, ...]:
    names = _tuple(axes)
    for name in names:
        check_choice(argument, name, tuple(mesh.axis_names))
    return names
