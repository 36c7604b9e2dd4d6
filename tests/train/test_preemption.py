"""A signal ends a run at a step boundary with a complete checkpoint, on all ranks; and one run at a
time writes to a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import Child, ForkServer
from support.training import same_weights, scored_dataset, train_command, trainer_of, weights_of
from transformers import TrainerCallback

from gvpo_offline import GVPOTrainer
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import is_sealed
from gvpo_offline.train.run_folder import read_events
from gvpo_offline.train.stopping import RunStopped, stop_requests

N_STEPS = 6
ENDLESS = {"max_steps": 1_000_000, "eval_strategy": "no", "save_steps": 1_000_000}


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Handlers of other tests' libraries, such as Ray's for SIGTERM, would stay in a run."""
    before = {own: signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGUSR1)}
    for own in before:
        signal.signal(own, signal.SIG_DFL)
    yield
    for own, handler in before.items():
        signal.signal(own, handler)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


class Signals(TrainerCallback):
    """Sends signals to this process at the begin of a step, counted from 1."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def run_of(
    dataset: GroupDataset, model: Path, folder: Path, *callbacks: Any, **changes: Any
) -> GVPOTrainer:
    settings: dict[str, Any] = {"groups_per_step": 4, "max_steps": N_STEPS, **changes}
    return trainer_of(model, dataset, folder, callbacks=list(callbacks), **settings)


def sealed(folder: Path) -> list[str]:
    return sorted(own.name for own in folder.glob("checkpoint-*") if is_sealed(own))


# ---- in Python ----


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    """The signal comes in step 3; a second one changes nothing. The exit status is that of the
    first. The handlers of the program are as before. Also without a strategy of saving.
    """
    handlers = [signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGUSR1)]
    stopped = run_of(dataset, tiny_model_dir, tmp_path / "stopped", Signals(3, *numbers))
    with pytest.raises(RunStopped) as caught:
        stopped.train()
    assert caught.value.code == 128 + numbers[0]
    assert caught.value.checkpoint == tmp_path / "stopped" / "checkpoint-3"
    assert [signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert sealed(tmp_path / "stopped") == ["checkpoint-3"]
    end = read_events(tmp_path / "stopped")[-1]
    assert (end["kind"], end["complete"], end["checkpoint"]) == ("end", False, "checkpoint-3")
    assert end["signal"] == signal.Signals(numbers[0]).name
    again = run_of(dataset, tiny_model_dir, tmp_path / "stopped")
    again.train(resume_from_checkpoint="auto")
    whole = run_of(dataset, tiny_model_dir, tmp_path / "whole")
    whole.train()
    assert same_weights(weights_of(again), weights_of(whole))


def test_an_evaluation_at_the_step_of_the_signal_is_made_up_for(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Evaluations at steps 2, 4 and 6, a signal in step 4: the resumed run evaluates at step 4
    first. Both runs know the same best step.
    """
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_explained_variance",
        "greater_is_better": False,
        "eval_fraction": 0.3,
    }
    run = run_of(dataset, tiny_model_dir, tmp_path / "1", Signals(4, signal.SIGTERM), **settings)
    with pytest.raises(RunStopped):
        run.train()
    again = run_of(dataset, tiny_model_dir, tmp_path / "1", **settings)
    again.train(resume_from_checkpoint=True)
    whole = run_of(dataset, tiny_model_dir, tmp_path / "2", **settings)
    whole.train()

    def evaluations(trainer: GVPOTrainer) -> list[tuple[int, float]]:
        history = trainer.state.log_history
        return [(own["step"], own["eval_loss"]) for own in history if "eval_loss" in own]

    assert [step for step, _ in evaluations(whole)] == [2, 4, 6]
    assert evaluations(again) == evaluations(whole)
    assert again.state.best_global_step == whole.state.best_global_step
    assert same_weights(weights_of(again), weights_of(whole))


def test_a_signal_in_the_last_step_ends_a_whole_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    run = run_of(dataset, tiny_model_dir, tmp_path, Signals(N_STEPS, signal.SIGTERM))
    run.train()
    assert run.state.global_step == N_STEPS


