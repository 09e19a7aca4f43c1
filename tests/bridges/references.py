"""The published adapters once more, from torch's own modules: what the kinds of bridge are compared with.

Written after the formulas, not after our code; the names of the weights are the published ones.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from language_bridge.bridges.base import Bridge, BridgeSpec, Cond, Hidden, kinds

ops = torch.nn


def two_layers(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(ops.Linear(width_in, width), nn.GELU(), ops.Linear(width, width))


def transformer(width: int, depth: int) -> nn.Transformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its fast path does not take layers with the norm first
        return nn.Transformer(
            d_model=width,
            num_encoder_layers=depth,
            num_decoder_layers=depth,
            dim_feedforward=4 * width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )


class Omni(nn.Module):
    def __init__(self, hidden: int, context: int, pooled: int, queries: int, layers: int) -> None:
        super().__init__()
        self.fc = two_layers(hidden, context)
        self.fc1 = nn.Sequential(ops.Linear(context, pooled), nn.GELU(), ops.Linear(pooled, pooled))
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, queries, context))
        self.llm_to_t2i_mapping = transformer(context, layers)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """One text [1, T, D], start token and words alone."""
        rows = self.llm_to_t2i_mapping(src=self.fc(text), tgt=self.t2i_decoder_prompt)
        inner = [rows[:, row] for row in range(1, rows.shape[1] - 1)]
        return rows, self.fc1(sum(inner) / len(inner))


class TimedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = ops.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        width = x.shape[-1]
        both = self.linear(time * torch.sigmoid(time))
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * (1 + both[..., width:]) + both[..., :width]


class EllaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 8, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": ops.Linear(width, 4 * width), "c_proj": ops.Linear(4 * width, width)}
        )
        self.ln_1 = TimedNorm(width)
        self.ln_2 = TimedNorm(width)
        self.ln_ff = TimedNorm(width)

    def forward(self, text: Tensor, latents: Tensor, time: Tensor) -> Tensor:
        queries = self.ln_1(latents, time)
        source = torch.cat([queries, self.ln_2(text, time)], 1)
        latents = latents + self.attn(queries, source, source)[0]
        inside = self.mlp["c_fc"](self.ln_ff(latents, time))
        return latents + self.mlp["c_proj"](torch.where(inside > 0, inside**2, 0))


class Ella(nn.Module):
    def __init__(self, hidden: int, context: int, queries: int, layers: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.time_embedding = nn.ModuleDict(
            {"linear_1": ops.Linear(channels, context), "linear_2": ops.Linear(context, context)}
        )
        self.connector = nn.Module()
        self.connector.latents = nn.Parameter(torch.randn(queries, context))
        self.connector.time_aware_linear = ops.Linear(context, context)
        self.connector.proj_in = ops.Linear(hidden, context)
        self.connector.perceiver_blocks = nn.ModuleList(EllaBlock(context) for _ in range(layers))

    def forward(self, text: Tensor, timestep: float) -> Tensor:
        """One text [1, T, D], all of whose rows are read."""
        half = self.channels // 2
        periods = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = torch.tensor(timestep) * periods
        waves = torch.cat([torch.cos(angles), torch.sin(angles)])[None, None].to(text)
        time = functional.silu(self.time_embedding["linear_1"](waves))
        time = self.time_embedding["linear_2"](time)
        latents = self.connector.latents[None] + self.connector.time_aware_linear(functional.silu(time))
        text = self.connector.proj_in(text)
        for block in self.connector.perceiver_blocks:
            latents = block(text, latents, time)
        return latents


class MulanAdapter(nn.Module):
    def __init__(self, hidden: int, width: int, queries: int, layers: int) -> None:
        super().__init__()
        self.proj = two_layers(hidden, width)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.transformer = transformer(width, layers)

    def forward(self, text: Tensor) -> Tensor:
        return self.transformer(src=self.proj(text), tgt=self.queries.expand(len(text), -1, -1))


class MulanProjection(nn.Module):
    def __init__(self, tower_pooled: int, pooled: int) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(tower_pooled, pooled)
        self.linear_2 = ops.Linear(pooled, pooled)

    def forward(self, rows: Tensor, tower: Tensor) -> Tensor:
        x = self.linear_1(tower)
        x = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return self.linear_2(x)


class MulanAttentionPool(nn.Module):
    def __init__(self, queries: int, width: int, pooled: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(queries + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (ops.Linear(width, width) for _ in range(3))
        self.c_proj = ops.Linear(width, pooled)

    def forward(self, rows: Tensor, tower: Tensor) -> Tensor:
        x = torch.cat([rows.mean(1, keepdim=True), rows], 1) + self.positional_embedding
        x = x.transpose(0, 1)
        out, _ = functional.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], 8, None,
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return out[0]


class MulanXl(nn.Module):
    """tower_pooled 0: pooled by attention. With `added`, the U-Net's embedding stands in the file too."""

    def __init__(
        self, hidden: int, first: int, second: int, pooled: int, tower_pooled: int, queries: int, added: bool
    ) -> None:
        super().__init__()
        self.adapter1 = MulanAdapter(hidden, first, queries, 1)
        self.adapter2 = MulanAdapter(hidden, second, queries, 1)
        self.pool_caption_projection: nn.Module = (
            MulanProjection(tower_pooled, pooled)
            if tower_pooled
            else MulanAttentionPool(queries, first + second, pooled)
        )
        if added:
            self.add_embedding = nn.ModuleDict(
                {"linear_1": ops.Linear(pooled + 1536, pooled), "linear_2": ops.Linear(pooled, pooled)}
            )

    def forward(self, text: Tensor, tower: Tensor) -> tuple[Tensor, Tensor]:
        """The text [B, T, D] without the prefix, and the tower's pooled vector [B, Q]."""
        rows = torch.cat([self.adapter1(text), self.adapter2(text)], -1)
        return rows, self.pool_caption_projection(rows, tower)


class RouweiBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = ops.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = ops.LayerNorm(width)
        self.mlp = nn.Sequential(ops.Linear(width, 4 * width), nn.GELU(), ops.Linear(4 * width, width))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, key_padding_mask=padding)[0]
        return x + self.mlp(self.norm2(x))


class Rouwei(nn.Module):
    def __init__(
        self, hidden: int, context: int, pooled: int, window: int, queries: int, wide: int, narrow: int
    ) -> None:
        super().__init__()
        heads = 16
        self.window = window
        self.seq_projection = ops.Linear(hidden, context)
        self.input_position_embeddings = nn.Parameter(torch.randn(1, window, context))
        self.output_position_embeddings = nn.Parameter(torch.randn(1, queries, context))
        self.wide_attention_blocks = nn.ModuleList(RouweiBlock(context, heads) for _ in range(wide))
        self.compression_queries = nn.Parameter(torch.randn(1, queries, context))
        self.compression_attention = nn.MultiheadAttention(context, heads, batch_first=True)
        self.compression_norm = ops.LayerNorm(context)
        self.compression_gate = nn.Sequential(ops.Linear(2 * context, context), nn.Sigmoid())
        self.narrow_attention_blocks = nn.ModuleList(RouweiBlock(context, heads) for _ in range(narrow))
        self.pooling_attention = nn.MultiheadAttention(context, heads, batch_first=True)
        self.pooling_token = nn.Parameter(torch.randn(1, 1, context))
        self.pooled_projection = nn.Sequential(
            ops.Linear(context, context),
            ops.LayerNorm(context),
            nn.GELU(),
            nn.Dropout(0.1),
            ops.Linear(context, pooled),
        )

    def forward(self, text: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """One text [1, T, D] without the template and without padding, at the places from `start` on."""
        x = self.seq_projection(text[:, : self.window - start])
        places = torch.arange(start, start + x.shape[1])
        x = x.new_zeros(1, self.window, x.shape[2]).index_copy(1, places, x) + self.input_position_embeddings
        padding = ~torch.isin(torch.arange(self.window), places)[None]
        for block in self.wide_attention_blocks:
            x = block(x, padding)
        queries = self.compression_queries
        heard = self.compression_attention(queries, x, x, key_padding_mask=padding)[0]
        gate = self.compression_gate(torch.cat([queries, heard], -1))
        rows = self.compression_norm(gate * heard + (1 - gate) * queries) + self.output_position_embeddings
        for block in self.narrow_attention_blocks:
            rows = block(rows, None)
        return rows, self.pooled_projection(self.pooling_attention(self.pooling_token, rows, rows)[0][:, 0])


def shapes_of(reference: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in reference.state_dict().items()}


def twin(kind: str, reference: nn.Module, spec: BridgeSpec | None = None) -> Bridge:
    """A bridge with the reference's weights, both made random and double first; the spec is recognised."""
    generator = torch.Generator().manual_seed(5)
    for value in reference.double().eval().parameters():
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3
        value.data.normal_(0.2, 1, generator=generator).mul_(scale)
    published = reference.state_dict()
    cls = kinds()[kind]
    spec = spec or cls.recognise(shapes_of(reference))
    assert spec is not None
    bridge = cls(spec).double()
    bridge.load_state_dict(cls.adopt(published, spec), strict=True)
    return bridge.eval()


def texts(count: int, tokens: int, width: int, pooled: int = 0) -> Hidden:
    """Random states [count, tokens, width], double, the texts of different lengths, noise in the padding."""
    generator = torch.Generator().manual_seed(6)
    states = torch.randn(count, tokens, width, generator=generator, dtype=torch.float64) * 2 + 0.3
    lengths = tokens - 3 * torch.arange(count)
    vector = torch.randn(count, pooled, generator=generator, dtype=torch.float64) if pooled else None
    return Hidden(states, torch.arange(tokens) < lengths[:, None], vector)


def single(hidden: Hidden) -> Hidden:
    pooled = None if hidden.pooled is None else hidden.pooled.float()
    return Hidden(hidden.states.float(), hidden.mask, pooled)


def assert_equal(cond: Cond, context: Tensor, pooled: Tensor | None = None) -> None:
    """To 1e-5 in single precision, to 1e-10 in double, of numbers of about one."""
    bound = 1e-5 if cond.context.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(cond.context.double(), context, rtol=bound, atol=bound)
    assert (cond.pooled is None) == (pooled is None)
    if cond.pooled is not None:
        torch.testing.assert_close(cond.pooled.double(), pooled, rtol=bound, atol=bound)
