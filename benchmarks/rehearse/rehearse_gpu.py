"""Forward passes for a GPU on a machine without one, with torch's fake tensors on device "cuda".

    python benchmarks/rehearse/rehearse_gpu.py [--skip-flex]

Needs a build of torch with CUDA. Where the installed one has none, an environment with it is made
under build/rehearse (4.7 GB, minutes), which takes all other packages from the present one.

Fake tensors have shapes, data types and devices, but no numbers. For each layout, data type
(float32, bfloat16, float16, and both kinds of autocast), with and without LoRA, a small model is
constructed on "cuda" and runs: the reference stage (log-probs of all tokens, without gradients),
the forward pass of a training step with its loss and metrics, and the steps of the in-process
sampler. Backward passes need a CUDA context; tests/compute/test_meta_device.py has them.

Faults are reported by kind: `device` (operands on different devices), `operand` (an index or
operand on the CPU, which a GPU accepts and waits for), `dtype`, `read` (a value read on the host),
`error` (anything else). Then flex attention's kernels for our block tables are generated and
compiled ahead of time for sm_90 and sm_80 (`flex.py`).

Prints a line per case, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "rehearse"
LAYOUTS = (
    *(("shared", "dense"), ("shared", "flex"), ("packed", "sdpa"), ("continued", "sdpa")),
    ("padded", "sdpa"),
)
# Weights' data type, and that of autocast.
DTYPES = (
    *(("float32", None), ("bfloat16", None), ("float16", None)),
    *(("float32", "bfloat16"), ("float32", "float16")),
)


def with_cuda_build() -> None:
    """Go on in an environment whose torch is built with CUDA."""
    import torch

    if torch.version.cuda is not None:
        return
    python = FOLDER / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        # Of equal versions `==` would take the build for CPUs where an index has one.
        wanted = f"torch==={torch.__version__.split('+')[0]}"
        pip = [str(python), "-m", "pip", "install", "--no-compile", wanted, "numpy"]
        subprocess.run(pip, check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            *(),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        others = sysconfig.get_path("purelib")
        Path(own, "zz_others.pth").write_text(f"import sys; sys.path.append({others!r})\n")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def place(error: BaseException | None = None) -> str:
    """file:line of the innermost line of this package, or of the innermost line."""
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    own = [frame for frame in frames if "/gvpo_offline/" in frame.filename] or list(frames)
    name = own[-1].filename.split("/gvpo_offline/")[-1]
    return f"{name}:{own[-1].lineno}"


def kind_of(error: BaseException) -> str:
    """The kind of fault that an error of a fake tensor is."""
    text = f"{type(error).__name__} {error}".lower()
    if "different devices" in text or "same device" in text or "device mismatch" in text:
        return "device"
    if "datadependent" in text or "_local_scalar_dense" in text or "nonzero" in text:
        return "read"
    return "dtype" if "dtype" in text or "scalar type" in text else "error"


@contextlib.contextmanager
def fake_cuda(found: list[dict[str, str]]) -> Iterator[None]:
    """Fake tensors; what is made or put on "cuda" is there. Adds operands on the CPU to `found`."""
    import numpy as np
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def is_cuda(device: Any) -> bool:
        return str(device).startswith("cuda")

    moves = ("_to_copy", "copy_", "_pin_memory")

    mode: Any = TorchDispatchMode

    class Operands(mode):  # type: ignore[misc]
        supports_higher_order_operators = True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            own = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.ndim]
            name = getattr(func, "_schema", func).name
            name = (name() if callable(name) else name).removeprefix("aten::")
            if len({x.device.type for x in own}) > 1 and name not in moves:
                found.append({"kind": "operand", "what": name, "where": place()})
            return func(*args, **(kwargs or {}))

    class Host(TorchFunctionMode):
        """What is computed on the CPU has numbers, which code on the host reads."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.pin_memory:
                return args[0]
            given = tree_leaves((args, kwargs or {}))
            on_cuda = any(
                isinstance(x, FakeTensor) or (isinstance(x, str | torch.device) and is_cuda(x))
                for x in given
            )
            on_cpu = any(isinstance(x, Tensor | np.ndarray) for x in given)
            on_cpu |= str((kwargs or {}).get("device")) == "cpu" or func is torch.tensor
            if on_cuda or not on_cpu:
                return func(*args, **(kwargs or {}))
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))

    pretend_kernels()
    with FakeTensorMode(allow_non_fake_inputs=True), Operands(), Host():
        yield