def test_a_signal_before_the_first_step_leaves_a_folder_that_can_be_begun_again(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Early(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped) as caught:
        run_of(dataset, tiny_model_dir, tmp_path, Early()).train()
    assert (caught.value.code, caught.value.step) == (143, None)
    assert not list(tmp_path.glob("checkpoint-*"))
    again = run_of(dataset, tiny_model_dir, tmp_path, max_steps=1)
    again.train()
    assert again.state.global_step == 1


def test_a_signal_with_a_handler_of_its_own_keeps_it() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with stop_requests(["SIGUSR1", "usr2"]) as requests:
            requests.waits = True
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (received, requests.number) == ([signal.SIGUSR1], 0)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert requests.number == signal.SIGUSR2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_jit_checkpoints_of_transformers_are_refused_with_the_reason(tmp_path: Path) -> None:
    from support.training import config_of

    with pytest.raises(ConfigError, match="stop_signals"):
        config_of(tmp_path, enable_jit_checkpoint=True)


def test_workers_that_read_ahead_outlive_a_signal_to_the_whole_job(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A scheduler signals every process: the two workers as well."""
    import multiprocessing

    class ToAll(Signals):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == self.step:
                workers = multiprocessing.active_children()
                assert len(workers) == 2
                for worker in workers:
                    assert worker.pid is not None
                    os.kill(worker.pid, signal.SIGTERM)
            super().on_step_begin(args, state, control, **kwargs)

    run = run_of(
        dataset,
        tiny_model_dir,
        tmp_path,
        ToAll(2, signal.SIGTERM),
        dataloader_num_workers=2,
    )
    with pytest.raises(RunStopped):
        run.train()
    assert sealed(tmp_path) == ["checkpoint-2"]


# ---- the command ----


def until(holds: Callable[[], bool], child: Child) -> None:
    """Wait until something holds; the child must not end before."""
    begun = time.monotonic()
    while not holds():
        os.kill(child.pid, 0)
        assert time.monotonic() - begun < 300, child.output
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


@pytest.fixture
def endless(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> Iterator[tuple[Child, list[str]]]:
    """A run without end, past its second step, and its arguments."""
    command = train_command(dataset, tiny_model_dir, tmp_path / "run", **ENDLESS)
    child = server.start(command)
    until(lambda: steps_of(tmp_path / "run") >= 2, child)
    yield child, command
    with contextlib.suppress(ProcessLookupError):
        child.kill()


def test_the_command_says_what_is_kept_and_how_to_go_on(
    endless: tuple[Child, list[str]], tmp_path: Path, server: ForkServer
) -> None:
    """While it trains, a second training and a search in its folder are refused in a line, before
    a model is loaded. SIGTERM then ends it with status 143.
    """
    child, command = endless
    for second in (command, ["tune", *command[1:]]):
        status, output = server.run(second)
        assert status == 1
        assert "one training or search at a time runs in a folder" in output
        assert len(output.strip().splitlines()) == 1, output
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143
    (name,) = sealed(tmp_path / "run")
    assert f"SIGTERM ended the run after step {int(name.split('-')[1]):,}" in child.output
    assert f"{name} is complete" in child.output
    assert "--resume_from_checkpoint auto" in child.output
    assert "the trained policy" not in child.output
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_killed_run_frees_its_folder(
    endless: tuple[Child, list[str]],
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    child, _ = endless
    child.kill()
    assert child.wait() == -9
    again = train_command(
        dataset, tiny_model_dir, tmp_path / "run", max_steps=1, eval_strategy="no"
    )
    status, output = server.run(again)
    assert status == 0, output


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Rank 1 alone receives SIGUSR1, which Slurm is often told to send."""
    command = train_command(dataset, tiny_model_dir, tmp_path, **ENDLESS)
    first, second = server.start_ranks(command, 2)
    until(lambda: steps_of(tmp_path) >= 2, first)
    os.kill(second.pid, signal.SIGUSR1)
    assert (first.wait(), second.wait()) == (138, 138), first.output + second.output
    (name,) = sealed(tmp_path)
    assert f"{name} is complete" in first.output
    assert "to go on" not in second.output


def launch() -> None:
    """A launcher of two ranks, which waits for them; `sys.argv` has the command."""
    import socket
    import sys

    from gvpo_offline import cli

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        if os.fork() == 0:
            given = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}
            os.environ.update({name: str(value) for name, value in given.items()})
            os._exit(cli.main(sys.argv[1:]))
    while True:
        time.sleep(1)


def test_ranks_end_by_themselves_when_their_launcher_is_killed(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """They stop as by SIGTERM. Until then the folder is locked; afterwards the run goes on."""
    command = train_command(dataset, tiny_model_dir, tmp_path, **ENDLESS)
    launcher = server.start(command, program="train.test_preemption:launch")
    until(lambda: steps_of(tmp_path) >= 2, launcher)
    launcher.kill()
    launcher.wait()
    status, output = server.run(command)
    assert (status, "one training or search" in output) == (1, True), output
    begun = time.monotonic()
    while not sealed(tmp_path):
        assert time.monotonic() - begun < 300, launcher.output
        time.sleep(0.05)
    (name,) = sealed(tmp_path)
    until(lambda: f"{name} is complete" in launcher.output, server.start(["--version"]))
    assert "the process that launched this rank is gone" in launcher.output


def signal_while_loading() -> None:
    """Run the command; SIGTERM arrives when the policy is loaded."""
    import sys

    from gvpo_offline import cli
    from gvpo_offline.commands import train

    load = train.load_policy

    def signalled(*args: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*args, **settings)

    train.load_policy = signalled
    sys.exit(cli.main(sys.argv[1:]))


def test_a_signal_while_a_model_is_loaded(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """The status tells of it, and the same command begins the run afterwards."""
    command = train_command(dataset, tiny_model_dir, tmp_path, max_steps=1, eval_strategy="no")
    child = server.start(command, program="train.test_preemption:signal_while_loading")
    assert child.wait() == 143
    assert "SIGTERM ended the run before its first step: no checkpoint was written" in child.output
    status, output = server.run(command)
    assert status == 0, output


def test_a_signal_ends_a_search_and_keeps_finished_trials(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """It comes after the range test, in the first trial, which is given up: a trial of a million
    steps cannot end before.
    """
    settings = {**ENDLESS, "tune_steps": 1_000_000, "eval_fraction": 0.4, "betas": "[0.1, 0.5]"}
    command = ["tune", *train_command(dataset, tiny_model_dir, tmp_path, **settings)[1:]]
    at = command.index("--eval_dataset")
    del command[at : at + 2]
    child = server.start(command, program="train.test_preemption:signal_in_trial")
    assert child.wait() == 143, child.output
    assert "SIGTERM ended the search: finished trials are kept" in child.output
    assert "to go on: gvpo-offline tune" in child.output
    assert [own.name[:5] for own in (tmp_path / "tune" / "trials").iterdir()] == ["range"]
    assert not list(tmp_path.glob("checkpoint-*"))


def signal_in_trial() -> None:
    """Run the command with a short range test; SIGTERM arrives in step 2 of the first trial."""
    import sys

    from gvpo_offline import cli
    from gvpo_offline.tune.search import RangePoint
    from gvpo_offline.tune.trials import RangeTestTrainer, TrialTrainer

    step = TrialTrainer.training_step

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    points = [RangePoint(1e-6 * 2**i, 1.0 / (i + 1)) for i in range(20)]
    RangeTestTrainer.run_range_test = lambda self: points  # type: ignore[method-assign]
    TrialTrainer.training_step = signalled  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))


# ---- one run in a folder ----


def test_a_second_trainer_in_the_folder_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from gvpo_offline.files import lock_folder

    handle = lock_folder(tmp_path)
    assert handle is not None
    trainer = run_of(dataset, tiny_model_dir, tmp_path, max_steps=1)
    with pytest.raises(DataError, match="one training or search at a time"):
        trainer.train()
    os.close(handle)
    trainer.train()


def test_a_save_of_the_trained_policy_completes(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """SIGTERM arrives while the weights of the trained policy are written: the run is whole, and
    its exit status is 0.
    """
    command = train_command(
        dataset, tiny_model_dir, tmp_path, max_steps=1, save_strategy="no", eval_strategy="no"
    )
    child = server.start(command, program="train.test_preemption:signal_in_save")
    assert child.wait() == 0, child.output
    assert "the trained policy" in child.output
    assert load_file(tmp_path / "model.safetensors")


def signal_in_save() -> None:
    """Run the command; SIGTERM arrives in `GVPOTrainer.save_model`."""
    import sys

    from gvpo_offline import cli

    save = GVPOTrainer.save_model

    def signalled(self: Any, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *args, **kwargs)

    GVPOTrainer.save_model = signalled  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))


# ---- what is not finite, on several ranks ----


def fault_on_the_second_rank() -> None:
    """Run the command; in step 2 the hidden states of rank 1 alone are not finite."""
    import sys

    from gvpo_offline import cli

    step = GVPOTrainer.training_step

    def faulty(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        wrong = os.environ["RANK"] == "1" and self.state.global_step == 1
        embedding = self.model.get_input_embeddings()
        hook = embedding.register_forward_hook(
            lambda module, given, out: out * torch.nan if wrong else out
        )
        try:
            return step(self, model, inputs, *args)
        finally:
            hook.remove()

    GVPOTrainer.training_step = faulty  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))


