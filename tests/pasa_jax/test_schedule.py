"""`Schedule`, `Precision` and `Target`: what fits, what is refused, and with which words."""

import dataclasses

import pytest

from pasa_jax import TARGETS, Precision, Schedule, ScheduleError
from pasa_jax.core.target import find_target, target_of_device


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_for_target_fits(target, head_dim, dtype):
    schedule = Schedule.for_target(target, head_dim=head_dim, dtype=dtype)
    assert schedule.target == target
    schedule.check(head_dim=head_dim, dtype=dtype)
    there = find_target(target).memories
    wanted = schedule.footprint(head_dim=head_dim, dtype=dtype)
    assert all(0 < size <= there[memory] for memory, size in wanted.items())
    assert set(wanted) <= set(there)


def test_what_does_not_fit_is_refused_in_bytes():
    schedule = Schedule(block_q=512, block_kv=512, target="h100")
    with pytest.raises(ScheduleError) as error:
        schedule.check(head_dim=128, dtype="float16")
    # q 512·128·2 + twice 512 keys and values of 256·2 bytes
    assert str(error.value) == (
        "`schedule` must fit h100: a 512 × 512 tile of float16 with head sizes 128 and 128 wants "
        "655360 bytes of shared; there are 232448. Use a smaller block_q or block_kv."
    )
    with pytest.raises(ScheduleError, match="bytes of L1"):
        Schedule.for_target("ascend_910b", head_dim=4096, dtype="float16")


@pytest.mark.parametrize("field", ["block_q", "block_kv"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64"])
def test_block_sizes_are_positive_ints(field, value):
    with pytest.raises(ValueError, match=rf"`schedule.{field}` must be a positive int; got"):
        Schedule(**{field: value})


def test_schedule_is_frozen_and_hashable():
    schedule = Schedule()
    assert hash(schedule) == hash(Schedule())
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.block_q = 1


def test_schedule_needs_the_standard_library_alone():
    """It is read where jax is not: by the generator's command line, by a build script."""
    import subprocess
    import sys

    code = (
        "import sys, types; package = types.ModuleType('pasa_jax');"
        "package.__path__ = [sys.argv[1]]; sys.modules['pasa_jax'] = package;"
        "import pasa_jax.core.schedule;"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    import pasa_jax

    subprocess.run([sys.executable, "-c", code, pasa_jax.__path__[0]], check=True)


def test_targets_answer_the_two_questions():
    assert {name for name, t in TARGETS.items() if not t.accumulator_reachable} == {"ascend_910b"}
    assert {t.kind for t in TARGETS.values()} == {"cpu", "tpu", "gpu", "npu"}
    assert all(t.source for t in TARGETS.values())
    assert "float16" not in TARGETS["tpu_v6e"].matrix_types
    assert "float16" in TARGETS["rtx4090"].matrix_types["float16"]


@pytest.mark.parametrize(
    ("platform", "device_kind", "name"),
    [
        ("cpu", "cpu", "cpu"),
        ("tpu", "TPU v5 lite", "tpu_v5e"),
        ("tpu", "TPU v5", "tpu_v5p"),
        ("tpu", "TPU v6 lite", "tpu_v6e"),
        ("tpu", "TPU7x", "tpu_7x"),
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA GeForce RTX 4090", "rtx4090"),
        ("gpu", "NVIDIA T4", "rtx4090"),
        ("tpu", "TPU v9", "tpu_v5p"),
    ],
)
def test_target_of_device(platform, device_kind, name):
    assert target_of_device(platform, device_kind).name == name


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`target` must be one of 'cpu', .*; got 'v5e'\."):
        Schedule.for_target("v5e")
    with pytest.raises(ValueError, match=r"`precision` must be one of .*; got 'fp16'\."):
        Precision.named("fp16")
    with pytest.raises(ValueError, match=r"`precision.scores` must be one of .*; got 'int8'\."):
        Precision(scores="int8")
    with pytest.raises(ValueError, match="Eight bits cannot count the keys"):
        Precision(statistics="bfloat16")


def test_precision_names():
    assert Precision.named("bfloat16") == Precision(scores="bfloat16", probabilities="bfloat16")
    assert Precision.named("paper").accumulator == "float16"
    assert Precision.named("float32") == Precision()
