"""The benchmark for a GPU that is available for a short time: `make bench-gpu`.

    python benchmarks/compute/gpu.py                     # at most 9 minutes on one GPU
    python benchmarks/compute/gpu.py --device cpu --tiny # rehearsal: every case, tiny shapes

Cases run in the order of their importance, each in a process of its own with a time limit. The
result of a case is appended to `results.jsonl` and synced before the next case starts. A case that
crashes, runs out of memory or out of time loses only its own figures. Run again, finished cases are
not repeated. The last line is a JSON object with the goals. README.md describes the cases.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MINUTES = 9.0
_CLOSING_SECONDS = 5.0  # left for the last lines
_STARTUP_SECONDS = 20.0  # a case is not started with less time than this
WHEELS_PYTHON = "3.12"
# What TRL and the package's trainer need beside torch, transformers and accelerate, with what these
# bring. The versions of pyarrow and pandas are those whose wheels fit into 64 MiB together; newer
# versions of datasets need a newer pyarrow.
WHEELS = (
    *("trl==1.16.0", "peft==0.21.0", "datasets==4.7.0", "pyarrow==21.0.0", "pandas==2.3.3"),
    *("dill==0.4.0", "multiprocess==0.70.18", "xxhash", "python-dateutil", "six", "pytz", "tzdata"),
    *("requests", "urllib3", "idna", "certifi", "charset-normalizer"),
    *("httpx", "httpcore", "h11", "anyio", "sniffio"),
)
WHEELS_BYTES = 64 * 2**20


def write_wheels(folder: Path) -> None:
    """Download the wheels for the GPU machine.

    Raises:
        SystemExit: they have more than 64 MiB.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--only-binary=:all:", "--python-version", WHEELS_PYTHON]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *WHEELS], check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    print(f"{size / 2**20:.1f} MiB of wheels in {folder}")
    if size > WHEELS_BYTES:
        raise SystemExit(f"the wheels have {size} bytes; at most {WHEELS_BYTES} can be carried")


def install_wheels(wheels: Path, folder: Path) -> str:
    """Install carried wheels without a network, behind the machine's own packages in the path.

    Returns:
        What was done, in words.
    """
    if not any(wheels.glob("*.whl")):
        return f"no wheels in {wheels}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        done = subprocess.run(
            [*command, "--target", str(folder), *map(str, wheels.glob("*.whl"))],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return f"the wheels could not be installed: {done.stderr.strip()[-500:]}"
    sys.path.append(str(folder))
    return f"wheels of {wheels} installed into {folder}{_without_broken_datasets(folder)}"


