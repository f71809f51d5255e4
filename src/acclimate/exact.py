"""The quickest choice of what to recompute, proved: an integer program for HiGHS, through scipy.

For the order given. Unknowns: whether a value is recomputed, and before which node of the backward part its copy
runs, which is where the first need of it arises. Memory is counted at every node and at every place where a copy
could run; what it counts is what `Step.cost` counts. After Jain et al., "Checkmate" (2020), with one copy a value.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import WrongUse, missing_extra

if TYPE_CHECKING:
    from .recompute import Step

SECONDS = 60.0  # of the solver, at most


@dataclass(frozen=True)
class Solution:
    """again: the values to recompute. proven: no choice is quicker. bound_us: what no choice can be quicker than."""

    again: frozenset[str]
    proven: bool
    bound_us: float


class Term:
    """A constant and coefficients of unknowns."""

    def __init__(self, constant: float = 0.0, of: Mapping[int, float] | None = None) -> None:
        self.constant, self.of = constant, dict(of or {})

    def add(self, other: Term, factor: float = 1.0) -> Term:
        """Adds in place; returns itself."""
        self.constant += factor * other.constant
        for v, k in other.of.items():
            self.of[v] = self.of.get(v, 0.0) + factor * k
        return self

    def most(self) -> float:
        """The largest value that unknowns from 0 to 1 can give it."""
        return self.constant + sum(k for k in self.of.values() if k > 0)


class _Model:
    """Unknowns from 0 to 1, costs, and rows `term <= 0`."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.whole: list[int] = []
        self.rows: list[Term] = []

    def unknown(self, cost: float = 0.0, whole: bool = False) -> int:
        self.costs.append(cost)
        self.whole.append(int(whole))
        return len(self.costs) - 1

    def at_most(self, term: Term, bound: float) -> None:
        self.rows.append(Term(-bound).add(term))


