#!/usr/bin/env python3
"""The model's kernels one by one on a GPU, at the Kaiyuan-2B shape, beside torch and liger-kernel in the same run.

    python -m benchmarks.kernels --json kernels.json

Times are medians of CUDA events over forward plus backward of one layer's call for a micro-batch of 4 x 4096 tokens;
memory is the peak over that of the inputs. Errors are ||result - float64|| / ||float64|| of a gradient on a smaller
input. Rows whose library is missing are named. A row is printed as soon as it is measured, and the file is written part
by part; the rows of documents come last, because a fault of the GPU ends every later row of a process.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from megatron_kaiyuan.kernels.qk_norm_rope import qk_norm_rope
from megatron_kaiyuan.kernels.rms_norm import add_rms_norm, residual_rms_norm
from megatron_kaiyuan.kernels.swiglu import swiglu
from megatron_kaiyuan.kernels.weight_gradient import wgrad_gemm_accum_fp32
from megatron_kaiyuan.model.document_attention import attend_within_documents, document_boundaries

SEQUENCE, BATCH, HIDDEN, FFN, GROUPS, PER_GROUP, HEAD, VOCABULARY, CAP = 4096, 4, 2048, 6144, 8, 2, 128, 151_936, 30.0
EPS = 1e-6


def main() -> int:
    """Measure everything and print the table, and return 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    rows = all_rows(args.json)
    table = Table(title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}, FP16", title_justify="left")
    for name in ("what", "how", "ms", "peak MiB", "gradient error"):
        table.add_column(name, justify="left" if name in ("what", "how") else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=130).print(table)
    return 0


Row = tuple[str, str, str, str, str]
PRINTED: list[Row] = []
"""Rows so far: a part that fails halfway leaves those before."""


def all_rows(path: Path | None) -> list[Row]:
    """Return every part's rows, written to `path` part by part.

    A part that fails is a row.
    """
    parts = {"norms": norms, "rotary": rotary, "gates": gates, "weight gradients": weight_gradients,
             "attention": attention, "heads": heads, "documents": documents}  # fmt: skip
    PRINTED.clear()
    for name, part in parts.items():
        try:
            part()
        except Exception as problem:  # inputs that do not fit, or a GPU that an earlier row left broken
            told(name, "-", f"{type(problem).__name__}: {str(problem)[:60]}")
        if path:
            write_text_atomically(path, json.dumps(PRINTED, indent=1) + "\n")
    return list(PRINTED)


def told(what: str, how: str, milliseconds: str, memory: str = "", error: str = "") -> Row:
    """Print and remember a row."""
    row = (what, how, milliseconds, memory, error)
    PRINTED.append(row)
    print("  ".join(row), flush=True)
    return row


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """FP16 leaf on the GPU."""
    return (torch.randn(*shape, device="cuda") * scale).half().requires_grad_()


def measured(what: str, how: str, call: Callable[[], object], error: float | None = None) -> Row:
    """Median time and peak memory of a call that runs forward and backward."""
    try:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    except Exception as problem:  # a missing library or kernel is a result
        return told(what, how, f"{type(problem).__name__}: {str(problem)[:60]}")
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return told(what, how, f"{sorted(times)[6]:.3f}", f"{peak:,.0f}", "" if error is None else f"{error:.1e}")


def differentiate(outputs: object, grads: list[Tensor], inputs: list[Tensor]) -> None:
    """Run backward from several outputs at once, without accumulation."""
    torch.autograd.grad(list(outputs) if isinstance(outputs, tuple) else [outputs], inputs, grads)


def norms() -> list[Row]:
    """RMSNorm with what the residual stream does around it."""
    x, branch, gain = normal(SEQUENCE, BATCH, HIDDEN), normal(SEQUENCE, BATCH, HIDDEN), normal(HIDDEN)
    grad = torch.randn_like(x)

    def torch_pre() -> None:
        differentiate((functional.rms_norm(x, gain.shape, gain, EPS), x * 1), [grad, grad], [x, gain])

    def torch_post() -> None:
        differentiate(x + functional.rms_norm(branch, gain.shape, gain, EPS), [grad], [x, branch, gain])

    def liger_pre() -> None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        differentiate((LigerRMSNormFunction.apply(x, gain, EPS, 0.0, "gemma", False), x * 1), [grad, grad], [x, gain])

    return [
        measured(
            "pre-norm, residual goes on",
            "kernels",
            lambda: differentiate(residual_rms_norm(x, gain, EPS), [grad, grad], [x, gain]),
        ),
        measured("pre-norm, residual goes on", "torch (+1 pass)", torch_pre),
        measured("pre-norm, residual goes on", "liger (+1 pass)", liger_pre),
        measured(
            "post-norm + residual",
            "kernels",
            lambda: differentiate(add_rms_norm(x, branch, gain, EPS), [grad], [x, branch, gain]),
        ),
        measured("post-norm + residual", "torch (+1 pass)", torch_post),
    ]


