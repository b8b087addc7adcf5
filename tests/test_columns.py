"""The columns of a call, and those of several calls as one."""

import pytest

from trl_cdr import InputError
from trl_cdr.scoring.columns import Columns, join_columns


def test_joining_keeps_the_order():
    parts = [
        Columns(["a", "b"], ["1", "2"], [[1], [2, 3]], ["x", None]),
        Columns([], [], [], []),
        Columns(["c"], ["3"], [[4]], ["y"]),
    ]
    assert join_columns(parts) == Columns(["a", "b", "c"], ["1", "2", "3"], [[1], [2, 3], [4]], ["x", None, "y"])


def test_who_has_no_rows_has_no_say():
    assert join_columns([Columns([], []), Columns(["a"], ["1"], [[1]])]) == Columns(["a"], ["1"], [[1]])
    assert join_columns([Columns([], [], []), Columns(["a"], ["1"])]) == Columns(["a"], ["1"])
    assert join_columns([Columns([], []), Columns([], [], [])]).prompts == []


@pytest.mark.parametrize("name", ["completion_ids", "domains"])
def test_a_column_is_everywhere_or_nowhere(name):
    values = {"completion_ids": [[1]], "domains": ["x"]}
    with pytest.raises(InputError, match=f"{name} is missing on some of the processes"):
        join_columns([Columns(["a"], ["1"]), Columns(["b"], ["2"], **{name: values[name]})])
