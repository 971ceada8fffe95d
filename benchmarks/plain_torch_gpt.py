#!/usr/bin/env python3
"""A GPT of a given shape in plain torch, and its training loop: what a speed is measured beside.

It has the features of the demo's model (grouped-query attention with QK-norm, RoPE, SwiGLU, sandwich norm, soft-capped
logits, untied embeddings), its optimizer (AdamW on FP32 master weights, clipping, dynamic loss scale in FP16), and
nothing else: no framework, no checkpoints, no logging, no data loading. One process, or several under torchrun
(data-parallel; gloo on the CPU, NCCL with a GPU each). Prints one JSON line: the seconds of each step.

Shapes: b = micro-batch, s = sequence, h = hidden, n = heads, g = key/value groups, d = head size, v = vocabulary.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatron_kaiyuan.host.cpu_products import multiply_half_in_float

__all__ = ["Job", "PlainGpt", "Shape", "Trainer", "main"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The size of a model, all counts."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    sequence: int
    softcap: float = 30.0
    rotary_base: float = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How to train it."""

    dtype: str
    """`float32` or `float16`."""
    micro_batch: int
    """Sequences of one forward pass of one process."""
    accumulation: int
    """Forward passes of one process in a step."""
    steps: int
    device: str = "cpu"
    """`cpu` or `cuda`."""


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm and RoPE."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.groups) * shape.head_size, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)
        self.norm_q = nn.RMSNorm(shape.head_size)
        self.norm_k = nn.RMSNorm(shape.head_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        shape, (b, s, _) = self.shape, x.shape
        q, k, v = self.qkv(x).split([n * shape.head_size for n in (shape.heads, shape.groups, shape.groups)], dim=-1)
        q = rotate(self.norm_q(q.view(b, s, shape.heads, shape.head_size)), rotation).transpose(1, 2)
        k = rotate(self.norm_k(k.view(b, s, shape.groups, shape.head_size)), rotation).transpose(1, 2)
        v = v.view(b, s, shape.groups, shape.head_size).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.out(y.transpose(1, 2).reshape(b, s, -1))
        return result


class SwiGlu(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        gate, up = self.up(x).chunk(2, dim=-1)
        result: Tensor = self.down(functional.silu(gate) * up)
        return result


class Layer(nn.Module):
    """Attention and MLP, each with a norm before and after, inside the residual branch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(shape), SwiGlu(shape)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden) for _ in range(4))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        x = x + self.norms[1](self.attention(self.norms[0](x), rotation))
        result: Tensor = x + self.norms[3](self.mlp(self.norms[2](x)))
        return result


class PlainGpt(nn.Module):
    """Embedding, layers, norm, output matrix, soft-cap, mean cross-entropy in FP32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        frequencies = shape.rotary_base ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(shape.sequence), frequencies)[None, :, None, :]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of `[b, s]` tokens and targets, FP32 scalar."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, (self.cos, self.sin))
        logits = self.output(self.norm(x)).float()
        logits = self.shape.softcap * torch.tanh(logits / self.shape.softcap)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to `[b, s, n, d]`."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Trainer:
    """Training steps on random tokens.

    Weights and gradient sums are in the run's precision, the optimizer's weights in FP32.
    """

    def __init__(self, shape: Shape, job: Job) -> None:
        torch.manual_seed(1234)
        self.job, self.half = job, job.dtype == "float16"
        self.model = PlainGpt(shape).to(job.device, getattr(torch, job.dtype))
        self.weights: list[Tensor] = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights] if self.half else self.weights
        self.sum = torch.zeros(sum(w.numel() for w in self.weights), dtype=self.weights[0].dtype, device=job.device)
        self.sums = self._pieces(self.sum)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
        self.scale = 2.0**16 if self.half else 1.0
        tokens = torch.randint(shape.vocabulary, (job.accumulation, job.micro_batch, shape.sequence + 1))
        self.tokens = tokens.to(job.device)

    def step(self) -> bool:
        """Take one optimizer step, and return False if it was left out because the gradients overflowed."""
        self.sum.zero_()
        for window in self.tokens:
            loss = self.model(window[:, :-1], window[:, 1:])
            (loss * (self.scale / self.job.accumulation)).backward()
            for total, weight in zip(self.sums, self.weights, strict=True):
                if weight.grad is not None:
                    total += weight.grad
                weight.grad = None
        processes = 1
        if dist.is_initialized():
            dist.all_reduce(self.sum)
            processes = dist.get_world_size()
        return self._update(self.sum.float().div_(self.scale * processes))

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one for each weight."""
        pieces = torch.split(flat, [weight.numel() for weight in self.weights])
        return [piece.view_as(weight) for piece, weight in zip(pieces, self.weights, strict=True)]

    @torch.no_grad()
    def _update(self, gradient: Tensor) -> bool:
        for master, piece in zip(self.masters, self._pieces(gradient), strict=True):
            master.grad = piece
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            if self.half:
                torch._foreach_copy_(self.weights, self.masters)
        else:
            self.scale /= 2
        for master in self.masters:
            master.grad = None
        return finite


def main() -> None:
    """Train for some steps and print the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in (*fields(Shape), *fields(Job)):
        kind: Any = field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, required=field.name not in DEFAULTED)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    shape = Shape(**{field.name: given[field.name] for field in fields(Shape) if field.name in given})
    job = Job(**{field.name: given[field.name] for field in fields(Job) if field.name in given})
    if job.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if job.device == "cuda" else "gloo")
    if job.dtype == "float16" and job.device == "cpu":
        multiply_half_in_float()  # as our training does: torch's own FP16 products say nothing about the rest
    trainer = Trainer(shape, job)
    seconds = []
    for _ in range(job.steps):
        started = time.perf_counter()
        trainer.step()
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": seconds, "job": asdict(job)}))
    if dist.is_initialized():
        dist.destroy_process_group()


DEFAULTED = ("softcap", "rotary_base", "device")

if __name__ == "__main__":
    main()
