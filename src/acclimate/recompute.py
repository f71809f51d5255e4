"""What a training step computes again instead of keeping it for the backward part: bytes against time.

A recomputed value is dropped after its last use in the forward part; just before the backward part first needs it,
copies of the nodes that make it run again, from what is kept. The copy is shared by all later uses and dies after
the last. The same kernel reads the same bytes, so a plan's numbers are equal bit for bit whatever is recomputed.

Choosing well is checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) as an
optimisation (Jain et al., "Checkmate", 2020), restricted to one execution more a value, in the order given.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt

from .ir import Graph, Node, Value, reachable
from .layout import Layout, arrange, root_of
from .ops import TABLE, parse

Price = Callable[[Graph, Node], float]
TARGET_ATTEMPTS = 6  # how often a choice whose placement leaves gaps is made again for less
TIGHTER = (1.0, 0.99, 0.96)  # of a target, for which it is searched
EXCHANGED = 40  # candidates that an exchange may take in
REFINED = 4  # starting points that are improved one value at a time


@dataclass(frozen=True)
class Cost:
    """What a choice takes in the given order: most bytes alive, time of what runs again, and bytes above a target."""

    peak_bytes: int
    time_us: float
    over_bytes: int


@dataclass(frozen=True)
class Turn:
    """A node in numbers: values read, made, those that the first result may take over, those that a copy makes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    over: tuple[int, ...]
    early: bool
    kept: tuple[int, ...]
    price: float


