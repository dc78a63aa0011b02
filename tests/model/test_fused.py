"""The fused operations equal the plain ones, forward and backward, and stand in only where nothing changes."""

import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.model.fused import GatedMlp, RmsNorm, _RmsNorm, _SwiGlu, use_fused


class OwnRMSNorm(nn.Module):
    """As most transformers models write it."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-5
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * (x * scale)


class OwnMlp(nn.Module):
    """A gated layer with a chosen activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_the_gradients_of_the_normalisation_are_right():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: _RmsNorm.apply(a, w, 1e-6), (x, weight))


def test_the_gradients_of_the_gate_are_right():
    gate = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGlu.apply, (gate, up))
    assert torch.allclose(_SwiGlu.apply(gate, up), F.silu(gate) * up)


def test_usual_layers_are_replaced_and_answer_the_same():
    model = nn.Sequential(OwnRMSNorm(6), OwnMlp(nn.SiLU()))
    x = torch.randn(4, 6)
    before = model(x)
    use_fused(model)
    assert isinstance(model[0], RmsNorm)
    assert isinstance(model[1], GatedMlp)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_layers_with_another_formula_keep_their_own():
    model = nn.Sequential(OwnRMSNorm(6, offset=1.0), OwnMlp(nn.GELU()))
    use_fused(model)
    assert isinstance(model[0], OwnRMSNorm)
    assert isinstance(model[1], OwnMlp)
