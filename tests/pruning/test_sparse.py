"""2:4 plans compressed for sparse tensor cores."""

import pytest
import torch

from foveate.pruning import PruningError, plan
from foveate.pruning.sparse import compress


def test_what_cannot_be_compressed_is_refused_untouched(small):
    net = small("nat_mini")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PruningError, match=r"float16 or bfloat16 on CUDA, the model is torch\.float32 on cpu"):
        compress(net, plan(net, "magnitude", 0.5, pattern="2:4", img_size=40))
    with pytest.raises(PruningError, match="wanted a plan of pattern 2:4, got None"):
        compress(net, plan(net, "magnitude", 0.5, img_size=40))
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="wants a CUDA device of compute capability 8.0 or more",
)
def test_the_compressed_net_answers_as_the_one_with_zeros(small, images):
    net = small("swin_tiny_patch4_window7_224", embed_dim=64).cuda().half()
    x = images("swin_tiny_patch4_window7_224").cuda().half()
    p = plan(net, "magnitude", 0.5, pattern="2:4")
    with torch.no_grad():
        wanted = p.apply(net)(x)
        assert compress(net, p)
        torch.testing.assert_close(net(x), wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
