import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.models.times import Times


def over(shards, function):
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=1, sequence=shards), jax.devices()[:shards])
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, "sequence"),
        check_vma=False,
    )


def test_a_device_has_a_piece_from_either_end():
    row = np.arange(16)[None]
    times = Times("sequence", 4)
    own = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert over(4, times.own)(row)[0].tolist() == own
    assert times.order(16).tolist() == own


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_what_all_have_is_the_row_and_all_have_the_same_to_do(shards):
    rows = np.random.default_rng(0).standard_normal((3, 4 * shards, 2), np.float32)
    times = Times("sequence", shards)
    copies = over(shards, lambda rows: times.whole(times.own(rows)))(rows)
    np.testing.assert_array_equal(copies, np.tile(rows, (1, shards, 1)))
    attended = (times.order(4 * shards) + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(attended.tolist())) == 1


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="rows of 12 tokens do not divide into 8 pieces"):
        over(4, Times("sequence", 4).own)(np.zeros((1, 12)))
