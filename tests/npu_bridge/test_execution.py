"""How cores wait for one another when a program is executed."""

from __future__ import annotations

from typing import Any

import pytest

from npu_bridge.cores.context import Core
from npu_bridge.execution import Block, CoreRun, run_together
from npu_bridge.ir import Advance, Call, CrossSet, CrossWait, For, Function, If, Let, Node, SyncAll


class Noted(CoreRun):
    """Takes note of the values of ``t`` at which functions are called."""

    def __init__(self, nodes: list[Node], log: list[Any], name: str) -> None:
        super().__init__(Core(name, {}, ("turn",), [], nodes), {"core": 3})
        self.log, self.name = log, name

    def execute(self, node: Any, names: Any) -> None:
        raise NotImplementedError

    def enter(self, function: Function) -> None:
        self.log.append((self.name, function.name))


def call(name: str) -> Call:
    return Call(Function(name, ("t",), []), ("core",))


def block(cube: list[Node], vector: list[Node]) -> tuple[Block, list[Any]]:
    log: list[Any] = []
    return Block(Noted(cube, log, "C"), [Noted(vector, log, f"V{i}") for i in range(2)]), log


def test_the_cube_core_waits_for_both_vector_cores_and_they_for_it():
    ready, done = CrossSet("FIX", 0, "READY"), CrossWait("MTE2", 1, "DONE")
    cube: list[Node] = [call("scores"), ready, done, call("values"), SyncAll()]
    wait, tell = CrossWait("MTE2", 0, "READY"), CrossSet("MTE3", 1, "DONE")
    vector: list[Node] = [wait, call("softmax"), tell, SyncAll(), call("close")]
    both, log = block(cube, vector)
    run_together([both])
    assert log[0] == ("C", "scores")
    assert sorted(log[1:3]) == [("V0", "softmax"), ("V1", "softmax")]
    assert log[3] == ("C", "values")
    assert sorted(log[4:]) == [("V0", "close"), ("V1", "close")]


def test_cores_that_wait_for_one_another_are_an_error():
    both, _ = block([CrossWait("FIX", 0, "A")], [CrossWait("MTE2", 1, "B")])
    with pytest.raises(RuntimeError, match="the cores wait for one another"):
        run_together([both])


def test_loops_branches_and_counters():
    odd = If("Mod(t, 2) == 1", [call("odd"), Advance("turn", "t")], [call("even")])
    last = If("turn == last", [call("sum")])
    nodes: list[Node] = [Let("last", "1 + core"), For("t", 0, "last + 1", [odd]), last]
    both, log = block(nodes, [])
    run_together([both])
    assert [name for _, name in log] == ["even", "odd", "even", "odd", "even", "sum"]
