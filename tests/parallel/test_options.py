import types

import jax
import numpy as np
import pytest

from distill_jax.parallel import MeshConfig, compiler_options, make_mesh, options

LIMIT = "xla_tpu_scoped_vmem_limit_kib"


def mesh_of(kind, platform="tpu"):
    """As much of a mesh as is looked at."""
    device = types.SimpleNamespace(platform=platform, device_kind=kind, process_index=0)
    return types.SimpleNamespace(devices=np.array([device], dtype=object))


@pytest.fixture
def asked(monkeypatch):
    """A compiler that knows every option, and what it was asked about."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    seen = []
    monkeypatch.setattr(options, "_are_accepted", lambda options, device: not seen.append(options))
    return seen


def test_only_tpus_that_are_known_have_any(asked):
    alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert compiler_options(alone) == {}
    assert compiler_options(mesh_of("TPU v4")) == {}
    assert compiler_options(mesh_of("TPU v5", platform="gpu")) == {}
    assert not asked
    chosen = compiler_options(mesh_of("TPU v5 lite"))
    assert asked == [tuple(chosen.items())]
    assert chosen[LIMIT] == 64 * 1024
    assert compiler_options(mesh_of("TPU v5"))[LIMIT] == 40 * 1024
    for names in (("5 lite", "5e"), ("5", "5p"), ("6 lite", "6e")):
        one, other = (compiler_options(mesh_of(f"TPU v{name}")) for name in names)
        assert one == other != {}


def test_what_the_environment_names_is_left_to_it(asked, monkeypatch):
    chosen = compiler_options(mesh_of("TPU v5 lite"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_foo=1 --{LIMIT}=98304")
    kept = compiler_options(mesh_of("TPU v5 lite"))
    assert kept == {name: value for name, value in chosen.items() if name != LIMIT}
    monkeypatch.setenv(
        "LIBTPU_INIT_ARGS", "--noxla_enable_async_reduce_scatter_fusion --xla_tpu_scoped=1"
    )
    kept = compiler_options(mesh_of("TPU v5 lite"))
    assert set(chosen) - set(kept) == {"xla_enable_async_reduce_scatter_fusion"}


def test_a_compiler_that_refuses_one_gets_none_and_says_so():
    device = jax.devices()[0]
    assert options._are_accepted((("xla_cpu_enable_fast_math", False),), device)
    with pytest.warns(UserWarning, match="xla_no_such_option"):
        assert not options._are_accepted((("xla_no_such_option", True),), device)