class Step:
    """A training step in one order, and what could be computed again in it.

    layout: the step as it is without recomputation, whose order is kept. price: microseconds that one more run of a
    node takes.
    """

    def __init__(self, layout: Layout, price: Price) -> None:
        self.graph = graph = layout.graph.copy()
        graph.nodes = list(layout.nodes)
        self.made = {n: i for i, node in enumerate(graph.nodes) for n in node.outputs if n}
        self.early = {id(n) for n in reachable(graph, [graph.outputs["loss"]])}
        self._price = price
        self._costs: dict[frozenset[str], tuple[float, list[int]]] = {}

    def root(self, name: str) -> str:
        """The value that `name` is a view of."""
        return root_of(self.graph, self.made, name)

    def _can(self, name: str) -> bool:
        """Whether a value is the first output of a node of the forward part; others are small and always kept."""
        i = self.made.get(name)
        return (
            i is not None and id(self.graph.nodes[i]) in self.early and self.graph.nodes[i].outputs[0] == name
        )

    @cached_property
    def candidates(self) -> list[str]:
        """Values that could be computed again, in the order in which they are made."""
        late = {
            self.root(n) for node in self.graph.nodes if id(node) not in self.early for n in node.inputs if n
        }
        wanted = {n for n in late if self._can(n)}
        stack = list(wanted)
        while stack:  # and what they are made from
            for n in {self.root(n) for n in self.graph.nodes[self.made[stack.pop()]].inputs if n} - wanted:
                if self._can(n):
                    wanted.add(n)
                    stack.append(n)
        kept = {self.root(n) for n in self.graph.outputs.values()}
        return sorted(wanted - kept, key=self.made.__getitem__)

    def rewrite(self, again: Iterable[str]) -> Graph:
        """The step in which the values `again` are recomputed where the backward part needs them."""
        chosen = set(again)
        new = self.graph.copy()
        new.nodes = []
        copies: dict[str, str] = {}

        def copy(i: int) -> None:
            """Run node `i` of the forward part again, on what the backward part sees."""
            node = self.graph.nodes[i]
            patterns = parse(TABLE[node.op].signature)[1]
            outputs = []
            for n, pattern in zip(node.outputs, patterns, strict=True):
                keep = n and (n == node.outputs[0] or not pattern.optional)
                outputs.append(new.add(Value(new.fresh(f"{n}.again"), new.type(n))) if keep else "")
            inputs = tuple(copies.get(n, n) for n in node.inputs)
            new.nodes.append(replace(node, inputs=inputs, outputs=tuple(outputs)))
            copies[node.outputs[0]] = outputs[0]

        for node in self.graph.nodes:
            if id(node) not in self.early:
                missing: set[int] = set()
                stack = list(node.inputs)
                while stack:
                    name = stack.pop()
                    if (
                        name
                        and name not in copies
                        and self.root(name) in chosen
                        and self.made[name] not in missing
                    ):
                        missing.add(self.made[name])
                        stack += self.graph.nodes[self.made[name]].inputs
                for i in sorted(missing):
                    copy(i)
                inputs = tuple(copies.get(n, n) for n in node.inputs)
                node = node if inputs == node.inputs else replace(node, inputs=inputs)
            new.nodes.append(node)
        return new

    @cached_property
    def numbered(self) -> tuple[list[str], list[int], list[Turn]]:
        """(values with bytes of their own, bytes of each, the nodes in order with values as numbers); no views."""
        graph = self.graph
        names = [
            n
            for n in (*graph.inputs.values(), *self.made)
            if n not in self.made or not TABLE[graph.nodes[self.made[n]].op].view
        ]
        number = {n: i for i, n in enumerate(names)}
        sizes = [graph.type(n).size_bytes for n in names]
        turns = []
        for node in graph.nodes:
            row = TABLE[node.op]
            if row.view:
                continue
            roots = [self.root(n) if n else "" for n in node.inputs]
            first = node.outputs[0] if node.outputs else ""
            over = []
            for j in row.in_place:
                if first and j < len(roots) and roots[j] in number:
                    twins = [k for k, r in enumerate(roots) if k != j and r == roots[j]]
                    alone = all(k in row.in_place and node.inputs[k] == node.inputs[j] for k in twins)
                    sizes_agree = sizes[number[roots[j]]] == graph.type(first).size_bytes
                    if (
                        alone
                        and sizes_agree
                        and graph.type(node.inputs[j]).size_bytes == graph.type(first).size_bytes
                    ):
                        over.append(number[roots[j]])
            copied = [
                n
                for n, p in zip(node.outputs, parse(row.signature)[1], strict=True)
                if n and (n == first or not p.optional)
            ]
            copy = replace(node, outputs=tuple(n if n in copied else "" for n in node.outputs))
            turns.append(
                Turn(
                    tuple(number[r] for r in dict.fromkeys(roots) if r in number),
                    tuple(number[n] for n in node.outputs if n),
                    tuple(over),
                    id(node) in self.early,
                    tuple(number[n] for n in copied),
                    self._price(graph, copy),
                )
            )
        return names, sizes, turns

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {n: i for i, n in enumerate(self.numbered[0])}

    def cost(self, again: frozenset[str], target_bytes: int = 0) -> Cost:
        """Exact for the order given, save for gaps that placing may leave.

        The same as the layout of `rewrite(again)` in its own order, found without making that graph.
        """
        if again not in self._costs:
            if len(self._costs) > 20000:
                self._costs.clear()
            self._costs[again] = self._run({self._numbers[n] for n in again})
        time, live = self._costs[again]
        return Cost(max(live), time, sum(n - target_bytes for n in live if n > target_bytes))

    def _run(self, chosen: set[int]) -> tuple[float, list[int]]:
        """(time of what runs again, bytes alive at each node) with the values of the given numbers recomputed."""
        names, sizes, turns = self.numbered
        count = len(names)
        maker = self._maker
        done: set[int] = set()
        steps: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = []
        time = 0.0
        for turn in turns:
            if turn.early or chosen.isdisjoint(turn.inputs):
                steps.append((turn.inputs, turn.outputs, turn.over))
                continue
            missing: set[int] = set()
            stack = list(turn.inputs)
            while stack:
                v = stack.pop()
                if v in chosen and v not in done:
                    done.add(v)
                    missing.add(v)
                    stack += maker[v].inputs
            for v in sorted(missing):  # numbers follow the order in which values are made
                again = maker[v]
                time += again.price
                steps.append(
                    (
                        [u + count if u in chosen else u for u in again.inputs],
                        [u + count for u in again.kept],
                        [u + count if u in chosen else u for u in again.over],
                    )
                )
            steps.append(
                (
                    [u + count if u in chosen else u for u in turn.inputs],
                    turn.outputs,
                    [u + count if u in chosen else u for u in turn.over],
                )
            )
        last = [-1] * (2 * count)
        for i, (inputs, outputs, _) in enumerate(steps):
            for v in outputs:
                last[v] = i
            for v in inputs:
                last[v] = i
        for v in self.kept:
            last[v] = len(steps)
        now = sum(sizes[v] for v in self.fed if last[v] >= 0)
        unread = sum(sizes[v] for v in self.fed if last[v] < 0)
        live = []
        for i, (inputs, outputs, over) in enumerate(steps):
            taken = -1
            for v in over:
                if last[v] == i:
                    taken = v
                    break
            for k, v in enumerate(outputs):
                if k or taken < 0:
                    now += sizes[v % count]
            live.append(now + unread)
            unread = 0
            for v in inputs:
                if last[v] == i and v != taken:
                    now -= sizes[v % count]
            for v in outputs:
                if last[v] == i:
                    now -= sizes[v % count]
        return time, live

    @cached_property
    def _maker(self) -> dict[int, Turn]:
        return {v: turn for turn in self.numbered[2] for v in turn.outputs}

    @cached_property
    def kept(self) -> list[int]:
        """Numbers of the outputs."""
        roots = {self.root(n) for n in self.graph.outputs.values()}
        return [self._numbers[n] for n in roots if n in self._numbers]

    @cached_property
    def fed(self) -> list[int]:
        """Numbers of the inputs."""
        return [self._numbers[n] for n in self.graph.inputs.values()]

    # -- choosing ------------------------------------------------------------------------------------------------
    @cached_property
    def least_bytes(self) -> int:
        """What the largest node alone holds: no choice needs less."""
        sizes = self.numbered[1]
        return max(
            sum(sizes[v] for v in {*t.inputs, *t.outputs}) - (sizes[t.outputs[0]] if t.over else 0)
            for t in self.numbered[2]
        )

    @cached_property
    def segments(self) -> list[frozenset[str]]:
        """Keep only every k-th of the values that alone cross a point of the forward part, for k up to 2 sqrt(n)."""
        last = {}
        for i, node in enumerate(self.graph.nodes):
            if id(node) in self.early:
                last.update({self.root(n): i for n in node.inputs if n})
        gates = []
        own = {self.made[n]: n for n in self.made if id(self.graph.nodes[self.made[n]]) in self.early}
        crossing: set[str] = set()
        for i in sorted(own):
            crossing = {n for n in crossing if last.get(n, -1) > i}
            crossing |= {
                n for n in (self.root(m) for m in self.graph.nodes[i].outputs if m) if last.get(n, -1) > i
            }
            if len(crossing) == 1:
                gates.append(next(iter(crossing)))
        gates = [g for g in dict.fromkeys(gates) if g in set(self.candidates)]
        every = frozenset(self.candidates)
        return [every - set(gates[k - 1 :: k]) for k in range(1, 2 * isqrt(max(len(gates), 1)) + 2)]

    def greedy(self, target_bytes: int) -> frozenset[str] | None:
        """Values to recompute so that no more than `target_bytes` are alive, at little extra time; None: not found.

        Adds the value that takes most bytes off what is above the target for its time, until nothing is; the same
        from segments of equal length; then drops and exchanges values as long as that saves time.
        """
        if self.cost(frozenset()).peak_bytes <= target_bytes:
            return frozenset()
        if self.least_bytes > target_bytes:
            return None
        found = []
        for (
            share
        ) in TIGHTER:  # a choice for less, from which something is dropped again, is sometimes the better one
            reached = self._search(int(target_bytes * share))
            if reached is not None:
                found.append(self._exchange(self._drop(reached, target_bytes), target_bytes))
        return min(found, key=lambda s: (self.cost(s).time_us, sorted(s)), default=None)

    def _search(self, target_bytes: int) -> frozenset[str] | None:
        found = []
        for start in (frozenset(), *self.segments):
            reached = start if self._meets(start, target_bytes) else self._add(start, target_bytes)
            if reached is not None:
                found.append(reached)
        found = sorted(dict.fromkeys(found), key=lambda s: (self.cost(s).time_us, sorted(s)))[:REFINED]
        thin = [self._exchange(self._drop(s, target_bytes), target_bytes) for s in found]
        return min(thin, key=lambda s: (self.cost(s).time_us, sorted(s)), default=None)

    def _meets(self, again: frozenset[str], target_bytes: int) -> bool:
        return self.cost(again).peak_bytes <= target_bytes

    def _add(self, start: frozenset[str], target_bytes: int) -> frozenset[str] | None:
        chosen, now = start, self.cost(start, target_bytes)

        def gain(name: str) -> float:
            other = self.cost(chosen | {name}, target_bytes)
            saved = now.over_bytes - other.over_bytes
            return saved / max(other.time_us - now.time_us, 1e-9) if saved > 0 else 0.0

        heap = [(-gain(n), i, n) for i, n in enumerate(self.candidates) if n not in chosen]
        heapq.heapify(heap)
        stale: list[tuple[float, int, str]] = []
        while now.over_bytes and heap:
            _, i, name = heapq.heappop(heap)
            value = gain(name)  # what was known of it may be old; most often it is still the best
            if heap and value < -heap[0][0]:
                (heapq.heappush(heap, (-value, i, name)) if value else stale.append((0.0, i, name)))
                continue
            if not value:
                stale.append((0.0, i, name))
                continue
            chosen |= {name}
            now = self.cost(chosen, target_bytes)
            for item in stale:  # alone they did not help; after this one they may
                heapq.heappush(heap, (-gain(item[2]), *item[1:]))
            stale = []
        return chosen if not now.over_bytes else None

    def _drop(self, chosen: frozenset[str], target_bytes: int) -> frozenset[str]:
        """Without what the target does not need, the dearest first."""
        time = self.cost(chosen).time_us
        saved = {n: time - self.cost(chosen - {n}).time_us for n in chosen}
        for name in sorted(chosen, key=lambda n: (-saved[n], n)):
            if self._meets(chosen - {name}, target_bytes):
                chosen -= {name}
        return chosen

    def _exchange(self, chosen: frozenset[str], target_bytes: int) -> frozenset[str]:
        """Give up a dear value for cheaper ones, as long as that saves time."""
        better = True
        while better:
            better = False
            time = self.cost(chosen).time_us
            for name in sorted(chosen, key=lambda n: (self.cost(chosen - {n}).time_us, n))[:12]:
                kept = self._add_without(chosen - {name}, name, target_bytes)
                if kept is not None and self.cost(kept).time_us < time * (1 - 1e-9):
                    chosen, better = self._drop(kept, target_bytes), True
                    break
        return chosen

    @cached_property
    def _cheap(self) -> list[str]:
        """The candidates that give most bytes for their own time, whatever else is recomputed."""
        sizes = self.numbered[1]
        value = {
            n: sizes[self._numbers[n]] / max(self._maker[self._numbers[n]].price, 1e-9)
            for n in self.candidates
        }
        return sorted(self.candidates, key=lambda n: (-value[n], n))[:EXCHANGED]

    def _add_without(self, start: frozenset[str], banned: str, target_bytes: int) -> frozenset[str] | None:
        """`start` and at most two more values, none of them `banned`, that meet the target."""
        chosen = start
        for _ in range(2):
            now = self.cost(chosen, target_bytes)
            options = []
            for name in self._cheap:
                if name not in chosen and name != banned:
                    other = self.cost(chosen | {name}, target_bytes)
                    if other.over_bytes < now.over_bytes:
                        options.append(((now.over_bytes - other.over_bytes) / max(other.time_us, 1e-9), name))
            if not options:
                return None
            chosen |= {max(options)[1]}
            if self._meets(chosen, target_bytes):
                return chosen
        return None


