"""Breaking a source on purpose: what the tests of Triton's mutants and of the native ones share."""

import pytest


def parameters(tables):
    """`(op, file, function, old, new)` of each mutant; a table has `(old, new)` pairs by function."""
    for op, file, table in tables:
        for function, replacements in table.items():
            for old, new in replacements:
                yield pytest.param(op, file, function, old, new, id=f"{op}: {file}: {function}: {old} -> {new}")


def replaced(source, body, old, new):
    """The source with `old` replaced in `body`, a part of it; each occurs once."""
    assert body.count(old) == 1
    assert source.count(body) == 1
    return source.replace(body, body.replace(old, new))


def holds(check):
    """Whether a check of the battery finds nothing."""
    return all(comparison.holds for comparison in check.run().values())


_caught_by = {}  # by the place of a mutant: the index of the check that caught the last one there


def is_caught(checks, *place):
    """Whether any check finds something.

    Mutants in one place are mostly caught by the same check, so the one that caught the last goes first.
    """
    likely = _caught_by.get(place, 0)
    for index in sorted(range(len(checks)), key=lambda index: index != likely):
        if not holds(checks[index]):
            _caught_by[place] = index
            return True
    return False
