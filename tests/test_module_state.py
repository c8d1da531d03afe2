"""Every way in which somebody may get between a module and its kernels is noticed."""

import pytest
import torch
from torch import nn

from mistral_kernels.model.module_state import ModuleState

CHANGES = {
    "a hook": lambda m: m[0].register_forward_hook(lambda *call: None),
    "a hook before": lambda m: m[1].register_forward_pre_hook(lambda *call: None),
    "a forward": lambda m: setattr(m[1], "forward", lambda x: x),
    "a parameter exchanged": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4))),
    "its data exchanged": lambda m: setattr(m[0].weight, "data", torch.ones(4, 4)),
    "a buffer exchanged": lambda m: setattr(m[2], "running_mean", torch.ones(4)),
    "a bias taken away": lambda m: setattr(m[0], "bias", None),
    "a bias given": lambda m: setattr(m[1], "bias", nn.Parameter(torch.ones(4))),
    "its strides": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t()),
    "its shape": lambda m: setattr(m[0].weight, "data", m[0].weight.data[:3]),
    "a part exchanged": lambda m: m.__setitem__(1, nn.Linear(4, 4)),
    "a part added": lambda m: m.append(nn.Identity()),
    "a dtype": lambda m: m.double(),
    "training": lambda m: m[2].eval(),
}


@pytest.fixture
def modules():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(modules, change):
    state = ModuleState(modules)
    assert state.unchanged()
    CHANGES[change](modules)
    assert not state.unchanged()


def test_values_are_no_change(modules):
    state = ModuleState(modules)
    modules(torch.randn(3, 4))
    with torch.no_grad():
        modules[0].weight.mul_(2)
    assert state.unchanged()


def test_hooks_that_come_and_go(modules):
    state = ModuleState(modules)
    hook = modules[0].register_forward_hook(lambda *call: None)
    listened_to = ModuleState(modules)
    assert not state.unchanged() and not listened_to.unchanged()
    hook.remove()
    assert state.unchanged() and not listened_to.unchanged()


def test_a_hook_around_all_is_no_change(modules):
    state = ModuleState(modules)
    modules.register_forward_hook(lambda *call: None)
    assert state.unchanged()
