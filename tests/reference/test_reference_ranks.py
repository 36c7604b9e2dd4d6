"""A reference whose weights are divided among ranks: the numbers and files of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_server import ForkServer
from support.tiny_policy import stored_model
from support.training import copy_of, sidecars, unscored_dataset

from gvpo_offline.errors import ConfigError
from gvpo_offline.reference.ranks import check_ranks, is_follower, launched_ranks
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.workers.settings import WorkerSettings


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return unscored_dataset(tmp_path_factory.mktemp("data") / "data", tiny_model_dir, 25)


def command(dataset: Path, model: Path, **settings: Any) -> list[str]:
    given = {
        "dataset": dataset,
        "model_name_or_path": model,
        "max_tokens_per_micro_batch": 150,
        "use_cpu": "true",
        "show_progress": "false",
        **settings,
    }
    return ["reference", *(str(w) for name, value in given.items() for w in (f"--{name}", value))]


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (2, {}),
        (4, {"bf16": "true"}),
        (3, {"dtype": "bfloat16"}),
        (2, {"layout": "packed"}),
        (2, {"layout": "padded"}),
    ],
    ids=["float32", "autocast on four", "bfloat16 on three", "packed", "padded"],
)
def test_the_sidecars_are_those_of_one_process(
    n: int,
    settings: dict[str, Any],
    unscored: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """Byte for byte, also from bfloat16 files that are converted in shards. The groups make more
    micro-batches of 150 tokens than ranks, and their number is not always divisible by n.
    """
    model = stored_model(tmp_path / "model", tiny_model_dir, torch.bfloat16)
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    status, output = server.run(command(one, model, **settings))
    assert status == 0, output
    ended = server.run_ranks(command(many, model, fsdp="true", **settings), n)
    for status, output in ended:
        assert status == 0, output
    assert sidecars(many) == sidecars(one)
    assert len(sidecars(many)) > 0
    assert [family.fingerprint for family in open_dataset(many).manifest.references] == [
        family.fingerprint for family in open_dataset(one).manifest.references
    ]
    assert "groups, references:" in ended[0][1]
    assert all("groups, references:" not in output for _, output in ended[1:])


def test_a_group_beyond_the_budget_is_cut_on_every_rank(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Ranks with smaller groups make as many forward passes. One process computes the prompt of
    such a group once for all pieces, ranks with each: sums in another order, 1e-4 nats.
    """
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    small = {"max_tokens_per_micro_batch": 60}
    status, output = server.run(command(one, tiny_model_dir, **small))
    assert status == 0, output
    for status, output in server.run_ranks(command(many, tiny_model_dir, fsdp="true", **small), 2):
        assert status == 0, output
    for mine, theirs in zip(logprobs(many), logprobs(one), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def logprobs(root: Path) -> list[list[float]]:
    dataset: GroupDataset = open_dataset(root)
    return [
        list(group.ref_seq_logprobs)
        for number in range(len(dataset.row_group_sizes))
        for group in dataset.groups(number)
        if group.ref_seq_logprobs is not None
    ]


def test_an_adapter_is_a_reference_too(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "adapter")
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    assert server.run(command(one, tmp_path / "adapter"))[0] == 0
    for status, output in server.run_ranks(command(many, tmp_path / "adapter", fsdp="true"), 2):
        assert status == 0, output
    assert sidecars(many) == sidecars(one)


def test_a_second_run_finds_everything_done_and_an_interrupted_one_goes_on(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Killed in the fourth table that the first rank computes; then run again, twice."""
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    assert server.run(command(one, tiny_model_dir))[0] == 0
    argv = command(many, tiny_model_dir, fsdp="true")
    kill = {"kill_at": ["gvpo_offline.reference.scorer:ReferenceScorer.table", 4, 0.0]}
    ended = server.run_ranks(argv, 2, **kill)
    assert ended[0][0] < 0
    assert ended[1][0] != 0, "a rank without its first rank does not end well"
    for _ in range(2):
        for status, output in server.run_ranks(argv, 2):
            assert status == 0, output
        assert sidecars(many) == sidecars(one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": "absent"}, "absent"),
        ({"fsdp": "false"}, "Set fsdp: true, or shard for jobs that divide the data, or start"),
        ({"workers": "2"}, "the ranks of the launcher are the workers"),
    ],
)
def test_an_error_ends_every_rank(
    settings: dict[str, Any],
    said: str,
    unscored: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    argv = command(**{"dataset": unscored, "model": tiny_model_dir, "fsdp": "true", **settings})
    ended = server.run_ranks(argv, 2, cwd=str(tmp_path))
    assert ended[0][0] != 0
    assert said in " ".join(ended[0][1].split())
    assert all("Traceback" not in output for _, output in ended)


def test_jobs_of_an_array_may_have_the_environment_of_ranks(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """As in a PyTorchJob on Kubernetes: each scores its part, and the last one publishes."""
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    assert server.run(command(one, tiny_model_dir))[0] == 0
    for rank in ("1", "0"):
        env = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        argv = command(many, tiny_model_dir, shard=f"{rank}/2")
        status, output = server.run(argv, env=env)
        assert status == 0, output
    assert sidecars(many) == sidecars(one)


def test_a_model_that_gives_no_finite_number_ends_every_rank(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Found by the first rank, with the group's name."""
    from safetensors.torch import load_file, save_file

    model = stored_model(
        *(tmp_path / "model", tiny_model_dir, torch.float32), tie_word_embeddings=False
    )
    weights = load_file(model / "model.safetensors")
    # A token that the groups of the start-up check do not have.
    group = open_dataset(unscored, join=()).groups(0)[1]
    weights["model.embed_tokens.weight"][int(group.prompt_token_ids[0])] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    data = copy_of(unscored, tmp_path / "data")
    ended = server.run_ranks(command(data, model, fsdp="true"), 2)
    assert ended[0][0] != 0
    assert "a reference log-prob is a finite number" in ended[0][1]
    assert "groups/00000-" in ended[0][1]
    assert ended[1][0] == 0, "dismissed by the first rank"


def test_what_a_launcher_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launched_ranks() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # a batch system's, without a launcher
    assert launched_ranks() == 1
    assert not is_follower()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for rank, follows in (("0", False), ("3", True)):
        monkeypatch.setenv("RANK", rank)
        assert launched_ranks() == 4
        assert is_follower() is follows


@pytest.mark.parametrize(
    ("changes", "workers", "said"),
    [
        ({}, {"shard": "0/2"}, "received engine local, workers 1, shard 0/2"),
        ({"load_in_4bit": True}, {}, "quantised weights are not divided among ranks"),
    ],
)
def test_settings_that_do_not_go_with_ranks(
    changes: dict[str, Any], workers: dict[str, Any], said: str
) -> None:
    config = ReferenceConfig(dataset="data", model_name_or_path="model", fsdp=True, **changes)
    with pytest.raises(ConfigError, match=said):
        check_ranks(config, WorkerSettings(**workers))
