"""`load` runs an example as a module; `test_every_example_is_tested` looks for its calls."""

from functools import partial

from tests.scripts import ROOT, load_script

EXAMPLES = ROOT / "examples"
load = partial(load_script, "examples")