def rotary() -> list[Row]:
    """Split, QK-norm and rotary positions."""
    packed = normal(SEQUENCE, BATCH, GROUPS, (PER_GROUP + 2) * HEAD)
    query_gain, key_gain = normal(HEAD), normal(HEAD)
    angles = (torch.arange(SEQUENCE, device="cuda")[:, None] * 1e4 ** (-torch.arange(64, device="cuda") / 64)).repeat(
        1, 2
    )
    grads = [torch.randn(SEQUENCE, BATCH, heads, HEAD, device="cuda").half() for heads in (16, 8, 8)]

    def ours() -> None:
        differentiate(
            qk_norm_rope(packed, angles, query_gain, key_gain, queries_per_group=2, head_size=HEAD, eps=EPS),
            grads,
            [packed, query_gain, key_gain],
        )

    def unfused() -> None:
        query, key, value = packed.split([2 * HEAD, HEAD, HEAD], dim=-1)
        out = []
        for heads, gain in ((query.reshape(SEQUENCE, BATCH, -1, HEAD), query_gain), (key, key_gain)):
            normed = functional.rms_norm(heads, gain.shape, gain, EPS)
            first, second = normed.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            cosine, sine = angles.cos().half()[:, None, None], angles.sin().half()[:, None, None]
            out.append(normed * cosine + turned * sine)
        differentiate((*out, value), grads, [packed, query_gain, key_gain])

    return [measured("QK-norm and rotary", "kernels", ours), measured("QK-norm and rotary", "torch", unfused)]


def gates() -> list[Row]:
    """SwiGLU."""
    packed = normal(SEQUENCE, BATCH, 2 * FFN)
    grad = torch.randn(SEQUENCE, BATCH, FFN, device="cuda").half()

    def megatron() -> None:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        differentiate(bias_swiglu_impl(packed, None), [grad], [packed])

    return [
        measured("SwiGLU", "kernels", lambda: differentiate(swiglu(packed), [grad], [packed])),
        measured("SwiGLU", "kernels, times 2^-4", lambda: differentiate(swiglu(packed, 2.0**-4), [grad], [packed])),
        measured("SwiGLU", "Megatron (torch.compile)", megatron),
    ]


def weight_gradients() -> list[Row]:
    """Accumulating a weight gradient in FP32."""
    tokens = SEQUENCE * BATCH
    inputs, grads = (
        torch.randn(tokens, HIDDEN, device="cuda").half(),
        torch.randn(tokens, 2 * FFN, device="cuda").half(),
    )
    buffer = torch.zeros(2 * FFN, HIDDEN, device="cuda")
    return [
        measured("weight gradient of fc1", "addmm into FP32", lambda: wgrad_gemm_accum_fp32(inputs, grads, buffer)),
        measured("weight gradient of fc1", "FP16 product, then add", lambda: buffer.add_(grads.t() @ inputs)),
        measured("weight gradient of fc1", "the product alone", lambda: grads.t() @ inputs),
    ]


def attention() -> list[Row]:
    """SDPA's back ends on the layout the model has."""
    query, key, value = (normal(SEQUENCE, BATCH, heads, HEAD) for heads in (16, 8, 8))
    grad = torch.randn(BATCH, 16, SEQUENCE, HEAD, device="cuda").half()

    def attend(backend: SDPBackend, dims: tuple[int, ...] = (1, 2, 0, 3)) -> None:
        with sdpa_kernel([backend]):
            out = functional.scaled_dot_product_attention(
                query.permute(*dims), key.permute(*dims), value.permute(*dims), is_causal=True, enable_gqa=True
            )
        differentiate(out, [grad], [query, key, value])

    packed = normal(SEQUENCE, BATCH, GROUPS, (PER_GROUP + 2) * HEAD)
    of_value = torch.randn(SEQUENCE, BATCH, GROUPS, HEAD, device="cuda").half()
    return [
        measured("attention", "cuDNN", lambda: attend(SDPBackend.CUDNN_ATTENTION)),
        measured("attention", "flash", lambda: attend(SDPBackend.FLASH_ATTENTION)),
        measured(
            "values times 2^-4", "torch", lambda: differentiate(packed[..., -HEAD:] * 2.0**-4, [of_value], [packed])
        ),
    ]


