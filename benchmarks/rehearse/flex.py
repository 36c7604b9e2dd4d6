"""Flex attention for our block tables, compiled ahead of time for a GPU that is not there.

    python benchmarks/rehearse/flex.py 90 [--no-gradient]

Dynamo traces `flex._attend` with fake tensors on "cuda", Inductor makes Triton kernels of it, and
Triton compiles these with its own ptxas to machine code for sm_90 or sm_80. What asks the driver is
answered from data sheets. The step after, loading the machine code, needs a driver: there it ends.

Prints one JSON object: bytes of machine code by kernel, and what stopped it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Multiprocessors, and shared memory of a block in bytes: H100 and A100.
SHEETS = {90: (132, 232_448), 80: (108, 166_912)}


def compiled_kernels() -> dict[str, Any]:
    """The results for sm_90 and sm_80, without and with gradients, each in its own process."""
    found: dict[str, Any] = {}
    for arch in SHEETS:
        for more in ([], ["--no-gradient"]):
            name = f"sm_{arch}" + (" forward only" if more else "")
            with tempfile.TemporaryDirectory() as cache:
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                env |= {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
                command = [sys.executable, __file__, str(arch), *more]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            found[name] = json.loads(lines[-1]) if lines else {"stopped": done.stderr[-500:]}
            print(f"flex attention, {name}: {found[name]}", flush=True)
    return found


def data_sheet(arch: int) -> Any:
    """The properties of a GPU as its driver gives them."""
    multiprocessors, shared = SHEETS[arch]
    return SimpleNamespace(
        name=f"sm_{arch}",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=multiprocessors,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=shared,
        gcnArchName="",
        L2_cache_size=50 << 20,
    )


@contextlib.contextmanager
def pretended(arch: int, found: dict[str, int]) -> Any:
    """Answers of a driver for a GPU of an architecture; notes the kernels that are compiled."""
    import torch
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics

    triton: Any = importlib.import_module("triton")
    GPUTarget: Any = importlib.import_module("triton.backends.compiler").GPUTarget

    multiprocessors, shared = SHEETS[arch]
    sheet = data_sheet(arch)
    of_triton = {"max_shared_mem": shared, "multiprocessor_count": multiprocessors}
    of_triton |= {"max_num_regs": 65_536, "warpSize": 32}
    driver: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda device: of_triton),
        launcher_cls=None,
    )
    triton.runtime.driver.set_active(driver)
    compile_kernel = triton.compile

    def compiled(source: Any, *args: Any, **kwargs: Any) -> Any:
        out = compile_kernel(source, *args, **kwargs)
        found[source.name] = len(out.asm["cubin"])
        return out

    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "_get_device_properties": lambda *_: sheet,
        "get_device_properties": lambda *_, **__: sheet,
        "get_device_capability": lambda *_, **__: (arch // 10, arch % 10),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: state,
        "set_rng_state": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        # It makes patterns of attention with real tensors on the device.
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init"))
        stack.enter_context(mock.patch.object(helpers, "set_driver_to_gpu"))
        own: Any = heuristics
        stack.enter_context(mock.patch.object(own.triton, "compile", compiled))
        # Launchers load the machine code.
        tuner: Any = heuristics.CachingAutotuner
        stack.enter_context(mock.patch.object(tuner, "_make_launchers"))
        yield


def main() -> None:
    arch, gradient = int(sys.argv[1]), "--no-gradient" not in sys.argv
    import numpy as np
    import torch
    from torch._functorch import config
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gvpo_offline.compute import flex
    from gvpo_offline.compute.layout import packed
    from gvpo_offline.compute.tree import AttentionRule
    from gvpo_offline.group import Group

    config.force_non_lazy_backward_lowering = True  # backward() would need a context
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 99, n).astype(np.int32) for n in (200, 90, 120, 150)]
    group = Group("g", ids[0], tuple(ids[1:]), ("a",) * 3, (False,) * 3)
    tree: Any = packed([group]).input.tree  # type: ignore[union-attr]
    plan = flex.FlexPlan(tree, AttentionRule(), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_cuda(like: Any) -> torch.Tensor:
            made = torch.empty_strided(
                tuple(like.shape), like.stride(), dtype=like.dtype, device="cuda"
            )
            return made

        inputs = [
            torch.empty(1, heads, tree.n_rows, 128, device="cuda", dtype=torch.bfloat16)
            for heads in (16, 8, 8)
        ]
        rows = type(plan.rows)(*map(on_cuda, plan.rows))
        blocks = type(plan.blocks)(*map(on_cuda, plan.blocks))
    for tensor in inputs:
        tensor.requires_grad_(gradient)
    found: dict[str, int] = {}
    stopped = ""
    with pretended(arch, found):
        try:
            run: Any = torch.compile(flex._attend, fullgraph=True)
            run(*inputs, rows, blocks, 0.125, None, None)
        except Exception as error:
            stopped = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    print(json.dumps({"cubin_bytes": found, "stopped": stopped}))


if __name__ == "__main__":
    main()
