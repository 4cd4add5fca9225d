"""The steps in PyTorch: open_clip's text tower and loss on features that are there already, and a plain loop.

Both take AdamW's fused kernel, which is faster than what open_clip's trainer calls. Autocast for bfloat16, around tower
and loss as in open_clip's trainer. "compile" is `torch.compile` of the tower, "math attention" spares bfloat16 a slow
backward kernel of `scaled_dot_product_attention` on CPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from benchmarks import step_case
from benchmarks.step_case import FEATURES, VOCAB, Case, Rival, Weights, make_batch, make_weights
from lit_fast.storage.machine import cpu_count
from tests.torch_packages import load_torchvision


def open_clip(case: Case) -> Rival:
    """`open_clip.transformer.TextTransformer` as its SigLIP models have it, and `SigLipLoss`."""
    import torch

    load_torchvision()  # before open_clip, which imports it
    from open_clip.loss import SigLipLoss
    from open_clip.transformer import LayerNorm, TextTransformer

    tower = TextTransformer(
        context_length=case.length,
        vocab_size=VOCAB,
        width=case.width,
        heads=case.heads,
        layers=case.depth,
        output_dim=FEATURES,
        no_causal_mask=True,
        use_pad_mask=case.masked,
        pad_id=step_case.PAD,
        eos_id=step_case.END,
        pool_type="eos" if case.masked else "last",
        proj_bias=True,
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
        norm_layer=partial(LayerNorm, eps=1e-6),
    )
    block = ("transformer.resblocks.", ("ln_1", "ln_2"), "attn", ("mlp.c_fc", "mlp.c_proj"))
    outside = ("token_embedding.weight", "positional_embedding", "ln_final", "text_projection")
    tensors = _tensors(make_weights(case), outside, *block)
    return _rival(case, tower, tensors, SigLipLoss())


def torch_loop(case: Case) -> Rival:
    """`torch.nn.TransformerEncoder` and the loss in one line."""
    import torch
    from torch import nn

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, case.width)
            self.positions = nn.Parameter(torch.zeros(case.length, case.width))
            layer = nn.TransformerEncoderLayer(
                case.width,
                case.heads,
                4 * case.width,
                dropout=0.0,
                activation=partial(nn.functional.gelu, approximate="tanh"),
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            last = nn.LayerNorm(case.width, 1e-6)
            self.encoder = nn.TransformerEncoder(layer, case.depth, last, enable_nested_tensor=False)
            self.head = nn.Linear(case.width, FEATURES)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids) + self.positions
            if not case.masked:
                return self.head(self.encoder(x)[:, -1])
            x = self.encoder(x, src_key_padding_mask=ids == step_case.PAD)
            end = (ids == step_case.END).int().argmax(dim=1)
            return self.head(x[torch.arange(len(x), device=x.device), end])

    def loss(images: Any, texts: Any, scale: Any, bias: Any) -> Any:
        logits = scale * images @ texts.T + bias
        label = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -nn.functional.logsigmoid(label * logits).sum() / len(logits)

    block = ("encoder.layers.", ("norm1", "norm2"), "self_attn", ("linear1", "linear2"))
    outside = ("embedding.weight", "positions", "encoder.norm", "head")
    tensors = _tensors(make_weights(case), outside, *block)
    return _rival(case, Tower(), tensors, loss)


def _tensors(
    weights: Weights,
    outside: tuple[str, str, str, str],
    layers: str,
    norms: tuple[str, str],
    attention: str,
    mlp: tuple[str, str],
) -> dict[str, Any]:
    """The weights by a tower's names, whose attention is `torch.nn.MultiheadAttention`."""
    from lit_fast.weights.from_torch import BlockNames
    from lit_fast.weights.to_torch import blocks, dense, norm

    table, positions, last, head = outside
    encoder, whole = weights["Encoder_0"], f"{attention}.in_proj"
    names = BlockNames(layers, norms, (whole, whole, whole, f"{attention}.out_proj"), (mlp,))
    stacked = blocks(names, encoder["encoderblock"])
    return {
        table: weights["Embed_0"]["embedding"],
        positions: weights["pos_embedding"][0],
        **{name.replace("in_proj.", "in_proj_"): tensor for name, tensor in stacked.items()},
        **norm(last, encoder["encoder_norm"]),
        **dense(head, weights["head"]),
    }


def _rival(case: Case, tower: Any, tensors: dict[str, Any], loss: Callable) -> Rival:
    """A step of the tower with these weights."""
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(cpu_count())
    device = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "cuda"
    tower.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    tower.to(device)
    log_scale = nn.Parameter(torch.tensor(math.log(step_case.TEMPERATURE), device=device))
    bias = nn.Parameter(torch.tensor(step_case.BIAS, device=device))
    parameters = [*tower.parameters(), log_scale, bias]
    decayed = {
        id(p)
        for n, p in tower.named_parameters()
        if p.ndim == 2 and "embedding" not in n and n != "positions"
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": step_case.DECAY},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ],
        lr=step_case.LEARNING_RATE,
        betas=step_case.BETAS,
        eps=step_case.EPSILON,
        fused=True,
    )
    images, ids = (torch.from_numpy(a).to(device) for a in make_batch(case))
    images, ids = images.bfloat16(), ids.long()
    embed = torch.compile(tower) if "compile" in case.form else tower
    attention = partial(sdpa_kernel, SDPBackend.MATH) if "math attention" in case.form else nullcontext

    def backward() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"), attention():
            texts = nn.functional.normalize(embed(ids), dim=-1)
            found = loss(nn.functional.normalize(images.float(), dim=-1), texts, log_scale.exp(), bias)
        found.backward()
        return found

    def step() -> float:
        found = backward()
        nn.utils.clip_grad_norm_(parameters, step_case.CLIP)
        optimizer.step()
        return float(found.detach())

    if "compile" in case.form:
        backward()
    peak = torch.cuda.max_memory_allocated if device == "cuda" else None
    return Rival(step, sum(p.numel() for p in tower.parameters()), peak)