@pytest.mark.parametrize("way", [{}, {"fsdp": "true"}], ids=["ddp", "fsdp2"])
def test_ranks_skip_and_stop_together(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer, way: Any
) -> None:
    """With skip both ranks finish all 3 steps, and one event names the groups of rank 1 alone, half
    of the 12 of a step or fewer. With stop both end with the same error, and checkpoint-1 stays.
    """
    program = "train.test_preemption:fault_on_the_second_rank"
    settings = {"max_steps": 3, "save_steps": 1, "eval_strategy": "no", **way}
    skips = {**settings, "on_nonfinite": "skip"}
    command = train_command(dataset, tiny_model_dir, tmp_path / "skip", **skips)
    ends = server.run_ranks(command, 2, program=program)
    assert [status for status, _ in ends] == [0, 0], ends
    (skipped,) = (own for own in read_events(tmp_path / "skip") if own["kind"] == "skipped")
    assert skipped["at"] == 2
    assert 0 < len(skipped["groups"]) < 12
    command = train_command(dataset, tiny_model_dir, tmp_path / "stop", **settings)
    ends = server.run_ranks(command, 2, program=program)
    assert [status for status, _ in ends] == [1, 1], ends
    assert all("not finite at step 2, in the groups" in output for _, output in ends)
    assert sealed(tmp_path / "stop") == ["checkpoint-1"]
