"""Settings of `evaluate`, `validate`, `ls`, `show` and `report`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.sampled_eval.settings import DEFAULT_SAMPLES, SampledEvalSettings
from gvpo_offline.settings import LossType, positive, required
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import SingleDatasetSettings


@dataclass
class ValidateConfig:
    """Check a whole dataset: the hash of every file, and every page, group and sidecar; and look
    for what is wrong or doubtful in them."""

    dataset: str
    """The dataset's folder or URL, or a Parquet file with one group per row. It can also be given
    without the flag: `gvpo-offline validate data`."""
    thresholds: str | None = None
    """A YAML file of thresholds (docs/howto/validate.md), such as max_truncated: 0.2. Default: the
    default of each."""
    format: Literal["text", "json", "sarif", "junit"] = "text"
    """How findings are printed. json, sarif and junit are for programs; there, a damaged file or an
    invalid group is a finding too, and not an error message."""
    output: str | None = None
    """Write the findings to this file, and print the verdict alone."""
    fail_on: Literal["error", "warning", "note", "never"] = "error"
    """The least severity of a finding with which the exit status is 1. A damaged file and an
    invalid group always give 1 with the format text."""
    light: bool = False
    """Only the checks that read no tokens: existence and sizes of files, summary columns, rewards,
    sums of log-probs. Their time does not grow with the length of the responses. Neither hashes nor
    tokens are checked."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer whose end tokens responses should have: a folder or a hub name. Its fingerprint
    must be the dataset's. Default: the one that made the dataset, if it is a folder that exists;
    else the end tokens are told by the responses."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass
class EvaluateConfig(SingleDatasetSettings, SampledEvalSettings, ModelSettings):
    """Fit of a policy on held-out groups: explained variance, log-ratios, ranking; with `sample`
    also reward and divergence of fresh answers."""

    model_name_or_path: str = ""
    """The policy: a folder or a hub name. If it is the folder of a run or of its checkpoint,
    settings that are not given are those of the run: dataset (with where, responses, reward,
    reference and version), those of the objective (beta, loss_type and the others that are listed
    below), eval_fraction and held_out_by."""
    beta: float | None = None
    """The beta of the objective, on which most metrics depend. Default: the run's. Required if the
    model is not in the folder of a run."""
    loss_type: LossType | None = None
    """The loss to report. Default: the run's, or gvpo."""
    anchor: float | None = None
    """As in `train`. Default: the run's, or 0."""
    response_weights: Literal["equal", "inverse_length"] | None = None
    """As in `train`. Default: the run's, or equal."""
    link: Literal["log", "chi_squared"] | None = None
    """As in `train`. Default: the run's, or log."""
    reference_sampler: str | None = None
    """As in `train`. Default: the run's, or none."""
    asymre_delta: float | None = None
    """As in `train`. Default: the run's, or -0.1."""
    imitation: float | None = None
    """As in `train`, a number. Default: the run's, or 0."""
    imitation_of: Literal["best", "soft"] | None = None
    """As in `train`. Default: the run's, or best."""
    imitation_weights: Literal["equal", "reference"] | None = None
    """As in `train`. Default: the run's, or equal."""
    imitation_without: list[str] | None = None
    """As in `train`. Default: the run's, or none."""
    eval_fraction: float | None = None
    """Evaluate only the groups that `train` holds out with this eval_fraction; 0: all groups.
    Default: the run's; 0 for the run's eval_dataset, and for a model that is not in the folder of a
    run."""
    held_out_by: Literal["prompt", "group"] | None = None
    """How eval_fraction splits, as in `train`. Default: the run's (group for a run of an earlier
    version, whose run file does not say), or prompt."""
    max_tokens_per_micro_batch: int = 16_384
    """Most tokens in one forward pass, padding included."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """Layout of groups in the model's input, as in `train`."""
    bf16: bool = False
    """Autocast matrix products to bfloat16."""
    fp16: bool = False
    """Autocast matrix products to float16."""
    use_cpu: bool = False
    """Use the CPU even if there is a GPU."""
    sample: bool = False
    """Also sample fresh answers to the held-out prompts, eval_samples of them (default then: 8),
    score them as eval_reward says, and report reward, KL and reward - beta KL. Of a run that did
    so while training, eval_reward, eval_prompts and eval_max_new_tokens are the run's unless they
    are given."""
    output_file: str | None = None
    """Also write the metrics to this JSON file; with `sample` also the means of each prompt."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("model_name_or_path", self.model_name_or_path)
        positive("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch)
        self.sample = self.sample or self.eval_samples > 0
        if self.sample and not self.eval_samples:
            self.eval_samples = 1 if self.eval_temperature == 0 else DEFAULT_SAMPLES
        check_ranges(self)


@dataclass
class ListConfig:
    """Describe datasets."""

    dataset: list[str] | str = field(default_factory=list)
    """Folders or URLs of datasets, which can also be given without the flag:
    `gvpo-offline ls data more`. Several datasets are shown as a table."""
    dataset_version: int | None = None
    """Version of the dataset to describe. Default: the newest."""
    content: bool = False
    """Also read the summary columns of every group: responses per sampler, their mean rewards,
    group sizes, lengths. By default only manifests are read, and of local datasets the rewards, for
    their means, and, up to 100,000 responses, what the light checks of `validate` read."""
    json: bool = False
    """Print one line per dataset, with a JSON object."""

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)
        required("dataset", self.dataset)
        if self.dataset_version is not None and len(self.dataset) > 1:
            raise ConfigError(
                "dataset_version needs a single dataset", received=", ".join(self.dataset)
            )
        check_ranges(self)


@dataclass
class ShowConfig:
    """Print groups of a dataset as the model reads them."""

    dataset: str
    """The dataset's folder or URL, or a Parquet file with one group per row. It can also be given
    without the flag: `gvpo-offline show data`."""
    group: str | None = None
    """Only the group with this id, or with the only id that begins so."""
    rows: int = 3
    """Number of groups to show: the first ones, or the first ones for which `where` is true."""
    where: str | None = None
    """Only groups for which this SQL condition is true, as in `train` (docs/howto/selecting.md)."""
    reward: dict[str, float] | str | None = None
    """The reward to show, as `name` or `name@version`; or the weighted sum of several,
    {name: weight}. Default: every reward, each in its newest version."""
    reference: str | None = None
    """The reference to show, by the first digits of its fingerprint. Default: every reference."""
    prompt_tokens: bool = False
    """Also print the prompt token by token, with ids."""
    full: bool = False
    """Print long prompts and responses whole, and every token of the lists of tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that decodes the ids: a folder or a hub name. Its fingerprint must be the
    dataset's. Default: the one that made the dataset; where it cannot be had, ids are printed."""
    chat_template: str | None = None
    """Path of the Jinja template that the dataset was imported with instead of the tokenizer's.
    Default: the path that the dataset records."""
    dataset_version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read."""
    json: bool = False
    """Print one line per group, with a JSON object of everything that is known of it."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        positive("rows", self.rows)
        if self.group is not None and self.where is not None:
            raise ConfigError(
                "either `group` or `where` says which groups to show",
                received="both",
                remedy="leave one of them out",
            )
        check_ranges(self)


