"""Examples in docstrings of the inner packages; those of the public face run in tests/api."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest

from edgeq.model.block import BlockSpec, tensor_name
from edgeq.model.recording import record
from edgeq.runtime.generate import split_at_stop
from edgeq.runtime.lookup import Lookup
from edgeq.runtime.step_fusion import fuse

EXAMPLES = (BlockSpec.first_seen, tensor_name, record, split_at_stop, Lookup.draft, fuse)


@pytest.mark.parametrize("function", EXAMPLES, ids=lambda function: function.__qualname__)
def test_an_example_is_true(function: Any) -> None:
    names = vars(sys.modules[function.__module__])
    tests = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    examples = [test for test in tests if test.examples]
    assert examples
    for test in examples:
        assert not doctest.DocTestRunner().run(test).failed