def pretend_kernels() -> None:
    """Replace flex attention's kernel by shapes, and read the rules of layers with numbers."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from gvpo_offline.compute import attention, flex

    def really(function: Callable[..., Any]) -> Callable[..., Any]:
        """With numbers: a layer's rule is written to and read from tensors on the CPU."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return run

    for name in ("_mask_or_rule", "_rule_from"):
        function = getattr(attention, name)
        if not hasattr(function, "__wrapped__"):
            setattr(attention, name, really(function))
    own: Any = flex
    own._compiled = lambda: own._attend
    own.flex_attention, own.BlockMask = flex_shapes, SimpleNamespace


def flex_shapes(query: Any, key: Any, value: Any, *, block_mask: Any, **more: Any) -> Any:
    """In place of torch's flex attention: checks of its inputs, and the shapes of its results."""
    import torch
    from torch.nn.attention.flex_attention import AuxOutput

    assert query.dtype == key.dtype == value.dtype
    zero = torch.zeros(1, dtype=torch.int32, device=query.device)
    seen = block_mask.mask_mod(zero, zero, zero, zero)
    assert (seen.dtype, seen.device) == (torch.bool, query.device)
    tables = (block_mask.kv_indices, block_mask.full_kv_indices, block_mask.q_indices)
    assert {(own.device, own.dtype) for own in tables} == {(query.device, torch.int32)}
    out = query * 0.0 + value.mean() + key.mean()
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return out[..., : value.shape[-1]], AuxOutput(lse=lse if more["return_aux"].lse else None)


def made_groups() -> list[Any]:
    """Two groups of 4 responses, one of them with a loss mask."""
    import numpy as np

    from gvpo_offline.group import Group

    rng = np.random.default_rng(0)

    def group(name: str, lengths: list[int]) -> Group:
        ids = [rng.integers(3, 250, n).astype(np.int32) for n in (40, *lengths)]
        n = len(lengths)
        return Group(
            name,
            *(ids[0], tuple(ids[1:]), ("a",) * n, (False,) * n),
            rewards=rng.random(n),
            ref_seq_logprobs=rng.normal(-40, 3, n),
            loss_mask=tuple(rng.random(k) < 0.8 for k in lengths) if name == "g1" else None,
        )

    return [group("g0", [30, 45, 17, 60]), group("g1", [25, 25, 130, 9])]


