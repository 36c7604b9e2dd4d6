"""Which runs a study has: comparisons, each a point with a learning rate of its own, and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import BETA, Job
from rates import SEED, Point, with_rate

# `gvpo` with the setting that the project recommends where a log is all there is.
RECOMMENDED: dict[str, Any] = {"loss": "gvpo", "imitation": "auto"}
# Rates and the recommendation were chosen on logs of seeds 0 and 1; nobody looked at the others.
SEEDS = range(2, 7)
FEW = range(2, 4)
SHORT = range(1, 3)
BETAS = (BETA / 2, BETA, 2 * BETA)
MODELS_ONLY = {"older": 3, "other": 2, "hot": 2}
OWN = {"policy": 7}
ALPHAS = (0.3, 1.0, 3.0, 10.0)
# What the comparisons of main interest are, with all seeds; others have `FEW`.
MAIN = ("gvpo", "recommended", "rft")
# Where the search of a learning rate begins: found by earlier searches, it only saves runs. A line
# for a loss is for tasks of which it has none of their own.
NEAR: dict[str, float] = {
    "gvpo": 3e-4,
    "rft": 3e-4,
    "carry, gvpo": 3e-4,
    "carry, rft": 3e-3,
    "carry, recommended": 1e-3,
    "carry, gvpo + 1": 1e-3,
    "carry, gvpo + 3": 3e-3,
    "carry, gvpo + 10": 3e-3,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "recommended": RECOMMENDED,
    **{f"gvpo + {alpha:g}": {"loss": "gvpo", "imitation": alpha} for alpha in ALPHAS},
    "gvpo, chi-squared link": {"loss": "gvpo", "link": "chi_squared"},
    "gvpo, anchor 0.1": {"loss": "gvpo", "anchor": 0.1},
}
# The losses of each table of losses; a name that is not in `SETTINGS` is a `loss_type`. topr needs
# sampler log-probs, oapl these or responses of the reference, and qrpo responses of the reference.
SOME = ("gvpo", "recommended", "gvpo + 0.3", "gvpo + 1", "gvpo + 3")
MIXED_LOG = {
    "change": (
        *(*SOME, "gvpo, chi-squared link", "gvpo, anchor 0.1", "pmd_mean", "rebel", "ipo", "dpo"),
        *("listwise", "rft", "sft", "awr", "grpo", "rloo", "asymre"),
    ),
    "carry": (
        *(*SOME, "gvpo + 10", "gvpo, chi-squared link", "pmd_mean", "ipo", "dpo"),
        *("rft", "sft", "awr", "rloo", "asymre"),
    ),
    "rated": (*SOME, "rft", "sft", "awr", "ipo", "pmd_mean"),
}
OWN_ANSWERS = {
    "change": (*SOME, "rft", "sft", "awr", "ipo", "dpo", "oapl", "qrpo"),
    "carry": ("gvpo", "recommended", "rft"),
    "rated": (),
}
OF_MODELS = {
    "change": ("topr", "oapl", "gvpo", "rft", "recommended"),
    "carry": ("topr", "gvpo", "rft"),
    "rated": (),
}
IN_SHORT = ("gvpo", "recommended", "rft", "sft", "awr", "ipo", "dpo", "listwise")


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        table: the comparison.
        label: the setting.
        point: the run, without rate and seed.
        seeds: the seeds on test prompts.
    """

    table: str
    label: str
    point: Point
    seeds: Sequence[int]

    @property
    def name(self) -> str:
        """A unique name."""
        return f"{self.point.job.task}: {self.table}: {self.label}"


# A comparison, the setting, the run.
Labelled = tuple[str, str, Job]


def job_of(task: str, label: str, **changes: Any) -> Job:
    """The run of a label of a table of losses on a task."""
    given: dict[str, Any] = {"task": task, "loss": label, "rate": 0.0, "seed": SEED}
    return Job(**given | SETTINGS.get(label, {}) | changes)


def short_plan(tasks: Sequence[str]) -> list[Entry]:
    """The losses of main interest on the mixed log of each task, two seeds."""
    return [_loss(task, label, SHORT) for task in tasks for label in IN_SHORT]