def documents() -> list[Row]:
    """Attention that stays inside documents of so many tokens, beside the dense mask that says the same."""
    query, key, value = (normal(SEQUENCE, BATCH, heads, HEAD) for heads in (16, 8, 8))
    grad = torch.randn(SEQUENCE, BATCH, 16 * HEAD, device="cuda").half()
    rows = []
    for length in (SEQUENCE, 1024, 300):
        positions = (torch.arange(SEQUENCE, device="cuda") % length).expand(BATCH, -1)
        boundaries = document_boundaries(positions)
        visible = (torch.arange(SEQUENCE, device="cuda") // length)[None, None]
        visible = (visible.unsqueeze(-1) == visible.unsqueeze(-2)).tril().expand(BATCH, 1, -1, -1)

        def by_lengths(boundaries: Tensor = boundaries) -> None:
            out = attend_within_documents(query, key, value, boundaries, HEAD**-0.5)
            differentiate(out, [grad], [query, key, value])

        def by_mask(visible: Tensor = visible) -> None:
            parts = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            out = functional.scaled_dot_product_attention(*parts, attn_mask=visible, enable_gqa=True)
            differentiate(out.permute(2, 0, 1, 3).flatten(2), [grad], [query, key, value])

        what = f"attention, documents of {length}"
        rows += [measured(what, "boundaries", by_lengths), measured(what, "dense mask, SDPA", by_mask)]
    return rows


def heads() -> list[Row]:
    """Output matrix, soft-cap and loss."""
    tokens = SEQUENCE * BATCH
    labels = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    weights = torch.ones(tokens, device="cuda")
    hidden, matrix = normal(tokens, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.02)
    scale = 65536.0 / tokens

    def ours(chunk: int) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = matrix.grad = None
            result = linear_cross_entropy(hidden, matrix, labels, weights, LossOptions(cap=CAP, chunk_bytes=chunk))
            (result.total * scale).backward()

        return call

    def liger() -> None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        hidden.grad = matrix.grad = None
        loss = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, matrix, labels, None, None, -100, 0.0, 0.0, "sum", CAP
        )
        (loss[0] * scale).backward()

    def chunked() -> None:
        hidden.grad = matrix.grad = None
        total = sum(
            torch.utils.checkpoint.checkpoint(
                _plain_loss, hidden[i : i + 4096], matrix, labels[i : i + 4096], use_reentrant=False
            )
            for i in range(0, tokens, 4096)
        )
        (total * scale).backward()

    def plain() -> None:
        hidden.grad = matrix.grad = None
        (_plain_loss(hidden, matrix, labels) * scale).backward()

    errors = head_errors()
    rows = [
        measured("output head", f"kernels, {c >> 20} MiB chunks", ours(c), errors["ours"])
        for c in (1 << 30, 5 << 29, 5 << 30)
    ]
    rows.append(measured("output head", "liger", liger, errors["liger"]))
    rows.append(measured("output head", "torch, chunks recomputed", chunked, errors["plain"]))
    rows.append(measured("output head", "torch, all logits in FP32", plain, errors["plain"]))
    rows.append(measured("output head", "its three matrix products", lambda: _three_products(hidden, matrix)))
    return rows


def _plain_loss(hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    logits = CAP * torch.tanh((hidden @ matrix.t()).float() / CAP)
    return functional.cross_entropy(logits, labels, reduction="sum")


def _three_products(hidden: Tensor, matrix: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ matrix.t()
        logits @ matrix
        logits.t() @ hidden


def head_errors() -> dict[str, float]:
    """Relative error of the output matrix's gradient against float64, gradients scaled as a loss scale of 1 would."""
    tokens = 512
    hidden, matrix = normal(tokens, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.02)
    labels = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    exact = _exact_gradient(hidden, matrix, labels)
    errors = {}

    def record(name: str, loss: Callable[[], Tensor]) -> None:
        hidden.grad = matrix.grad = None
        try:
            loss().backward()
            assert matrix.grad is not None
            errors[name] = float((matrix.grad.double() - exact).norm() / exact.norm())
        except ImportError:
            errors[name] = float("nan")

    def liger() -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        result: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, matrix, labels, None, None, -100, 0.0, 0.0, "sum", CAP
        )[0]
        return result

    weights = torch.ones(tokens, device="cuda")
    record("ours", lambda: linear_cross_entropy(hidden, matrix, labels, weights, LossOptions(cap=CAP)).total)
    record("plain", lambda: _plain_loss(hidden, matrix, labels))
    record("liger", liger)
    return errors


def _exact_gradient(hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the output matrix in float64, [v, h]."""
    exact = matrix.detach().double().requires_grad_()
    logits = CAP * torch.tanh((hidden.detach().double() @ exact.t()) / CAP)
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert exact.grad is not None
    return exact.grad


if __name__ == "__main__":
    sys.exit(main())
