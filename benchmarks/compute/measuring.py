"""The measurements of both sides and their order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cases import TINY_CASES, Case
from processes import OutOfMemoryError, Side

# Limits of padded tokens times vocabulary for additional measurements on a CPU.
_AS_IS = 5e7  # TRL's head over all positions: never faster; `--all-paths` removes the limit
_ERRORS = 1e8  # errors compared with one response at a time
_REFERENCE = 2e8  # the reference stage
_TWICE = 3e8  # our step a second time per repetition
_SAME_NATS = 1e-2  # tolerance between the log-probs of the two sides, per response
Times = dict[str, float]


@dataclass(frozen=True)
class TrlPath:
    """A variant of TRL: the trainer, the positions of its head, and `rows` responses per batch."""

    trainer: str
    compact: bool
    rows: int

    @property
    def name(self) -> str:
        """A readable name."""
        head = "labelled positions" if self.compact else "all positions"
        return f"{self.trainer}, {head}, {self.rows} rows"


@dataclass
class Record:
    """All measurements of a case; lists have one entry per repetition."""

    case: Case
    ours: list[Times] = field(default_factory=list)
    keeping_products: list[Times] = field(default_factory=list)
    trl: dict[TrlPath, list[Times]] = field(default_factory=dict)
    matmul: list[Times] = field(default_factory=list)
    reference_ours: list[Times] = field(default_factory=list)
    reference_trl: list[Times] = field(default_factory=list)
    steps_ours: list[Times] = field(default_factory=list)
    steps_trl: list[Times] = field(default_factory=list)
    flops: float | None = None
    large_group: Times | None = None
    errors: Times = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall: float = 0.0

    @property
    def size(self) -> float:
        """The cost of the simplest computation of this case, up to a factor."""
        return float(self.case.padded_tokens * self.case.shape.vocab_size)

    def fastest(self, trainer: str, clock: str) -> TrlPath | None:
        """TRL's fastest variant with `trainer`."""
        paths = [path for path in self.trl if path.trainer == trainer]
        return min(paths, key=lambda p: median(self.trl[p], clock) or 0.0, default=None)


