"""`gvpo-offline tune --judge sample` on a tiny model: the proposal, files that resume, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.fork_server import ForkServer
from support.rounding import ADAM_EPSILON
from support.training import scored_dataset
from tune.test_tune import N_GROUPS, STEPS, run, starting_well

from gvpo_offline.store.dataset import GroupDataset

SCORE = """
def begins_well(prompts, completions, completion_ids, **kwargs):
    return [2.0 * (ids[0] == 5) for ids in completion_ids]
"""
LOSSES = ["gvpo", "rft"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    groups = [starting_well(number) for number in range(N_GROUPS)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reward of the log, as a function: 2 if the first token is 5."""
    path = tmp_path_factory.mktemp("reward") / "score.py"
    path.write_text(SCORE)
    return {"scorers": {"well": {"kind": "function", "function": f"{path}:begins_well"}}}


def settings_of(
    dataset: GroupDataset, reward: Any, model_dir: Path, out: Path, **changes: Any
) -> dict[str, Any]:
    return {
        "model_name_or_path": model_dir,
        "dataset": dataset.root,
        "output_dir": out,
        "eval_fraction": 0.25,
        "groups_per_step": 8,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "beta": 0.2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_samples": 4,
        "eval_reward": reward,
        "eval_max_new_tokens": 2,
        **changes,
    }


def tuned(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, "judge": "sample", "tune_steps": STEPS, **changes}


def files_of(out: Path) -> dict[Path, str]:
    """The files of a search's trials, by path."""
    return {path: path.read_text() for path in (out / "tune" / "trials").iterdir()}


def test_the_proposal_trains_and_an_interrupted_search_continues(
    dataset: GroupDataset,
    reward: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """The untouched policy begins an answer with token 5 one time in 400; a policy that learned
    from the log nearly always, at a KL of at most log 400 = 6 nats, which cost 0.12 at beta 0.02.
    rft cannot have imitation, so the proposal sets it whichever loss wins. Losing the later answers
    of one trial and all files of another, an interrupted search samples exactly those again, of
    policies that are trained again since their weights were removed: the same numbers follow.
    """
    out, config, train = tmp_path / "run", tmp_path / "tune.yaml", tmp_path / "train.yaml"
    settings = settings_of(
        dataset,
        reward,
        tiny_model_dir,
        out,
        eval_strategy="epoch",
        metric_for_best_model="sampled_objective",
    )
    mine = tuned(
        settings, losses=["gvpo", "rft"], imitations=[1.0], judge_beta=0.02, judge_samples=[2, 4]
    )
    output = run(server, "tune", mine, config)
    said = Counter(line for line in output.splitlines() if line.startswith(("INFO", "WARNING")))
    assert [line for line, times in said.items() if times > 1] == []  # though trials are many
    summary = json.loads(output.splitlines()[-1])
    kept = json.loads((out / "tune" / "tune.json").read_text())
    assert {name: kept[name] for name in summary} == summary
    chosen = summary["chosen"]
    assert summary["proposed"] == {
        name: chosen["settings"][name]
        for name in ("loss_type", "imitation", "learning_rate")
        if name != "imitation" or chosen["settings"]["imitation"] != 0
    }
    assert summary["untouched"].items() <= kept["trials"][0].items()
    assert chosen["reward"]["mean"] > 1
    assert summary["untouched"]["behind"]["mean"] > 0.8
    tried = [own["settings"] for own in kept["trials"]]
    assert tried[0] is None
    assert {own["loss_type"] for own in tried[1:]} == {"gvpo", "rft"}
    assert {own["imitation"] for own in tried[1:] if own["loss_type"] == "rft"} == {0.0}
    assert {own["samples"] for own in kept["trials"]} <= {2, 4}
    for own in kept["trials"]:
        beta_kl = 0.02 * own["kl"]["mean"]
        assert own["objective"]["mean"] == pytest.approx(own["reward"]["mean"] - beta_kl)
        assert own["length"] == 2.0  # eval_max_new_tokens, and no answer ends before
    assert not (out / "tune" / "policies").exists()

    before = files_of(out)
    later = next(
        path
        for path in before
        if path.name.endswith("answers-2-4.json") and "untouched" not in path.name
    )
    whole = next(path for path in before if "judged-rft" in path.name)
    lost = {later, *(path for path in before if path.name[:45] == whole.name[:45])}
    for path in lost:
        path.unlink()
    untouched = {path: path.stat().st_mtime_ns for path in before if path not in lost}
    again = run(server, "tune", mine, config)
    assert json.loads(again.splitlines()[-1]) == summary
    assert files_of(out) == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched

    run(server, "train", settings, train, "--config", out / "tune" / "proposed.yaml")
    saved = json.loads((out / "gvpo_run.json").read_text())["training"]
    assert summary["proposed"].items() <= saved.items()


def test_ranks_of_a_sharded_adapter_find_the_same_as_one_process(
    dataset: GroupDataset,
    reward: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """FSDP2 with LoRA. The answers are drawn with the same random numbers; a policy's rounding
    changes one of them only where a number falls within 1e-5 of a token's limit.
    """
    found = []
    for world_size in (1, 2):
        settings = tuned(
            settings_of(
                dataset,
                reward,
                tiny_model_dir,
                tmp_path / f"{world_size}",
                use_peft=True,
                lora_target_modules="all-linear",
                lora_r=2,
                judge_samples=[1, 2],
                adam_epsilon=ADAM_EPSILON,  # does not divide by gradients that are rounding
                fsdp=world_size > 1,
            )
        )
        config = tmp_path / f"{world_size}.yaml"
        config.write_text(json.dumps(settings, default=str))
        ended = server.run_ranks(["tune", "--config", config], world_size)
        assert {status for status, _ in ended} == {0}, "\n".join(text for _, text in ended)
        path = tmp_path / f"{world_size}" / "tune" / "tune.json"
        found.append(json.loads(path.read_text()))
    one, two = found
    for ours, theirs in zip(one["trials"], two["trials"], strict=True):
        assert ours["settings"] == theirs["settings"]
        assert ours["reward"] == theirs["reward"]
        assert ours["kl"]["mean"] == pytest.approx(theirs["kl"]["mean"], rel=1e-3, abs=1e-3)
