"""What others may do to a layer of a model of transformers after `enable`."""

import peft
import torch
from torch import nn
from torch.nn.utils import parametrize


class Triple(nn.Module):
    def forward(self, weight):
        return 3 * weight


def hook_a_projection(model):
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: 2 * call[-1])


def hook_a_norm(model):
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, call: (call[0] + 1,))


def give_another_forward(model):
    attention = model.model.layers[0].self_attn
    attention.o_proj.forward = lambda x: 2 * nn.functional.linear(x, attention.o_proj.weight)


def parametrise(model):
    parametrize.register_parametrization(
        model.model.layers[0].self_attn.q_proj, "weight", Triple(), unsafe=True
    )


def transpose(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.t().contiguous().t()


def turn_in_its_place(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


def adapt(model):
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora)


def train(model):
    model.train()


def take_their_experts(model):
    model.set_experts_implementation("grouped_mm")


def exchange_a_weight(model):
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(2 * projection.weight)
