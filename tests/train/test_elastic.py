"""Checkpoints taken on some ranks and resumed on others: the same run, or one clear error."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.rank_storm import (
    GROUPS_PER_STEP,
    STEPS_PER_EPOCH,
    STORM_EPSILON,
    STORM_RATE,
    run_storm,
    storm_dataset,
)
from support.rounding import ADAM_EPSILON, adam_rounding
from support.training import largest_difference
from support.watching import read_notes

from gvpo_offline.errors import ResumeError
from gvpo_offline.train.checkpoint import SEAL_NAME
from gvpo_offline.train.resharding import check_sharding_state

N_STEPS, SAVED_AT = 6, 3
SHARDED = {"fsdp": "true", "fsdp_config": json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})}
FULL = {"fsdp": "true", "fsdp_config": json.dumps({"state_dict_type": "FULL_STATE_DICT"})}
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "sharded": SHARDED,
    "full": FULL,
    "sharded adapter": {**SHARDED, **LORA},
}
CASES = [("sharded", n) for n in (1, 3, 6)]
CASES += [("ddp", 3), ("full", 2), ("sharded adapter", 3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return storm_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir)


class Elastic:
    """Runs of six steps on four ranks with a checkpoint after the third, and what goes on there."""

    def __init__(self, server: ForkServer, root: Path, settings: dict[str, Any]) -> None:
        self._server, self._root, self._settings = server, root, settings
        self._whole: dict[str, Path] = {}

    def whole(self, way: str) -> Path:
        """The folder of the run that nothing happened to."""
        if way not in self._whole:
            folder = self._root / way.replace(" ", "-")
            for status, output in self.run(folder / "out", way, 4, watch=str(folder)):
                assert status == 0, output
            self._whole[way] = folder
        return self._whole[way]

    def resumed(self, way: str, n: int) -> Path:
        """The folder of the run that went on from its checkpoint on `n` ranks."""
        folder = self._root / f"{way.replace(' ', '-')}-on-{n}"
        shutil.copytree(self.whole(way) / "out" / f"checkpoint-{SAVED_AT}", folder / "checkpoint")
        ended = self.run(folder / "out", way, n, folder / "checkpoint", watch=str(folder / "notes"))
        for status, output in ended:
            assert status == 0, output
        return folder

    def run(
        self, out: Path, way: str, n: int, checkpoint: Path | None = None, **options: Any
    ) -> list[tuple[int, str]]:
        settings = {**self._settings, **WAYS[way], "output_dir": out}
        if checkpoint:
            settings["resume_from_checkpoint"] = checkpoint
        argv = ["train", *(str(w) for name, v in settings.items() for w in (f"--{name}", v))]
        return self._server.run_ranks(argv, n, **options)


@pytest.fixture(scope="module")
def elastic(
    tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_model_dir: Path, server: ForkServer
) -> Elastic:
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": data,
        "beta": 0.5,
        "groups_per_step": GROUPS_PER_STEP,
        "max_steps": N_STEPS,
        "max_tokens_per_micro_batch": 150,
        "learning_rate": 1e-3,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "save_steps": SAVED_AT,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    return Elastic(server, tmp_path_factory.mktemp("elastic"), settings)


def losses(out: Path) -> list[float]:
    state = json.loads((out / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize(("way", "n"), CASES)
def test_a_checkpoint_of_four_ranks_resumes_on_any(way: str, n: int, elastic: Elastic) -> None:
    """Same global batches, same loss curve, same weights; 6 ranks are more than a step's groups."""
    whole, resumed = elastic.whole(way), elastic.resumed(way, n)
    before, after = read_notes(whole), read_notes(resumed / "notes")
    assert sorted(before) == list(range(N_STEPS))
    assert sorted(after) == list(range(SAVED_AT, N_STEPS))
    for step, attempt in after.items():
        assert attempt.whole
        assert attempt.world_size == n
        assert attempt.groups == before[step].groups
    assert losses(resumed / "out") == pytest.approx(losses(whole / "out"), rel=1e-5)
    name = "adapter_model.safetensors" if "adapter" in way else "model.safetensors"
    one, other = (load_file(folder / "out" / name) for folder in (whole, resumed))
    assert largest_difference(one, other) <= adam_rounding(N_STEPS)


def test_the_seal_says_how_a_checkpoint_was_taken(elastic: Elastic) -> None:
    for way, backend, state in (("ddp", "replicated", None), ("sharded", "fsdp2", "sharded")):
        seal = elastic.whole(way) / "out" / f"checkpoint-{SAVED_AT}" / SEAL_NAME
        taken = json.loads(seal.read_text())["taken"]
        assert taken == {"backend": backend, "state": state, "world_size": 4}


def test_a_sharded_checkpoint_is_a_model_folder_too(elastic: Elastic) -> None:
    """What messages recommend, model_name_or_path set to a checkpoint, works for shards."""
    out = elastic.whole("sharded") / "out"
    kept = load_file(out / f"checkpoint-{N_STEPS}" / "model.safetensors")
    assert largest_difference(kept, load_file(out / "model.safetensors")) == 0


@pytest.mark.parametrize(
    ("taken", "now", "said"),
    [
        ("sharded", "ddp", "fsdp2 on 4 ranks then, replicated on 2 ranks now. Launch with FSDP2"),
        ("ddp", "sharded", "replicated on 4 ranks then, fsdp2 on 2 ranks now. Launch without"),
        ("sharded", "full", "sharded then, full now. Set state_dict_type to SHARDED_STATE_DICT"),
    ],
)
def test_another_backend_is_one_clear_error(
    taken: str, now: str, said: str, elastic: Elastic, tmp_path: Path
) -> None:
    checkpoint = elastic.whole(taken) / "out" / f"checkpoint-{SAVED_AT}"
    for status, output in elastic.run(tmp_path / "out", now, 2, checkpoint):
        assert status == 1
        assert said in output
        assert "Traceback" not in output
    assert not list((tmp_path / "out").iterdir())


def test_deepspeed_resumes_on_the_ranks_that_took_it(tmp_path: Path) -> None:
    taken = {"backend": "zero-3", "state": None, "world_size": 4}
    check_sharding_state(tmp_path, taken, taken)
    check_sharding_state(tmp_path, None, taken)
    with pytest.raises(ResumeError, match="on the number of ranks that saved it; received 4 then"):
        check_sharding_state(tmp_path, taken, {**taken, "world_size": 2})
    with pytest.raises(ResumeError, match=r"zero-3 on 4 ranks then, replicated on 1 rank now"):
        check_sharding_state(
            tmp_path, taken, {"backend": "replicated", "state": None, "world_size": 1}
        )


def test_killed_at_random_with_another_number_of_ranks_each_time(
    tmp_path: Path, data: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """5 kills of all ranks; `make bench-elastic` makes 20, or as many as it is told."""
    seed = random.randrange(2**32)
    found = run_storm(server, tmp_path, data, tiny_model_dir, kills=5, seed=seed)
    assert set(found.world_sizes) == {1, 2, 3, 4, 8}, f"seed {seed}"
    assert set(found.seen) == set(found.expected), f"seed {seed}"
    assert found.different == 0, f"seed {seed}"
    assert found.times_an_epoch == {1}, f"seed {seed}"
    assert len(found.expected) % STEPS_PER_EPOCH == 0
    most = adam_rounding(len(found.expected), STORM_RATE, STORM_EPSILON)
    assert found.weight_error <= most < STORM_RATE / 10, f"seed {seed}"
    assert found.loss_error < 1e-5, f"seed {seed}"