def policy(dtype: str, *, lora: bool) -> Any:
    """A two-layer Qwen3 that is constructed on "cuda"."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda"):
            model: Any = Qwen3ForCausalLM(config)
            if lora:
                from peft import LoraConfig, get_peft_model

                settings = LoraConfig(r=8, target_modules="all-linear")
                # The adapters are made on "cuda"; moving fake tensors there is not possible.
                with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                    model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(before)
    return model


def steps(layout: str, attention: str, autocast: str | None) -> dict[str, Callable[[Any], None]]:
    """The passes of a case, by name; each takes the model."""
    import torch

    from gvpo_offline.compute.engine import Engine
    from gvpo_offline.compute.model import autocast as autocasting
    from gvpo_offline.compute.settings import ComputePath
    from gvpo_offline.losses.checks import deferred_checks
    from gvpo_offline.stream.plan import CostModel
    from gvpo_offline.train.objective import Objective

    groups = made_groups()
    narrow = None if autocast is None else getattr(torch, autocast)
    cuda = torch.device("cuda")
    kinds: Any = (layout, attention, "fused")

    def reference(model: Any) -> None:
        engine = Engine(ComputePath(*kinds), CostModel(layout, 10_000, 100))
        with torch.no_grad(), autocasting(cuda, narrow):
            found = engine.token_logprobs(model.eval(), groups)
        assert {(own.device.type, own.dtype) for own in found} == {("cuda", torch.float32)}

    def training(model: Any) -> None:
        entropies: list[torch.Tensor] = []
        engine = Engine(
            ComputePath(*kinds), CostModel(layout, 10_000, 100), on_entropy=entropies.append
        )
        with autocasting(cuda, narrow):
            logprobs = engine.seq_logprobs(model.train(), groups)
        assert logprobs.dtype == torch.float64
        with deferred_checks() as checks:
            result = Objective(0.1, imitation=0.1)(logprobs, groups)
        assert len(checks) == 1
        assert result.loss.device.type == result.statistics.sums.device.type == "cuda"
        assert result.loss.requires_grad

    def pieces(model: Any) -> None:
        engine = Engine(ComputePath(*kinds), CostModel(layout, 120, 100))
        with torch.no_grad(), autocasting(cuda, narrow):
            found = engine.seq_logprobs(model.train(), groups[:1])
        assert found.shape == (4,)

    return {"reference": reference, "training": training, "pieces": pieces}


def sampling(dtype: str) -> Callable[[Any], None]:
    """Prefill, and the draws of two tokens, without reading them."""

    def sampled(model: Any) -> None:
        import numpy as np
        import torch
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        from gvpo_offline.sampling import decode as module

        decode: Any = module

        filters = [RepetitionPenaltyLogitsProcessor(1.1), TopKLogitsWarper(20)]
        processors = LogitsProcessorList([*filters, TopPLogitsWarper(0.9)])
        rules = decode.DecodingRules(processors, False, frozenset({2}), 8)
        decoder = decode.Decoder(model.eval(), rules, batch_size=4, max_batch_tokens=1000)
        prompts = [np.arange(3, 9, dtype=np.int32), np.arange(4, 14, dtype=np.int32)]
        work = [decode.Completion(prompts[i % 2], seed=i) for i in range(4)]
        kept = decode.read
        decode.read = lambda ids, logprobs: ([3] * len(ids), [0.0] * len(ids))
        try:
            with torch.no_grad():
                batch = decoder._prefill(work)
                for _ in range(2):
                    decoder._append_tokens(batch, decoder._next_logits(batch))
        finally:
            decode.read = kept
        assert batch.ids_BT.device.type == "cuda"
        assert batch.ids_BT.shape == (4, 13)

    return sampled


def cases() -> Iterator[tuple[dict[str, Any], dict[str, Callable[[Any], None]]]]:
    """Of each case a description and its passes."""
    for layout, attention in LAYOUTS:
        for dtype, autocast in DTYPES:
            for lora in (False, True):
                about: dict[str, Any] = {"layout": layout, "attention": attention}
                about |= {"dtype": dtype, "autocast": autocast, "lora": lora}
                yield about, steps(layout, attention, autocast)
    for dtype in ("float32", "bfloat16", "float16"):
        yield {"sampler": True, "dtype": dtype, "lora": False}, {"sampling": sampling(dtype)}


def rehearse(about: dict[str, Any], passes: dict[str, Callable[[Any], None]]) -> dict[str, Any]:
    """Run a case; what it is, and its faults."""
    from gvpo_offline.compute.attention import use_tree_attention
    from gvpo_offline.compute.forward import causal_lm, install

    faults: list[dict[str, str]] = []
    with fake_cuda(faults):
        model = policy(about["dtype"], lora=about["lora"])
        if about.get("layout") == "shared":
            use_tree_attention(causal_lm(model))
        install(model)
        for name, run in passes.items():
            before = len(faults)
            try:
                run(model)
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                faults.append(
                    {
                        "kind": kind_of(error),
                        "what": f"{type(error).__name__}: {text[0][:200]}",
                        "where": place(error),
                    }
                )
            for fault in faults[before:]:
                fault["pass"] = name
    return {**about, "passes": list(passes), "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-flex", action="store_true", help="without flex attention's kernels")
    args = parser.parse_args()
    with_cuda_build()
    import torch

    kinds: Counter[str] = Counter()
    results = []
    for about, passes in cases():
        found = rehearse(about, passes)
        results.append(found)
        kinds.update(fault["kind"] for fault in found["faults"])
        text = " ".join(f"{name}={value}" for name, value in about.items())
        print(f"{text}: {len(found['faults']) or 'no'} faults", flush=True)
        for fault in {json.dumps(fault): fault for fault in found["faults"]}.values():
            print(f"    {fault['pass']}: {fault['kind']} at {fault['where']}: {fault['what']}")
    summary: dict[str, Any] = {
        "torch": torch.__version__,
        "cases": len(results),
        "passes": sum(len(found["passes"]) for found in results),
        "faults": dict(kinds),
        "faulty": [found for found in results if found["faults"]],
    }
    if not args.skip_flex:
        from flex import compiled_kernels

        summary["flex"] = compiled_kernels()
    print(json.dumps(summary))
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