@dataclass
class Bench:
    """Both sides on one device.

    `clock` is the kind of seconds for speed-ups: on a CPU the CPU seconds of all threads, which
    depend less on other processes, on a GPU wall seconds. `trl_rows` is the initial number of
    responses per TRL batch; None: the whole group.
    """

    ours: Side
    trl: Side
    device: str
    all_paths: bool = False
    trl_rows: int | None = None
    device_name: str = "cpu"

    @property
    def clock(self) -> str:
        """The kind of seconds for speed-ups: "wall" or "cpu"."""
        return "wall" if self.device == "cuda" else "cpu"

    def run(
        self, cases: tuple[Case, ...], seconds: float, show: Callable[[Record], None]
    ) -> list[Record]:
        """Measure every case once, then repeatedly, cheapest first, for at most `seconds`."""
        deadline = time.perf_counter() + seconds
        self._visit(Record(TINY_CASES[0]))  # warm-up of both processes
        records = [Record(case, notes=[case.note] if case.note else []) for case in cases]
        cheapest = min(records, key=lambda r: r.size)
        for record in records:
            self._visit(record, whole_steps=record is cheapest)
            show(record)
        repeats = True
        while repeats:
            repeats = False
            for record in sorted(records, key=lambda r: r.wall):
                if time.perf_counter() + record.wall < deadline:
                    self._visit(record, whole_steps=record is cheapest)
                    show(record)
                    repeats = True
        return records

    def _visit(self, record: Record, *, whole_steps: bool = False) -> None:
        """Measure a case once more, alternating between the sides."""
        started = time.perf_counter()
        first = not record.matmul
        usable = self._load(record)
        record.matmul.append(self.ours.ask("matmul"))
        for trainer in ("grpo", "dpo"):
            if trainer == "grpo" or self._cheap(record, _TWICE):
                usable = usable and self._our_step(record)
            if first:
                self._try_paths(record, trainer)
            else:
                path = record.fastest(trainer, self.clock)
                if path is not None:
                    record.trl[path].append(self._trl_step(path))
        dpo = record.fastest("dpo", self.clock)
        if usable and dpo is not None and self._cheap(record, _REFERENCE):
            self._reference(record, dpo)
        if usable and dpo is not None and whole_steps:
            record.steps_ours += self.ours.ask("train", n_steps=3)
            record.steps_trl += self.trl.ask("train", compact=dpo.compact, n_steps=2)
        # Measurements that are done only once do not count for the cost of a further repetition.
        record.wall = time.perf_counter() - started
        if first and usable:
            self._measure_once(record)

    def _cheap(self, record: Record, limit: float) -> bool:
        """Whether an additional measurement with this limit is affordable."""
        return self.device == "cuda" or record.size <= limit

    def _load(self, record: Record) -> bool:
        """Load the case on both sides; returns whether our side can run it."""
        case = record.case.to_json()
        ours, trl = self.ours.ask("load", case=case), self.trl.ask("load", case=case)
        for name in ("group", "weights"):
            if ours[name] != trl[name]:
                raise AssertionError(f"the two sides have different {name}")
        self.device_name = ours["device_name"]
        left_out = ours["left_out"]
        if left_out and not record.matmul:
            record.notes.append(f"our side skipped: {left_out}")
        return left_out is None

    def _our_step(self, record: Record) -> bool:
        """One step of our side; returns False if it ran out of memory."""
        try:
            record.ours.append(self.ours.ask("step"))
        except OutOfMemoryError:
            record.notes.append("ours: out of memory")
            return False
        return True

    def _try_paths(self, record: Record, trainer: str) -> None:
        """Measure every variant of one of TRL's trainers once."""
        heads = [True]
        if self.device == "cpu" and (self.all_paths or self._cheap(record, _AS_IS)):
            heads.append(False)
        for compact in heads:
            for rows in _halvings(self.trl_rows or record.case.k):
                path = TrlPath(trainer, compact, rows)
                try:
                    record.trl[path] = [self._trl_step(path)]
                    break
                except OutOfMemoryError:
                    record.notes.append(f"TRL {path.name}: out of memory")

    def _trl_step(self, path: TrlPath) -> Times:
        found: Times = self.trl.ask("step", path=path.trainer, compact=path.compact, rows=path.rows)
        return found

    def _reference(self, record: Record, path: TrlPath) -> None:
        """Reference log-probs on both sides, which must agree."""
        ours = self.ours.ask("reference")
        trl = self.trl.ask("reference", compact=path.compact, rows=path.rows)
        record.reference_ours.append(ours)
        record.reference_trl.append(trl)
        apart = abs(ours["logprob_sum"] - trl["logprob_sum"]) / record.case.k
        if record.case.shape.dtype == "float32" and apart > _SAME_NATS:
            raise AssertionError(f"the log-probs of the two sides differ by {apart} nats")

    def _measure_once(self, record: Record) -> None:
        record.flops = self.ours.ask("flops")
        # The first step allocates; the second is like those of `ours`.
        record.keeping_products = [self.ours.ask("step_keeping_products") for _ in range(2)][1:]
        if record.case.shape.dtype == "float32" and self._cheap(record, _ERRORS):
            record.errors = self.ours.ask("errors")
            record.large_group = self.ours.ask("large_group")


def median(times: list[Times], key: str) -> float | None:
    """The median of one figure; None if nothing was measured."""
    return statistics.median(t[key] for t in times) if times else None


def _halvings(k: int) -> Iterator[int]:
    """k, k / 2, ... while the number is even."""
    rows = k
    while rows >= 2 and rows % 2 == 0:
        yield rows
        rows //= 2
