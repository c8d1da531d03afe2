"""More stand-ins, see `fake_peers`: xformers, Liger, and mistral_inference over a plain model."""

from types import SimpleNamespace

import torch
from torch import nn

from tests.fake_peers import attention, gated, norm, plant


def plant_xformers(monkeypatch) -> None:
    class LowerTriangularFromBottomRightMask:
        left = -1

        def make_local_attention(self, window_size):
            """A query does not see a key that is `window_size` or more before it."""
            local = LowerTriangularFromBottomRightMask()
            local.left = window_size - 1
            return local

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert query.dim() == 5 and key.shape == value.shape and key.shape[2:] == query.shape[2:]
        left = -1 if attn_bias is None else attn_bias.left
        sequences = zip(*(x.flatten(2, 3) for x in (query, key, value)), strict=True)
        out = torch.stack([attention(*parts, left, attn_bias is not None) for parts in sequences])
        return out.view(query.shape)

    plant(monkeypatch, xformers__ops={"memory_efficient_attention": memory_efficient_attention})
    mask = {"LowerTriangularFromBottomRightMask": LowerTriangularFromBottomRightMask}
    plant(monkeypatch, xformers__ops__fmha__attn_bias=mask)


def plant_liger(monkeypatch) -> None:
    def rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        return norm(X, W + offset, eps)

    def add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        return norm(X + R, W + offset, eps), X + R

    def silu_mul(a, b):
        return gated(a, b)

    for place, name, apply in (
        ("rms_norm", "LigerRMSNormFunction", rms_norm),
        ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", add_rms_norm),
        ("swiglu", "LigerSiLUMulFunction", silu_mul),
    ):
        names = {name: SimpleNamespace(apply=apply)}
        plant(monkeypatch, **{f"liger_kernel__ops__{place}": names})


class BufferCache:
    """Rings of `sliding_window` slots: position p in slot p % size."""

    def __init__(
        self, n_layers, max_batch_size, max_seq_len, n_kv_heads, head_dim, sliding_window=None
    ):
        self.cache_sizes = [sliding_window or max_seq_len] * n_layers
        shapes = [(max_batch_size, size, n_kv_heads, head_dim) for size in self.cache_sizes]
        self.cache_k = {i: torch.zeros(shape) for i, shape in enumerate(shapes)}
        self.cache_v = {i: torch.zeros(shape) for i, shape in enumerate(shapes)}
        self.kv_seqlens = None

    def init_kvseqlens(self, batch_size):
        self.kv_seqlens = torch.zeros(batch_size, dtype=torch.long)

    def to(self, device, dtype):
        for caches in (self.cache_k, self.cache_v):
            for layer, cache in caches.items():
                caches[layer] = cache.to(device=device, dtype=dtype)
        return self


class Transformer(nn.Module):
    """The model by its equations, one token after the other; rope turns pairs."""

    def __init__(self, args, pipeline_rank=0, num_pipeline_ranks=1, softmax_fp32=True):
        super().__init__()
        self.args, self.weights = args, {}
        self.output = lambda hidden: hidden @ self.weights["output.weight"].T

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.weights = dict(state_dict)

    def turned(self, x, position):
        half = torch.arange(0, self.args.head_dim, 2) / self.args.head_dim
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angles = position * self.args.rope_theta**-half
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)).flatten(-2)

    def attend(self, x, prefix, position, keys, values):
        q, k, v = (
            (x @ self.weights[f"{prefix}.w{leaf}.weight"].T).view(-1, self.args.head_dim)
            for leaf in "qkv"
        )
        slot, kept = position % len(keys), min(position + 1, len(keys))
        keys[slot], values[slot] = self.turned(k, position), v
        seen = (self.turned(q, position)[None], keys[:kept], values[:kept])
        return attention(*seen, -1, causal=False).flatten() @ self.weights[f"{prefix}.wo.weight"].T

    def fed(self, x, prefix):
        w1, w2, w3 = (self.weights[f"{prefix}.w{i}.weight"] for i in (1, 2, 3))
        return gated(x @ w1.T, x @ w3.T) @ w2.T

    def forwarded(self, x, prefix):
        if self.args.moe is None:
            return self.fed(x, prefix)
        gate = x @ self.weights[f"{prefix}.gate.weight"].T
        values, chosen = gate.topk(self.args.moe.num_experts_per_tok)
        outs = [self.fed(x, f"{prefix}.experts.{expert}") for expert in chosen.tolist()]
        return values.softmax(-1) @ torch.stack(outs)

    def forward_partial(self, input_ids, seqlens, cache=None, images=None):
        assert seqlens == [len(input_ids)] and self.args.max_batch_size >= 1
        if cache.kv_seqlens is None:
            cache.init_kvseqlens(1)
        hidden = []
        for token in input_ids:
            h, position = self.weights["tok_embeddings.weight"][token], int(cache.kv_seqlens)
            for n in range(self.args.n_layers):
                name, eps = f"layers.{n}", self.args.norm_eps
                x = norm(h, self.weights[f"{name}.attention_norm.weight"], eps)
                caches = (cache.cache_k[n][0], cache.cache_v[n][0])
                h = h + self.attend(x, f"{name}.attention", position, *caches)
                x = norm(h, self.weights[f"{name}.ffn_norm.weight"], eps)
                h = h + self.forwarded(x, f"{name}.feed_forward")
            hidden.append(norm(h, self.weights["norm.weight"], self.args.norm_eps))
            cache.kv_seqlens += 1
        return torch.stack(hidden)

    def forward(self, input_ids, seqlens, cache=None, images=None):
        return self.output(self.forward_partial(input_ids, seqlens, cache)).float()


def plant_mistral_inference(monkeypatch) -> None:
    def transformer_args(
        dim, n_layers, head_dim, hidden_dim, n_heads, n_kv_heads, norm_eps, vocab_size,
        max_batch_size=0, rope_theta=None, moe=None, lora=None,
    ):  # fmt: skip
        return SimpleNamespace(**locals())

    def moe_args(num_experts, num_experts_per_tok):
        return SimpleNamespace(**locals())

    plant(monkeypatch, mistral_inference__args={"TransformerArgs": transformer_args})
    plant(monkeypatch, mistral_inference__moe={"MoeArgs": moe_args})
    plant(monkeypatch, mistral_inference__cache={"BufferCache": BufferCache})
    plant(monkeypatch, mistral_inference__transformer={"Transformer": Transformer})
