"""`validate` as a gate: integrity, rules and findings of a whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gvpo_offline.errors import GVPOError, IntegrityError
from gvpo_offline.findings.finding import Finding, Place, Severity, Verdict, verdict
from gvpo_offline.findings.full import full_findings
from gvpo_offline.findings.light import Part, in_order, scan
from gvpo_offline.findings.rules import RULES
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import Manifest, RewardFamily
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.storage import Storage, open_storage
from gvpo_offline.store.survey import Survey
from gvpo_offline.store.validate import Progress, Validation, validate

_LONGEST = 200  # characters of a quoted value


@dataclass(frozen=True)
class CheckedDataset(Validation):
    """Result of a validation, with what was found.

    Attributes:
        findings: most severe first.
        light: whether the light checks alone were done.
    """

    findings: Sequence[Finding] = ()
    light: bool = False

    @property
    def verdict(self) -> Verdict:
        """ "fail", "warn" or "pass", by the most severe finding."""
        return verdict(self.findings)


def check_dataset(
    path: str | Path,
    thresholds: Thresholds | None = None,
    *,
    light: bool = False,
    progress: Progress = lambda numbers, label: numbers,
    remote: RemoteSettings | None = None,
    end_ids: Collection[int] = (),
) -> CheckedDataset:
    """Validate a dataset, or a Parquet file with the columns of a groups file, and look for faults.

    Every reward (in its newest version) and every reference is checked.

    Args:
        path: of a folder or file, or a URL.
        thresholds: by default all defaults.
        light: only the light checks: existence and sizes of files, summary columns and sidecars.
        progress: wraps the row group numbers of each pass; its second argument names the pass.
        remote: how a URL is read.
        end_ids: ids of the tokens that end a response; none given: they are found by the data.

    Raises:
        DataError: there is no dataset, or a group breaks a rule.
        IntegrityError: a file is missing or altered, or a sidecar does not match its groups file.
    """
    thresholds = thresholds or Thresholds()
    if not is_url(path) and local_path(path).is_file():
        foreign = adopt_parquet([local_path(path)], checked=not light)
        checked = _parts(0, len(foreign.rewards), int(foreign.reference is not None))
        views: list[tuple[GroupDataset, Sequence[Part]]] = [(foreign, checked)]
        plain = None if light else validate(path, progress, remote)
        manifest, n_files = None, 1
    else:
        plain = None if light else validate(path, progress, remote)
        storage = open_storage(path, remote)
        manifest = storage.manifest() if plain is None else plain.manifest
        assert manifest is not None  # only a single file has none
        if light:
            storage.verify(manifest.files(), content=False, whole=False)
        views = list(_views(GroupDataset(storage, manifest)))
        n_files = len(manifest.files())
    findings: list[Finding] = []
    survey: Survey | None = None
    for number, (dataset, parts) in enumerate(views):
        label = "light checks" if number == 0 else f"light checks {number + 1}"
        found = scan(dataset, thresholds, parts, _labelled(progress, label))
        survey = survey or found.survey
        findings += found.findings
        if not light:
            findings += full_findings(
                dataset,
                thresholds,
                end_ids=end_ids,
                tokens_too=number == 0,
                progress=_labelled(progress, "tokens"),
            )
    assert survey is not None  # there is at least one view
    counted = survey if plain is None else plain.survey
    files = n_files if plain is None else plain.n_files
    return CheckedDataset(manifest, counted, files, tuple(in_order(findings)), light)


def _labelled(progress: Progress, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
    return lambda numbers: progress(numbers, label)


def _views(plain: GroupDataset) -> Iterator[tuple[GroupDataset, Sequence[Part]]]:
    """Datasets with a reward and a reference each, until all were joined; what to check of each."""
    manifest = plain.manifest
    rewards, references = _newest(manifest.rewards), manifest.references
    for number in range(max(1, len(rewards), len(references))):
        joined = [WeightedReward(family) for family in rewards[number : number + 1]]
        reference = references[number] if number < len(references) else None
        dataset = GroupDataset(plain.storage, manifest, joined, reference)
        yield dataset, _parts(number, len(rewards), len(references))


def _parts(number: int, n_rewards: int, n_references: int) -> list[Part]:
    # The first view also finds that there is no reward, or no reference, at all.
    found: list[Part] = ["groups"] if number == 0 else []
    found += ["rewards"] if number < max(n_rewards, 1) else []
    found += ["reference"] if number < max(n_references, 1) else []
    return found


def _newest(families: Iterable[RewardFamily]) -> list[RewardFamily]:
    """Each reward in its newest version."""
    found: dict[str, RewardFamily] = {}
    for family in sorted(families, key=lambda each: each.version):
        found[family.name] = family
    return list(found.values())


@dataclass(frozen=True)
class LightChecks:
    """The light checks of a whole dataset.

    Attributes:
        findings: most severe first.
        surveys: counts of the groups with each reward in its newest version, by `name@version`; ""
            where the dataset has no reward.
    """

    findings: Sequence[Finding]
    surveys: Mapping[str, Survey]


def light_checks(
    storage: Path | Storage, manifest: Manifest, thresholds: Thresholds | None = None
) -> LightChecks:
    """The light checks with every reward (in its newest version) and every reference.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`, and where a sidecar does not fit.
    """
    findings: list[Finding] = []
    surveys: dict[str, Survey] = {}
    for dataset, parts in _views(GroupDataset(storage, manifest)):
        found = scan(dataset, thresholds or Thresholds(), parts)
        findings += found.findings
        label = "".join(f"{each.family.name}@{each.family.version}" for each in dataset.rewards)
        surveys.setdefault(label, found.survey)
    if len(surveys) > 1:
        surveys.pop("", None)
    return LightChecks(tuple(in_order(findings)), surveys)


def error_finding(error: GVPOError, of: int = 1) -> Finding:
    """An error of `check_dataset` as a finding.

    Args:
        error: an IntegrityError or a DataError.
        of: files or groups of the dataset.
    """
    integrity = isinstance(error, IntegrityError)
    rule = "integrity" if integrity else "invalid-data"
    received = "" if error.received is None else f"; received {error.received}"
    received = received if len(received) <= _LONGEST else received[:_LONGEST] + "…"
    place = None if error.file is None else Place(error.file, error.row, error.group)
    return Finding(
        rule,
        "error",
        " ".join(f"{error.rule}{received}".split()),
        1,
        max(of, 1),
        "files" if integrity else "groups",
        error.remedy or RULES[rule].remedy,
        () if place is None else (place,),
    )


def fails(findings: Iterable[Finding], fail_on: Severity | str) -> bool:
    """Whether some finding is at least as severe as `fail_on`: error, warning, note; or never."""
    order = ("never", "error", "warning", "note")
    worst = order.index(fail_on)
    return any(order.index(finding.severity) <= worst for finding in findings)
