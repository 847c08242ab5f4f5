"""No neighbour without a test and a section."""

import re
from pathlib import Path

from tests.examples import EXAMPLES
from tests.scripts import ROOT

NAMES = {path.stem for path in (EXAMPLES / "neighbours").glob("[!_]*.py")}


def test_every_neighbour_is_tested():
    assert NAMES
    assert {f"test_{name}" for name in NAMES} <= {
        x.stem for x in Path(__file__).parent.glob("*.py")
    }


def test_every_neighbour_is_short_and_has_a_section():
    document = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert re.search(rf"neighbours[./]{name}\b", document), name
        source = (EXAMPLES / "neighbours" / f"{name}.py").read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 200, name
