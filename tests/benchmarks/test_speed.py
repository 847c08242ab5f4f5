"""The speed benchmark on short lengths: what it records, and its arithmetic. Never the times."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

from tests.scripts import load_script

# Speaks the protocol of torch_worker.py without torch; float16 is beyond it.
WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    answers = {"hello": {"version": "0", "threads": 1}, "case": {"ready": True},
               "run": {"seconds": 0.5}}
    refused = request.get("dtype") == "float16"
    answer = {"error": "RuntimeError: no float16"} if refused else answers[request["op"]]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    """benchmarks/speed.py, which is a script and no package."""
    pytest.importorskip("typer", reason="needs the extra `cli`")
    return load_script("benchmarks", "speed")


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.mark.full
def test_main_writes_every_sample(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "speed.json"
    speed.main(seq=[96], dtype=["float32"], quick=True, output=output)

    found = json.loads(output.read_text())
    assert found["rounds"] == 3
    assert found["torch"] is None
    assert found["cpu"]
    assert set(found["versions"]) == {"python", "pasa-jax", "jax", "jaxlib", "numpy"}
    cases = [r["case"] for r in found["records"]]
    assert [(c["backward"], c["causal"]) for c in cases] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    for record in found["records"]:
        assert record["case"]["seq"] == 96
        assert record["case"]["shift"] == "none"
        assert list(record["contenders"]) == ["ours auto", "ours none", "jax.nn"]
        for contender in record["contenders"].values():
            assert contender["fails"] is None
            assert len(contender["warm_up_ms"]) == 1
            assert len(contender["samples_ms"]) == 2
            assert contender["median_ms"] == pytest.approx(sum(contender["samples_ms"]) / 2)
        assert record["ratios"]["ours/jax.nn"]["target"] is None
        assert record["ratios"]["ours/torch"] == {"value": None, "target": 1.7}
        assert record["ratios"]["auto/none"]["value"] > 0
    shown = capsys.readouterr().out
    assert "torch is left out" in shown
    assert "forward and backward: medians of 2 interleaved rounds" in shown


def test_what_jax_nn_cannot_do_is_shown_as_failing(
    speed: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    case = speed.Case(32, "float16", causal=False, backward=False, heads=1, head_dim=16)
    with jax.numpy_dtype_promotion("standard"):  # under "strict" it fails for that reason instead
        record = speed.measure(case, rounds=2)
    result = record.results["jax.nn"]
    if result.fails is None:
        pytest.skip("this jax has float16 attention on the CPU")
    assert "not supported by dot_general on CPU" in result.fails
    assert "\n" not in result.fails
    assert record.ratio("ours/jax.nn") is None
    assert record.ratio("auto/none") is not None
    speed.show(speed.Console(width=150), [record], 2)
    assert f"jax.nn fails in float16: {result.fails}"[:140] in capsys.readouterr().out


def test_torch_is_asked_in_its_own_process(speed: ModuleType, worker: Path) -> None:
    with speed.TorchWorker.started(Path(sys.executable), worker) as torch:
        assert torch.about == {"version": "0", "threads": 1}
        case = speed.Case(32, "float32", causal=True, backward=False, heads=1, head_dim=16)
        assert speed.measure(case, 2, torch).results["torch"].seconds == [0.5, 0.5]
        with pytest.raises(RuntimeError, match=r"^RuntimeError: no float16$"):
            torch.prepared(speed.Case(32, "float16", causal=True, backward=False))


def test_a_dead_worker_is_an_error(speed: ModuleType, worker: Path) -> None:
    worker.write_text("")
    with (
        pytest.raises(RuntimeError, match=r"^the torch worker ended; see its stderr$"),
        speed.TorchWorker.started(Path(sys.executable), worker),
    ):
        pass


def record_of(speed: ModuleType, **seconds: list[float]):
    case = speed.Case(2048, "float32", causal=True, backward=False)
    names = {"auto": "ours auto", "none": "ours none", "jax": "jax.nn", "torch": "torch"}
    results = {names[key]: speed.Result(samples) for key, samples in seconds.items()}
    return speed.Record(case, "none", results)


def test_ratios_are_of_medians_without_the_warm_up(speed: ModuleType) -> None:
    record = record_of(
        speed,
        auto=[90.0, 3.0, 1.0, 2.0],
        none=[0.0, 2.0, 9.0, 1.0],
        jax=[0.0, 4.0, 8.0, 4.0],
        torch=[50.0, 1.0, 1.0, 7.0],
    )
    ratios = {name: r["value"] for name, r in record.as_json()["ratios"].items()}
    assert ratios == {"ours/jax.nn": 0.5, "ours/torch": 2.0, "auto/none": 1.0}
    assert speed.judged(record, "ours/jax.nn") == "[red]0.50[/] (≤ 0.4)"
    assert speed.judged(record, "auto/none") == "[green]1.00[/] (≤ 1.25)"


def test_a_ratio_needs_both_contenders(speed: ModuleType) -> None:
    record = record_of(speed, auto=[1.0, 1.0], none=[1.0, 1.0])
    assert record.ratio("ours/torch") is None
    assert speed.judged(record, "ours/torch") == "–"
    assert speed.written(record, "torch") == "–"


@pytest.mark.parametrize(
    ("ratio", "seq", "dtype", "causal", "limit"),
    [
        ("ours/jax.nn", 2048, "float32", False, 0.6),
        ("ours/jax.nn", 2048, "float32", True, 0.4),
        ("ours/jax.nn", 4096, "float32", True, 0.35),
        ("ours/jax.nn", 4096, "float32", False, None),
        ("ours/jax.nn", 2048, "bfloat16", False, None),
        ("ours/torch", 4096, "float16", True, 1.7),
        ("ours/torch", 2048, "bfloat16", False, 3.5),
        ("auto/none", 512, "float16", False, 1.25),
    ],
)
def test_targets(
    speed: ModuleType, ratio: str, seq: int, dtype: str, causal: bool, limit: float | None
) -> None:
    case = speed.Case(seq, dtype, causal=causal, backward=False)
    assert speed.target_of(ratio, case) == limit


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_each_contender_follows_each_other_equally_often(speed: ModuleType, names: str) -> None:
    rounds = 2 * len(names)
    order = [name for name, _ in speed.interleaved({x: lambda: 0.0 for x in names}, rounds)]
    rows = ["".join(order[i : i + len(names)]) for i in range(0, len(order), len(names))]
    assert [row[0] for row in rows[: len(names)]] == list(names)
    assert all(sorted(row) == list(names) for row in rows)
    for pair in itertools.permutations(names, 2):
        assert sum("".join(pair) in row for row in rows) == 2


def test_options_take_several_words(speed: ModuleType) -> None:
    words = ["--seq", "2048", "4096", "--quick", "--dtype", "float16", "--output", "x"]
    assert speed.spread(words, ("--seq", "--dtype")) == (
        ["--seq", "2048", "--seq", "4096", "--quick", "--dtype", "float16", "--output", "x"]
    )