def _without_broken_datasets(folder: Path) -> str:
    """Remove a `datasets` that cannot be imported: transformers' Trainer would fail with it."""
    if not (folder / "datasets").exists():
        return ""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))
    done = subprocess.run(
        [sys.executable, "-c", "import datasets"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return ""
    shutil.rmtree(folder / "datasets")
    for record in folder.glob("datasets-*.dist-info"):
        shutil.rmtree(record)
    return f", without datasets, which cannot be imported: {done.stderr.strip()[-300:]}"


def finished(results: Path) -> dict[str, dict[str, Any]]:
    """The results of earlier runs by case, without those that ended early and may be repeated.

    A last line that a crash cut off is ignored.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["status"] in ("done", "skipped"):
            found[result["case"]] = result
    return found


def append(results: Path, result: dict[str, Any]) -> None:
    """Append one result as a line and wait until it is on the disk."""
    with results.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that a crash cut off
                file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def start_method(device: str) -> str:
    """How processes of cases are started.

    A fork of this process, which has imported torch and has not touched the device, starts at
    once. Some drivers refuse a fork; then each case imports all packages itself.
    """
    if device == "cpu":
        return "fork"
    child = multiprocessing.get_context("fork").Process(target=_touch)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    return "fork" if child.exitcode == 0 else "spawn"


def _touch() -> None:
    import torch

    torch.zeros(1, device="cuda").add_(1).item()


def run_case(
    case: str, device: str, tiny: bool, seconds: float, log: Path, method: str = "fork"
) -> dict[str, Any]:
    """Run one case in a process of its own for at most `seconds`."""
    context: Any = multiprocessing.get_context(method)
    answers, answer = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(case, device, tiny, answer, log))
    started = time.perf_counter()
    child.start()
    answer.close()
    partial: dict[str, Any] = {}
    status: dict[str, Any] = {"status": "out of time", "reason": f"limit of {seconds:.0f} s"}
    try:
        while answers.poll(max(0.0, started + seconds - time.perf_counter())):
            kind, value = answers.recv()
            if kind == "figures":
                partial |= value
            else:
                status = value
                break
    except EOFError:
        child.join()
        status = {"status": "crashed", "reason": f"the process ended with {child.exitcode}"}
    _end(child)
    taken = round(time.perf_counter() - started, 1)
    return {"case": case, **status, "seconds": taken, "figures": partial}


def _end(child: Any) -> None:
    """End a case's process and what it started."""
    child.join(2.0)
    if child.is_alive():
        # The child leads a process group of its own from its first statement on.
        if os.getpgid(child.pid) == child.pid:
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def _in_child(case: str, device: str, tiny: bool, answer: Any, log: Path) -> None:
    os.setpgid(0, 0)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from gpu_cases import CASES
    from gpu_goals import CaseSkippedError

    found: dict[str, Any]
    try:
        if device == "cuda":
            answer.send(("figures", {"device_name": torch.cuda.get_device_name()}))
        CASES[case](device, tiny, lambda **figures: answer.send(("figures", figures)))
        found = {"status": "done"}
    except CaseSkippedError as error:
        found = {"status": "skipped", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        found = {"status": "out of memory", "reason": str(error)[:300]}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    answer.send(("end", found))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases that have no result yet; returns the object of the last line."""
    started = time.perf_counter()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    print(install_wheels(Path(arguments.wheels), folder / "packages"), flush=True)
    from gpu_cases import CASES, SECONDS, environment
    from gpu_goals import goals

    unknown = set(arguments.only or ()) - set(CASES)
    if unknown:
        raise SystemExit(f"no such case: {sorted(unknown)}; the cases are {list(CASES)}")
    results = folder / ("results-tiny.jsonl" if arguments.tiny else "results.jsonl")
    done = finished(results)
    log = folder / "gpu.log"
    deadline = started + 60 * arguments.minutes - _CLOSING_SECONDS
    outcomes = dict(done)
    method = start_method(arguments.device)
    for case in arguments.only or CASES:
        if case in done:
            print(f"{case}: finished before", flush=True)
            continue
        left = deadline - time.perf_counter()
        if left < (1.0 if arguments.tiny else _STARTUP_SECONDS):
            print(f"{case}: no time left", flush=True)
            continue
        limit = min(left, SECONDS[case])
        result = run_case(case, arguments.device, arguments.tiny, limit, log, method)
        result["machine"] = environment(arguments.device)
        append(results, result)
        outcomes[case] = result
        print(json.dumps(result), flush=True)
    return {
        "device": arguments.device,
        "tiny": arguments.tiny,
        "cases": {case: outcomes.get(case, {}).get("status", "not run") for case in CASES},
        "goals": goals({} if arguments.tiny else outcomes),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check that it runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time budget of this run")
    parser.add_argument("--only", nargs="+", help="names of the cases to run")
    default = ROOT / "runs" / "bench-gpu"
    parser.add_argument("--output", default=str(default), help="folder of results and log")
    parser.add_argument("--wheels", default=str(default / "wheels"), help="folder of wheels")
    parser.add_argument("--write-wheels", action="store_true", help="download the wheels and end")
    arguments = parser.parse_args()
    if arguments.write_wheels:
        write_wheels(Path(arguments.wheels))
    else:
        print(json.dumps(run(arguments)))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    # Before torch is imported; cases inherit them.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Without this, asking whether there is a GPU initialises CUDA, which forbids a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
