"""Every token mixer keeps one contract: constructor, call, prefix tokens, other sizes, torch's tools."""

import pytest
import torch

from foveate.attention_ops.mixers import MIXERS, create_mixer

KEYWORDS: dict[str, dict] = {
    "circle": {"radius": 2, "down_factor": 2, "qk_norm": True},
    "routing": {"clusters": 3},
    "nprf": {"features": 8},
}
OURS = ("attention", "circle", "flow", "nprf", "routing")
every_mixer = pytest.mark.parametrize("name", OURS)


def make(name: str, prefix: int = 0, **more):
    torch.manual_seed(0)
    return create_mixer(name, 16, 2, map_size=(6, 8), prefix_tokens=prefix, **KEYWORDS.get(name, {}), **more)


def tokens(size, prefix=0, batch=2):
    return torch.randn(batch, prefix + size[0] * size[1], 16, generator=torch.Generator().manual_seed(1))


@every_mixer
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(6, 8), (4, 2)])
def test_any_prefix_and_any_smaller_map(name, prefix, size):
    out = make(name, prefix)(tokens(size, prefix), size)
    assert out.shape == (2, prefix + size[0] * size[1], 16) and out.isfinite().all()


@every_mixer
def test_every_parameter_learns_and_keywords_are_checked(name):
    net = make(name, 1)
    net(tokens((6, 8), 1), (6, 8)).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(ValueError, match=f"create_mixer: {name}: .*unexpected keyword argument 'kernal'"):
        make(name, kernal=3)


@every_mixer
def test_projections_have_the_names_of_timms_attention(name):
    net = make(name)
    assert net.qkv.weight.shape == (48, 16) and net.proj.weight.shape == (16, 16)
    assert make(name, qkv_bias=False).qkv.bias is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@every_mixer
def test_script_and_export(name):
    net, x = make(name, 1).eval(), tokens((6, 8), 1)
    torch.testing.assert_close(torch.jit.script(net)(x, (6, 8)), net(x, (6, 8)))
    program = torch.export.export(net, (x, (6, 8)))
    torch.testing.assert_close(program.module()(x, (6, 8)), net(x, (6, 8)))


@every_mixer
def test_autocast_runs_in_its_dtype(name):
    net, x = make(name), tokens((6, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, (6, 8))
    assert out.dtype == torch.bfloat16
    if name != "routing":  # other clusters, where products are rounded
        torch.testing.assert_close(out.float(), net(x, (6, 8)), rtol=0.1, atol=0.05)


def test_all_mixers_of_this_package_are_known():
    assert set(OURS) <= set(MIXERS)
    with pytest.raises(ValueError, match=r"create_mixer: wanted one of .*, got 'flwo'; did you mean flow\?"):
        create_mixer("flwo", 16, 2, map_size=(2, 2))
    with pytest.raises(ValueError, match="wanted dim that num_heads=3 divides, got 16"):
        create_mixer("flow", 16, 3, map_size=(2, 2))