@dataclass(frozen=True)
class Fit:
    """A layout and the values that it recomputes. proven: in this order of nodes no choice is quicker."""

    layout: Layout
    recomputed: tuple[str, ...]
    proven: bool = False


def fit(step: Step, room_bytes: int, how: str = "auto") -> Fit | None:
    """The quickest choice found whose arena is at most `room_bytes`; None where none is found.

    how: "auto", the search in numpy alone; "exact", an integer program (needs scipy).
    """
    target = room_bytes
    for _ in range(TARGET_ATTEMPTS):
        if how == "exact":
            from .exact import solve

            solution = solve(step, target)
            chosen = None if solution is None else solution.again
            proven = solution is not None and solution.proven and target == room_bytes
        else:
            chosen, proven = step.greedy(target), False
        if chosen is None:
            return None
        layout = arrange(step.rewrite(chosen))
        if layout.arena_bytes <= room_bytes:
            return Fit(layout, tuple(n for n in step.candidates if n in chosen), proven)
        target -= layout.arena_bytes - room_bytes
    return None


def apply(step: Step, names: Iterable[str]) -> Fit:
    """Recomputes those values of the given names that can be."""
    known = tuple(n for n in step.candidates if n in set(names))
    return Fit(arrange(step.rewrite(known)), known)
