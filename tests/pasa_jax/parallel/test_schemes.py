"""Every scheme answers as one device does: outputs, log-sum-exps and all gradients."""

from dataclasses import replace
from itertools import product

import jax
import pytest

from pasa_jax import SHIFTS, parallel
from pasa_jax.parallel import _part, _ring
from tests.pasa_jax.parallel import trials
from tests.pasa_jax.parallel.devices import on_devices
from tests.thin import only

OPTIONS = {
    "all_gather": {},
    "ulysses": {},
    "ring": {},
    "ring_ulysses": {"ulysses_devices": 2},
}
EVERY = list(product(OPTIONS, trials.TRIALS))


def over_four(scheme, **more):
    mesh = trials.mesh(("s",), (4,))
    return parallel.attention_fn(mesh, sequence="s", scheme=scheme, **OPTIONS[scheme], **more)


def often(chosen):
    """Schemes and trials: those that ``make test`` runs, and the others."""
    return [pytest.param(*x, marks=() if x in chosen else pytest.mark.full) for x in EVERY]


@pytest.mark.parametrize(("scheme", "name"), often([("ring", "all")]))
@on_devices
def test_float32(scheme, name):
    trials.compare(over_four(scheme), name)


@pytest.mark.parametrize(("scheme", "name"), often([]))
@on_devices
def test_bfloat16(scheme, name):
    trials.compare(over_four(scheme), name, "bfloat16")


@pytest.mark.parametrize(("scheme", "name"), often([]))
@on_devices
def test_float16(scheme, name):
    trials.compare(over_four(scheme), name, "float16")


@pytest.mark.parametrize(
    ("scheme", "name"),
    often([("all_gather", "all"), ("ulysses", "all")]),
)
@on_devices
def test_by_the_plain_formula(scheme, name):
    trials.compare(over_four(scheme), name, implementation="reference")


@pytest.mark.parametrize("scheme", OPTIONS)
@pytest.mark.parametrize("shift", only([], [x for x in SHIFTS if x != "none"]))
@on_devices
def test_every_shift(scheme, shift):
    """Where devices hold whole blocks, each block is the one of a single device."""
    trials.compare(over_four(scheme), "whole blocks", "float16", shift)


@pytest.mark.parametrize("explicit", only([True], [True, False]))
@on_devices
def test_heads_over_an_axis_and_over_groups_of_a_ring(explicit):
    mesh = trials.mesh(("heads", "tokens"), (2, 4), explicit)
    attend = parallel.attention_fn(
        mesh, heads="heads", sequence="tokens", scheme="ring_ulysses", ulysses_devices=2
    )
    with jax.set_mesh(mesh):
        trials.compare(attend, "segments, causal, odd", implementation="reference")


@pytest.mark.full
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("scheme", OPTIONS)
@on_devices
def test_batch_heads_and_sequence_together(scheme, explicit):
    mesh = trials.mesh(("batch", "heads", "tokens"), (2, 2, 2), explicit)
    attend = parallel.attention_fn(
        mesh, batch="batch", heads="heads", sequence="tokens", scheme=scheme, **OPTIONS[scheme]
    )
    with jax.set_mesh(mesh):
        trials.compare(attend, "all functions")


@pytest.mark.full
@pytest.mark.parametrize("explicit", [True, False])
@on_devices
def test_a_ring_of_groups_over_two_axes(explicit):
    mesh = trials.mesh(("r", "u"), (4, 2), explicit)
    attend = parallel.attention_fn(mesh, sequence=("r", "u"), scheme="ring_ulysses")
    with jax.set_mesh(mesh):
        trials.compare(attend, "all")


@pytest.mark.full
@on_devices
def test_two_axes_as_one_ring():
    mesh = trials.mesh(("r", "u"), (2, 2))
    for scheme in ("ring", "ulysses", "all_gather"):
        trials.compare(
            parallel.attention_fn(mesh, sequence=("r", "u"), scheme=scheme), "causal, odd"
        )


# Faults that others had: the tests above would see each of them.


def stale_keys(monkeypatch):
    """The backward pass takes a device's own keys at every hop (diffusers up to 0.39)."""
    gradients = _ring._gradients_of_part

    def stale(ring, distance, total, fixed, mask, moving, *rest):
        moving = moving._replace(key=fixed.key)
        return gradients(ring, distance, total, fixed, mask, moving, *rest)

    monkeypatch.setattr(_ring, "_gradients_of_part", stale)


def no_window(monkeypatch):
    """Keys beyond the window are seen (prime-rl#2828)."""
    simplest = _ring._simplest

    def ignorant(mask, distance):
        distance, mask = simplest(mask, distance)
        return distance, replace(mask, window=None)

    monkeypatch.setattr(_ring, "_simplest", ignorant)


def lengths_of_each_part(monkeypatch):
    """Every part is as long as the whole says (maxtext#4947)."""
    monkeypatch.setattr(
        _part, "_within", lambda n, at, most: None if n is None else jax.numpy.clip(n, 0, most)
    )


def whole_arrays_travel(monkeypatch):
    """What every device holds whole is taken for a part that travels (sglang#33327)."""
    columns = _part.columns

    def own(operands, keys, where):
        return columns(operands, keys, replace(where, key=where.query))

    monkeypatch.setattr(_part, "columns", own)


def sinks_in_every_part(monkeypatch):
    """The sinks take up weight once for each hop."""
    merge = _ring.merge

    def again(total, part):
        out, lse = part.output(jax.numpy.linspace(-1, 4, 4, dtype=jax.numpy.float32))
        return merge(total, _ring.Partial.of(out, lse, None))

    monkeypatch.setattr(_ring, "merge", again)


def no_last_rotation(monkeypatch):
    """The gradients of keys stay one device away from home."""
    rotate, sums = _ring.Line.rotate, []

    def once_less(line, tree):
        if isinstance(tree, _part.Moving):
            sums.append(tree)
            if len(sums) == line.size:
                return tree
        return rotate(line, tree)

    monkeypatch.setattr(_ring.Line, "rotate", once_less)


FAULTS = {
    stale_keys: "causal",
    no_window: "window, causal",
    lengths_of_each_part: "lengths",
    whole_arrays_travel: "bias",
    sinks_in_every_part: "sinks",
    no_last_rotation: "causal",
}


@pytest.mark.parametrize("number", only([0], range(len(FAULTS))))
@on_devices
def test_a_fault_is_seen(number):
    fault, name = list(FAULTS.items())[number]
    # What is traced is kept: other tiles make it new.
    schedule = replace(trials.TILES, unroll=2 + number)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            trials.compare(over_four("ring"), name, implementation="reference", schedule=schedule)
