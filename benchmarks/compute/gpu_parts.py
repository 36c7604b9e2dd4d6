"""Cases of `make bench-gpu` that measure one part: attention, the output head, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import EOS, Case, ModelShape, make_group
from ours import as_group
from shapes import build_model
from torch import Tensor
from torch.nn import functional
from worker import measure

from gvpo_offline.compute.attention import _KERNELS, AttentionInputs, PackedRow, kernels
from gvpo_offline.compute.fused import LogitTerm, fused_pair_logprobs
from gvpo_offline.compute.layout import lay_out
from gvpo_offline.compute.tree import AttentionRule

Report = Callable[..., None]
_TINY = ModelShape("tiny", "qwen2", 2, 64, 128, 4, 2, 16, 500)
_B15 = ModelShape("1.5B", "qwen2", 28, 1536, 8960, 12, 2, 128, 151_936, dtype="bfloat16")


def attention(device: str, tiny: bool, report: Report) -> None:
    """One layer's attention over a group: every kernel of the package for this device, and two
    variable-length calls whose results are merged by their log-sum-exp (forward only, because
    torch's function ignores the gradient of its log-sum-exp)."""
    shape = _TINY if tiny else _B15
    case = Case(shape, 16 if tiny else 512, 8 if tiny else 1024, 4 if tiny else 16)
    layout = lay_out([as_group(make_group(case))], "shared")
    tree: Any = layout.input.tree  # type: ignore[union-attr]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)

    def randoms(heads: int) -> Tensor:
        drawn = torch.randn(1, heads, tree.n_rows, shape.head_dim, device=device, dtype=dtype)
        return drawn.requires_grad_()

    query, key, value = randoms(shape.n_heads), randoms(shape.n_kv_heads), randoms(shape.n_kv_heads)
    inputs = AttentionInputs(query, key, value, shape.head_dim**-0.5, None, None)
    truth: Tensor | None = None
    for kernel in reversed(kernels(torch.device(device))):  # dense, the definition, first
        row = PackedRow(tree, kernel)

        def forward(kernel: str = kernel, row: PackedRow = row) -> Tensor:
            return _KERNELS[kernel](row, AttentionRule(), inputs)

        try:
            out = forward()
            out.float().square().sum().backward()  # compiles
            found = {"forward_seconds": _seconds(forward, device)}
            both = measure(lambda run=forward: run().float().square().sum().backward(), device)
        except torch.OutOfMemoryError:
            report(**{kernel: "out of memory"})
            continue
        truth = out.detach() if truth is None else truth
        error = float((out.detach() - truth).abs().max())
        peak = both["peak_bytes"]
        report(**{kernel: {**found, "seconds": both["wall"], "peak_bytes": peak, "error": error}})
    try:
        merged = _varlen_and_merge(case, inputs, device)
        found = {"forward_seconds": _seconds(merged, device)}
        if truth is not None:
            found["error"] = float((merged() - truth).abs().max())
        report(**{"varlen and merge": found})
    except Exception as error:
        report(**{"varlen and merge": f"skipped: {type(error).__name__}: {error}"[:300]})


def _varlen_and_merge(case: Case, inputs: AttentionInputs, device: str) -> Callable[[], Tensor]:
    """Prompt and responses as causal sequences, the responses over the prompt, and the merge."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if device != "cuda":
        raise RuntimeError("torch's varlen_attn needs a GPU")
    lengths = [n - 1 for n in case.response_lengths]
    stops = np.cumsum([0, case.prompt, *lengths]).tolist()
    segments = torch.tensor(stops, dtype=torch.int32, device=device)
    longest = max(case.prompt, *lengths)
    one = torch.tensor([0, sum(lengths)], dtype=torch.int32, device=device)
    keys = torch.tensor([0, case.prompt], dtype=torch.int32, device=device)
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    query, key, value = (x.detach()[0].transpose(0, 1).contiguous() for x in inputs[:3])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    aux = AuxRequest(lse=True)

    def run() -> Tensor:
        own, own_lse = varlen_attn(
            *(query, key, value, segments, segments, longest, longest),
            return_aux=aux,
            window_size=(-1, 0),
        )
        below = query[case.prompt :]
        above, above_lse = varlen_attn(
            *(below, key[: case.prompt], value[: case.prompt], one, keys),
            *(len(below), case.prompt),
            return_aux=aux,
        )
        share = torch.sigmoid(above_lse - own_lse[:, case.prompt :]).T[..., None]
        tail = torch.lerp(own[case.prompt :].float(), above.float(), share).to(own.dtype)
        return torch.cat([own[: case.prompt], tail])[None]

    return run


def head(device: str, tiny: bool, report: Report) -> None:
    """The fused head against torch's linear cross-entropy: forward and backward."""
    rows, width, vocabulary = (32, 64, 500) if tiny else (16_384, 1536, 151_936)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, dtype=dtype) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    number = torch.arange(rows, device=device)

    def fused() -> Tensor:
        parts = [LogitTerm(hidden, weight)]
        found = fused_pair_logprobs(
            parts, number, targets, matmul_dtype=dtype, kept_bytes=512 << 20
        )
        return -found.logprobs_N.sum()

    def plain() -> Tensor:
        return functional.cross_entropy(
            functional.linear(hidden, weight).float(), targets, reduction="sum"
        )

    ways: dict[str, Callable[[], Tensor] | None] = {"fused": fused, "logits": plain}
    torchs = getattr(functional, "linear_cross_entropy", None)
    if torchs is None:
        report(linear_cross_entropy=f"skipped: torch {torch.__version__} has none")
    else:
        ways["linear_cross_entropy"] = lambda: torchs(hidden, weight, targets, reduction="sum")
    for name, way in ways.items():

        def step(way: Any = way) -> None:
            hidden.grad = weight.grad = None
            way().backward()

        try:
            step()
            found = measure(step, device)
            found["loss"] = float(way().detach())  # type: ignore[misc]
            report(**{name: found})
        except torch.OutOfMemoryError:
            report(**{name: "out of memory"})


def sampling(device: str, tiny: bool, report: Report) -> None:
    """The in-process sampler: generated tokens a second."""
    from transformers import LogitsProcessorList

    from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules

    shape = _TINY if tiny else _B15
    n_prompts, n_each, n_new = (2, 2, 4) if tiny else (8, 8, 128)
    model = build_model(shape, device).eval()
    rules = DecodingRules(LogitsProcessorList(), False, frozenset({EOS}), n_new)
    decoder = Decoder(model, rules, batch_size=n_prompts * n_each, max_batch_tokens=1 << 18)
    decoder.probe()
    prompts = np.random.default_rng(0).integers(2, shape.vocab_size, (n_prompts, 64), np.int32)
    asked = [
        Completion(prompt, seed=i * n_each + j)
        for i, prompt in enumerate(prompts)
        for j in range(n_each)
    ]
    started = time.perf_counter()
    n_tokens = sum(len(completion.ids) for completion in decoder.run(asked))
    seconds = time.perf_counter() - started
    report(n_tokens=n_tokens, seconds=seconds, tokens_per_second=n_tokens / seconds)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Wall seconds of a forward pass, the second of two."""
    with torch.no_grad():
        run()
        return measure(run, device)["wall"]
