"""The defects of `make mutants` can still be put in."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda x: x.name)
def test_what_a_defect_replaces_stands_once(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert all((ROOT / name).exists() for name in mutant.tests)