@dataclass
class ReportConfig:
    """Make a page of a dataset, or of runs side by side."""

    paths: list[str] | str = field(default_factory=list)
    """A dataset (folder, URL or Parquet file), or the folders of runs (output_dir) and of searches
    by `tune`. They can also be given without the flag: `gvpo-offline report run other_run`."""
    output: str | None = None
    """The HTML file to write; its JSON twin stands beside it and ends in .json. Default:
    NAME-report.html in the current folder, with the name of the dataset or run, and
    runs-report.html for several runs. A file that is no report is not replaced."""
    live: bool = False
    """Serve the page of runs on this machine, at an address that is printed, and renew it as their
    files change, until Ctrl-C. No file is written."""
    port: int = 0
    """The port of `live`, on 127.0.0.1. 0: any that is free."""

    def __post_init__(self) -> None:
        self.paths = [self.paths] if isinstance(self.paths, str) else list(self.paths)
        required("paths", self.paths)
        if self.output is not None and self.live:
            raise ConfigError(
                "a live page is served and not written",
                received=f"live and output: {self.output}",
                remedy="leave live or output out",
            )
        if self.output is not None and not self.output.endswith(".html"):
            raise ConfigError(
                "output ends in .html",
                received=self.output,
                remedy=f"--output {shlex.quote(self.output)}.html",
            )
        if not 0 <= self.port < 2**16:
            raise ConfigError("port lies in 0 … 65535", received=self.port)
        check_ranges(self)


@dataclass
class OrderConfig:
    """Which groups each step of a run took, and at which steps a group was seen."""

    run: str = ""
    """The folder of a run, or of one of its checkpoints, which can also be given without the flag:
    `gvpo-offline order run`. Only its run file and the datasets are read, not the model."""
    step: int | None = None
    """Show the groups of this optimizer step, counted from 1 as in metrics.jsonl."""
    group: str | None = None
    """Show the steps that took the group with this id, or with the only id that begins so."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How datasets at a URL are read. The run file has no storage_options, so pass them again."""
    json: bool = False
    """Print one line with a JSON object."""

    def __post_init__(self) -> None:
        required("run", self.run)
        if self.step is not None and self.group is not None:
            raise ConfigError(
                "either `step` or `group` says what to show of the order",
                received="both",
                remedy="leave one of them out",
            )
        check_ranges(self)