def solve(step: Step, target_bytes: int, seconds: float = SECONDS) -> Solution | None:
    """The least time with at most `target_bytes` alive; None where it is proved that no choice reaches that.

    Where the solver's time runs out, the better of what it found and the greedy choice, not proven. Raises WrongUse
    without scipy, and where the time ran out before anything was found or excluded.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise missing_extra(str(error.name), "exact") from None
    known = step.greedy(target_bytes)
    if known is not None and not known:
        return Solution(known, True, 0.0)
    if step.least_bytes > target_bytes:
        return None
    model, choose = _formulate(step, target_bytes)
    unit = max(max(model.costs), 1e-12)
    costs = np.array(model.costs) / unit
    if known is not None:  # the greedy choice bounds the search
        model.at_most(
            Term(0.0, {i: c for i, c in enumerate(costs) if c}), step.cost(known).time_us / unit + 1e-9
        )
    data, columns, starts, limits = [], [], [0], []
    for row in model.rows:
        scale = max((abs(k) for k in row.of.values()), default=1.0)
        data += [k / scale for k in row.of.values()]
        columns += list(row.of)
        starts.append(len(data))
        limits.append(-row.constant / scale)
    matrix = csr_array((data, columns, starts), shape=(len(model.rows), len(costs)))
    done = milp(
        costs,
        integrality=np.array(model.whole),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, -np.inf, np.array(limits)),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if done.status == 2:
        return None
    bound = max(0.0, float(done.mip_dual_bound or 0.0)) * unit
    found = None if done.x is None else frozenset(n for n, v in choose.items() if done.x[v] > 0.5)
    if found is not None and step.cost(found).peak_bytes > target_bytes:
        found = None  # beyond the solver's tolerance
    options = [a for a in (found, known) if a is not None]
    if not options:
        raise WrongUse(
            "the integer program was not solved in time",
            number=f"{seconds:.0f} s, {len(costs)} unknowns, {len(model.rows)} rows",
            action='recompute="auto"',
        )
    best = min(options, key=lambda a: step.cost(a).time_us)
    return Solution(best, done.status == 0 and found is not None, bound)


def _formulate(step: Step, target_bytes: int) -> tuple[_Model, dict[str, int]]:
    """(the program, candidate -> its unknown "is recomputed")."""
    names, sizes, turns = step.numbered
    number = {n: i for i, n in enumerate(names)}
    model = _Model()
    again = {number[n]: model.unknown(whole=True) for n in step.candidates}
    maker = {v: t for t in turns for v in t.outputs}
    readers: dict[int, list[int]] = defaultdict(list)  # candidates whose copy reads a value
    for w in again:
        for u in maker[w].inputs:
            readers[u].append(w)

    # where each copy may run: before the first direct need, or where a copy that reads it runs
    first: dict[int, int] = {}
    for t, turn in enumerate(turns):
        if not turn.early:
            for u in turn.inputs:
                first.setdefault(u, t)
    places: dict[int, list[int]] = {}
    for v in sorted(again, reverse=True):  # values are numbered in the order in which they are made
        direct = first.get(v, len(turns))
        at = {t for w in readers[v] for t in places.get(w, ()) if t < direct}
        places[v] = sorted(at | ({direct} if direct < len(turns) else set()))
    runs = {(v, t): model.unknown(maker[v].price, whole=True) for v, at in places.items() for t in at}

    # one line of time: every node, and before each node of the backward part the copies that may run there
    slots: list[tuple[int, int]] = []  # (candidate or -1, turn)
    here: dict[int, list[int]] = defaultdict(list)
    for v, t in sorted(runs):
        here[t].append(v)
    when: dict[tuple[int, int], int] = {}
    for t in range(len(turns)):
        for v in (*here[t], -1):
            when[v, t] = len(slots)
            slots.append((v, t))

    for v, r in again.items():
        total = Term(0.0, {runs[v, t]: 1.0 for t in places[v]})
        model.at_most(Term(0.0, {r: -1.0}).add(total), 0)
        if v in first:
            model.at_most(Term(0.0, {r: 1.0}).add(total, -1.0), 0)
        for t in places[v]:
            if t != first.get(v):  # it runs where a copy needs it
                needs = {runs[w, t]: -1.0 for w in readers[v] if (w, t) in runs}
                model.at_most(Term(0.0, {runs[v, t]: 1.0, **needs}), 0)
        for w in readers[v]:
            for t in places[w]:
                row = {runs[w, t]: 1.0, r: 1.0}
                row.update({runs[v, s]: -1.0 for s in places[v] if s <= t})
                model.at_most(Term(0.0, row), 1)

    born = {v: when[-1, t] for t, turn in enumerate(turns) for v in turn.outputs}
    early_end, late_end = dict(born), dict[int, int]()
    for t, turn in enumerate(turns):
        for u in turn.inputs:
            (early_end if turn.early or u not in again else late_end)[u] = when[-1, t]
    for v in step.fed:
        early_end.setdefault(v, 0)
    for v in step.kept:
        early_end[v] = len(slots)
    copies = {v: [when[v, t] for t in places[v]] for v in again}
    reads = {u: sorted((when[w, t], runs[w, t]) for w in ws for t in places[w]) for u, ws in readers.items()}
    needed: dict[tuple[int, int], int] = {}

    def need(u: int, k: int) -> int:
        """Unknown: a copy reads `u` at its k-th such place or later."""
        if (u, k) not in needed:
            needed[u, k] = y = model.unknown()
            model.at_most(Term(0.0, {reads[u][k][1]: 1.0, y: -1.0}), 0)
            if k + 1 < len(reads[u]):
                model.at_most(Term(0.0, {need(u, k + 1): 1.0, y: -1.0}), 0)
        return needed[u, k]

    alive: dict[tuple[int, int, int], int] = {}

    def held(u: int, g: int) -> Term:
        """How many times `u` is in memory at place g."""
        if g < born.get(u, -1):
            return Term()
        ran = bisect_right(copies.get(u, ()), g)
        cumulative = {runs[u, t]: 1.0 for t in places[u][:ran]} if u in again else {}
        if g <= early_end[u]:
            return Term(1.0, cumulative)
        present = Term(1.0, {again[u]: -1.0, **cumulative}) if u in again else Term(1.0)
        if g <= late_end.get(u, -1):
            return present
        k = bisect_left(reads.get(u, ()), (g, -1))
        if k == len(reads.get(u, ())):
            return Term()
        if (u, ran, k) not in alive:
            alive[u, ran, k] = m = model.unknown()
            both = Term(0.0, {need(u, k): 1.0, m: -1.0}).add(present)
            model.at_most(both, 1)
        return Term(0.0, {alive[u, ran, k]: 1.0})

    ends = {
        u: max(early_end[u], late_end.get(u, -1), *(g for g, _ in reads.get(u, ())), -1) for u in early_end
    }
    living: set[int] = set(step.fed)
    for g, (v, t) in enumerate(slots):
        turn = maker[v] if v >= 0 else turns[t]
        living |= set(turn.outputs)
        living = {u for u in living if ends[u] >= g}
        total = Term()
        for u in living:
            total.add(held(u, g), sizes[u])
        made = runs[v, t] if v >= 0 else -1
        if v >= 0:
            total.add(Term(0.0, {made: float(sum(sizes[u] for u in turn.kept if u != v))}))
        if turn.over and total.most() > target_bytes:
            saved = model.unknown()
            dying = Term(0.0, {saved: 1.0})
            for u in turn.over:
                dying.add(held(u, g), -1.0).add(held(u, g + 1))
            model.at_most(dying, 0)
            if v >= 0:
                model.at_most(Term(0.0, {saved: 1.0, made: -1.0}), 0)
            total.add(Term(0.0, {saved: -float(sizes[turn.outputs[0]])}))
        if total.most() > target_bytes:
            model.at_most(total, target_bytes)
    return model, {n: again[number[n]] for n in step.candidates}
