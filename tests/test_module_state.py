"""Every way in which somebody may get between a module and its kernels is noticed."""

import pytest
import torch
from tiny_models import random_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mistral_kernels.model import layers
from mistral_kernels.model.module_state import ModuleState, others_take_part

CHANGES = {
    "a hook": lambda m: m[0].register_forward_hook(lambda *call: None),
    "a hook before": lambda m: m[1].register_forward_pre_hook(lambda *call: None),
    "a forward": lambda m: setattr(m[1], "forward", lambda x: x),
    "a compiled call": lambda m: m[1].compile(),
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
    "a number": lambda m: setattr(m[2], "eps", 0.5),
    "an attribute that was not there": lambda m: setattr(m[0], "scale", torch.ones(4)),
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


def test_a_hook_on_all_modules_of_the_process_is_noticed(modules):
    state = ModuleState(modules)
    with register_module_forward_hook(lambda *call: None):
        assert not state.unchanged() and not ModuleState(modules).unchanged()
    assert state.unchanged()


def test_a_forward_put_in_its_class_is_noticed(modules, monkeypatch):
    state = ModuleState(modules)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not state.unchanged()


class Loud(layers.FeedForward):
    def forward(self, x, step):
        return super().forward(x, step)


def wrap(module):
    forward = module.forward
    module.forward = lambda *inputs: forward(*inputs)


OTHERS = {
    "a hook": lambda model: model.layers[0].register_forward_hook(lambda *call: None),
    "a forward": lambda model: wrap(model.layers[1].attention),
    "a compiled call": lambda model: model.layers[0].compile(),
    "a subclass": lambda model: setattr(model.layers[0].feed_forward, "__class__", Loud),
    "a compiled module": lambda model: model.layers.__setitem__(1, torch.compile(model.layers[1])),
    "what stands for an op": lambda model: model.kernels.update(silu_mul=lambda x: x),
}


@pytest.mark.parametrize("change", OTHERS)
def test_others_take_part(change):
    model = random_model()
    assert not others_take_part(model)
    OTHERS[change](model)
    assert others_take_part(model)


def test_a_forward_of_others_in_a_class_of_ours(monkeypatch):
    model = random_model()
    monkeypatch.setattr(layers.FeedForward, "forward", lambda self, x, step: x)
    assert others_take_part(model)
