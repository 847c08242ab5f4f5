"""Processes that talk by gloo. Each run has a limit, after which all its processes are killed."""

import signal

import pytest

from tests.examples import load

cluster = load("cluster")
HEARTBEAT = 10


def job(processes, *schemes):
    return cluster.Job(processes, schemes, HEARTBEAT, limit=300)


@pytest.mark.parametrize(
    ("processes", "scheme"),
    [(2, "all_gather"), *(pytest.param(4, x, marks=pytest.mark.full) for x in ("ulysses", "ring"))],
)
def test_others_raise_at_once_if_a_peer_is_killed(processes, scheme):
    """And before that all have one device's numbers."""
    ended = cluster.lose(job(processes, scheme), cluster.Loss.killed)
    assert len(ended) == processes - 1
    for one in ended:
        assert one["status"] == 1
        assert "Gloo" in one["error"], one
        assert one["seconds"] < HEARTBEAT / 2


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_others_end_after_the_heartbeat_if_a_peer_is_stopped(processes):
    ended = cluster.lose(job(processes, "all_gather"), cluster.Loss.stopped)
    assert len(ended) == processes - 1
    for one in ended:
        assert one["status"] == -signal.SIGABRT
        assert "JAX distributed service" in one["error"], one
        assert HEARTBEAT / 4 < one["seconds"] < 3 * HEARTBEAT


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_every_scheme_has_the_numbers_of_one_device(processes):
    rows = cluster.compare(job(processes, *cluster.SCHEMES))
    assert [row["scheme"] for row in rows] == list(cluster.SCHEMES)
    assert max(row[name] for row in rows for name in cluster.ANSWERS) < cluster.BOUND


@pytest.mark.full
def test_a_wrong_number_is_reported(tmp_path):
    """With a copy of the example whose bound nothing meets."""
    copy = tmp_path / "cluster.py"
    text = (cluster.Path(cluster.__file__)).read_text(encoding="utf-8")
    copy.write_text(text.replace("BOUND = 1e-5", "BOUND = 0"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "__file__", str(copy))
        with pytest.raises(RuntimeError, match="ArithmeticError: all_gather is"):
            cluster.compare(job(2, "all_gather"))
