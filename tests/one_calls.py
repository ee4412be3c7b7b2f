"""Records which layers were native calls."""

import pytest

from erniem_fast.native.layer import Layers


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The numbers of tokens and of layers of each call, from now on."""
    seen, call = [], Layers.__call__

    def recorded(layers, x, sequences):
        seen.append((len(x), len(layers._structures)))
        return call(layers, x, sequences)

    monkeypatch.setattr(Layers, "__call__", recorded)
    return seen