def full_plan(tasks: Sequence[str]) -> list[Entry]:
    """All comparisons, the most important first."""
    return [
        *(entry for task in tasks for entry in losses(task)),
        *(entry for task in tasks for entry in own_answers(task)),
        *(entry for task in tasks if task != "rated" for entry in moved(task)),
    ]


def _near(task: str, label: str) -> float:
    for name in (f"{task}, {label}", label, f"{task}, gvpo", "gvpo"):
        if name in NEAR:
            return NEAR[name]
    raise KeyError(label)


def _loss(task: str, label: str, seeds: Sequence[int]) -> Entry:
    return Entry("losses", label, Point(job_of(task, label), _near(task, label)), seeds)


def losses(task: str) -> Iterator[Entry]:
    """All losses on the mixed log of a task, and some on a log of models with log-probs."""
    for label in MIXED_LOG[task]:
        yield _loss(task, label, SEEDS if label in MAIN else FEW)
    for label in OF_MODELS[task]:
        job = job_of(task, label, mix=dict(MODELS_ONLY))
        yield Entry("models only", label, Point(job, _near(task, label)), FEW)


def own_answers(task: str) -> Iterator[Entry]:
    """Losses on a log of the policy's own answers, seven to a prompt."""
    for label in OWN_ANSWERS[task]:
        own = {"reference_sampler": "policy"} if label in ("oapl", "qrpo") else {}
        point = Point(job_of(task, label, mix=dict(OWN), **own), _near(task, label))
        yield Entry("own answers", label, point, SEEDS if label in MAIN else FEW)


def moved(task: str) -> Iterator[Entry]:
    """A few losses with one setting of the log or of training changed at a time."""
    three = ("gvpo", "recommended", "rft")
    samplers = ("older", "other") if task == "change" else ()
    shares = (2, 4) if task == "change" else (4,)
    for label in ("gvpo", "recommended"):
        for beta in BETAS:
            yield _changed(task, "beta", label, f"{beta:g}", FEW, beta=beta)
    for label in three:
        for name in samplers:
            yield _changed(task, "sampler", label, name, FEW, mix={name: 7})
        for n in shares:
            mix = {"older": 8 - n, "person": n}
            yield _changed(task, "person", label, f"{n} of 8", FEW, mix=mix)
    for n in shares if task == "change" else ():
        yield _changed(
            task,
            "person",
            "recommended without the person",
            f"{n} of 8",
            FEW,
            mix={"older": 8 - n, "person": n},
            imitation_without=["person"],
        )
    if task == "change":
        for label in ("gvpo", "recommended"):
            for k in (2, 4):
                mix = {"older": k // 2, "hot": k // 2}
                yield _changed(task, "group size", label, f"{k}", FEW, mix=mix)
    yield from ways(task)


def ways(task: str) -> Iterator[Entry]:
    """Other ways to train, and other forms of the imitation term."""
    for name, changes in {
        "soft": {"imitation_of": "soft"},
        "weighted by the reference": {"imitation_weights": "reference"},
    }.items():
        yield _changed(task, "forms", "recommended", name, FEW, **changes)
    if task == "carry":
        yield _changed(task, "ways", "gvpo", "after rft", FEW, warm_rate=NEAR["carry, rft"])
        yield _changed(task, "ways", "gvpo", "unequal groups alone", FEW, equal_groups=False)


def _changed(
    task: str, table: str, label: str, setting: str, seeds: Sequence[int], **changes: Any
) -> Entry:
    """A row with one setting changed; the search of its rate begins at that of the mixed log."""
    loss = label.split(" without ")[0]
    near = Entry("losses", loss, Point(job_of(task, loss), 0.0), ()).name
    return Entry(table, f"{label}, {setting}", Point(job_of(task, loss, **changes), near), seeds)


def comparisons(entries: Sequence[Entry], rates: Mapping[str, float]) -> Iterator[Labelled]:
    """The runs of the entries at their own rates, and those of the untouched policies."""
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        for seed in entry.seeds:
            job = with_rate(entry.point, rates[entry.name], seed)
            untouched = Job(job.task, "none", 0.0, seed, mix=job.mix)
            once = (entry.table, untouched.key)
            if entry.table in ("losses", "own answers") and once not in seen:
                seen.add(once)
                yield entry.table, "untouched", untouched
            yield entry.table, entry.label, job
