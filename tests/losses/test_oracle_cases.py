import importlib.util
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[2] / "scripts" / "oracle_losses.py"

pytestmark = pytest.mark.slow  # compiles some forty programs


@pytest.fixture(scope="module")
def oracle():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)
        yield _load()


def _load():
    spec = importlib.util.spec_from_file_location("oracle_losses", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(oracle):
    return oracle.measure(1500, 7)


def _worst(results, side):
    return [
        f"{one.group} {one.edges[row]}: {getattr(one, side)[row]:.1e}"
        for one in results
        for row in np.flatnonzero(~(getattr(one, side) <= 1e-5))
    ]


def test_values_are_those_of_float64(results):
    assert _worst(results, "value") == []


def test_gradients_are_those_of_float64(results):
    assert _worst(results, "gradient") == []


def test_every_case_counts(oracle, results):
    assert sum(len(one.edges) for one in results) == 1500
    # Rows that only have to be finite are few, and none but adaptive KL has them.
    assert {one.group.name for one in results if one.unknown} <= {"adaptive_kl"}
    assert sum(one.unknown for one in results) < 30
    assert {one.group.name for one in results} == set(oracle.FUNCTIONS)
    edges = {edge for one in results for edge in one.edges}
    assert edges == set(oracle.EDGES)


def test_run_sums_up(oracle):
    cases, worst = oracle.run(3, 0)
    assert cases == 3
    assert 0 <= worst <= 1e-5
