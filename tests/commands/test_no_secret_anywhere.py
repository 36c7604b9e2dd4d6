"""From prompts to a policy, no secret of a setting or of the environment is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.importing import write_jsonl
from support.judging import JudgeServer, judge
from support.sampling import FaultServer, prompt_rows, remote

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError
from gvpo_offline.sampling.settings import BatchSettings
from gvpo_offline.secret_settings import is_secret
from gvpo_offline.store.manifest import load_manifest

MARK = "s3cr3t"


class Numbered(FaultServer):
    """Answers with a number, so that the server of the judge can rate it."""

    def _body(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        answer = super()._body(body, fault)
        for choice in answer["choices"]:
            choice["message"] = {"role": "assistant", "content": f"It is {body['seed']}"}
        return answer


@pytest.fixture
def servers() -> Iterator[tuple[FaultServer, JudgeServer]]:
    sampler, judging = Numbered(), JudgeServer()
    yield sampler, judging
    sampler.close()
    judging.close()


def command(work: Path, capfd: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    """Run a command, and keep what it prints as a file of the folder."""
    found = main([str(word) for word in words])
    printed = "".join(capfd.readouterr())
    number = len(list(work.glob("output-*.txt")))
    (work / f"output-{number}.txt").write_text(printed)
    assert found == status, printed
    return printed


def leaks(folder: Path) -> list[str]:
    """Files that hold the mark. Parquet texts and zip members of PyTorch may be compressed, but
    what is looked for is settings: in footers, JSON, YAML, HTML and stored zip members.
    """
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [str(own.relative_to(folder)) for own in found if MARK.encode() in own.read_bytes()]


def test_from_prompts_to_a_policy(
    servers: tuple[FaultServer, JudgeServer],
    tiny_model_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The servers receive the keys and the field of extra_body. One request of each fails with an
    error in which the server quotes the key.
    """
    sampler, judging = servers
    for name in ("SAMPLER_KEY", "JUDGE_KEY", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{MARK}-{name}")
    sampler.fault = lambda times, body: "500" if times == 0 else None
    judging.fault = lambda question, times: "500" if times == 0 else None
    data, run = tmp_path / "data", tmp_path / "run"
    hidden = {"extra_body": {"auth": {"api_key": f"{MARK}-body"}, "headers": {"X": f"{MARK}-head"}}}
    samplers = {"s": remote(sampler.url, api_key_env="SAMPLER_KEY", **hidden)}
    scorers = {"reward": judge(judging, api_key_env="JUDGE_KEY", **hidden)}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(8))
    tokenizer = ("--tokenizer_name_or_path", tiny_model_dir)

    def do(*words: object, status: int = 0) -> str:
        return command(tmp_path, capfd, status, *words)

    given = ("--inputs", prompts, *tokenizer, "--samplers", json.dumps(samplers))
    do("sample", *given, "--output_dir", data)
    do("reward", "--dataset", data, "--scorers", json.dumps(scorers))
    for server, key in ((sampler, "SAMPLER_KEY"), (judging, "JUDGE_KEY")):
        assert server.headers[0]["Authorization"] == f"Bearer {MARK}-{key}"
        assert server.bodies[0]["auth"] == {"api_key": f"{MARK}-body"}
    model = ("--model_name_or_path", tiny_model_dir, "--dataset", data, "--use_cpu", "true")
    do("reference", *model)
    short = ("--beta", 1, "--eval_fraction", 0.3, "--groups_per_step", 4, "--disable_tqdm", "true")
    token = ("--hub_token", f"hf_{MARK}")
    options = json.dumps({"key": f"{MARK}-store", "headers": {"X": f"{MARK}-x"}})
    storage = ("--remote.storage_options", options)
    do(*("train", *model, *short, *token, *storage, "--output_dir", run, "--max_steps", 1))
    do(*("train", *model, *short, *token, *storage, "--output_dir", run), status=1)
    do("report", data, "--output", tmp_path / "data.html")
    do("report", run, "--output", tmp_path / "run.html")
    do("show", data)
    do("ls", data, "--json")
    assert (run / "model.safetensors").is_file()
    assert leaks(tmp_path) == []
    (recorded,) = load_manifest(data).samplers.values()
    assert recorded["extra_body"] == {"auth": {"api_key": "…"}, "headers": {"X": "…"}}


def test_an_import_records_no_secret(
    tiny_tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The settings of a sampler, copied from elsewhere with a key among them."""
    rows = [{"prompt": "2 + 2 =", "response": text, "reward": len(text)} for text in ("4", "five")]
    logs = write_jsonl(tmp_path / "logs.jsonl", rows)
    given = {"s": {"api_key": MARK, "eos_token": "</s>", "url": f"https://me:{MARK}@host/v1"}}
    words = ("--inputs", logs, "--output_dir", tmp_path / "data", "--sampler", "s")
    tokenizer = ("--tokenizer_name_or_path", tiny_tokenizer_dir)
    command(tmp_path, capfd, 0, "import", *words, *tokenizer, "--samplers", json.dumps(given))
    assert leaks(tmp_path) == []
    manifest = load_manifest(tmp_path / "data")
    recorded = {"api_key": "…", "eos_token": "</s>", "url": "https://…@host/v1"}
    assert manifest.samplers == {"s": recorded}
    assert manifest.lineage[0].config["samplers"] == {"s": recorded}
    # The settings are the same: nothing is imported anew.
    command(tmp_path, capfd, 0, "import", *words, *tokenizer, "--samplers", json.dumps(given))


def test_request_files_take_no_secret() -> None:
    for body in ({"api_key": MARK}, {"a": [{"token": MARK}]}, {"extra_headers": {"X": MARK}}):
        with pytest.raises(ConfigError, match="secrets are never written") as error:
            BatchSettings(responses=2, model="m", extra_body=body)
        assert MARK not in str(error.value)
    BatchSettings(responses=2, model="m", extra_body={"top_k": 5, "stop_token": "x"})


@pytest.mark.parametrize("name", ["eos_token", "special.pad_token", "begin_token"])
def test_tokens_of_a_tokenizer_are_no_secrets(name: str) -> None:
    assert not is_secret(name)
    assert is_secret("my_token")
