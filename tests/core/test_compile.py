"""Why torch.compile is switched off for a run with adapters: a model that was compiled without hooks ignores those that
come later, and a user's model usually was. When this fails, torch guards hooks, and compilation may stay on."""

import torch
from torch import nn


def test_a_compiled_model_ignores_hooks_that_come_later():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    x = torch.randn(2, 3)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    handle = model[0].register_forward_hook(lambda module, inputs, output: output + 1.0)
    try:
        assert not torch.allclose(model(x), plain), "the hook acts on the plain model"
        assert torch.equal(compiled(x), plain), "and is ignored by the compiled one"
    finally:
        handle.remove()
        torch._dynamo.reset()
