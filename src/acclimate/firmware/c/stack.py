"""The deepest that the stack of an exported firmware can get: frames and calls as GCC's -fcallgraph-info=su draws them.

python3 stack.py FOLDER [ROOT]    FOLDER: with the .ci files of all objects; ROOT: the function to start from (main)

What is called through a pointer is known by who calls: the interpreter calls kernels, the loader checks, a delta is
written to the app or to flash, and the app calls the machine layer. Interrupts come on top.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

NODE = re.compile(r'node: \{ title: "([^"]+)" label: "([^"]*)"')
EDGE = re.compile(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"')
FRAME = re.compile(r"(\d+) bytes \((\w[\w,]*)\)")
INDIRECT = "__indirect_call"
#: Who calls through a pointer (file, function) -> whom it may reach (file, function).
REACHES = (
    (("ac_core", r"ac_run_range|ac_run"), (r"ac_kernels_\w+", r"ac_\w+_base")),
    (("ac_core", r".*"), (r"ac_checks\w*", r"ac_check_\w+")),
    (("ac_delta", r".*"), (r"ac_app|ac_store", r"pass|take|to_\w+|write_\w+|put\w*")),
    (("ac_app|ac_store", r".*"), (r"ac_board\w*|main", r".*")),
)


class Calls:
    """Frames by function, and who calls whom; functions are "file:name"."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self.frames: dict[str, int] = {}
        self.calls: dict[str, set[str]] = {}
        self.indirect: set[str] = set()
        self.unbounded: set[str] = set()
        self._public: dict[str, str] = {}
        edges: list[tuple[str, str, str]] = []
        for file, text in texts:
            for title, label in NODE.findall(text):
                found = FRAME.search(label)
                if found:
                    name = self._name(file, title)
                    self.frames[name] = int(found[1])
                    if found[2] == "dynamic":
                        self.unbounded.add(name)
                    if ":" not in title:
                        self._public[title] = name
            edges += [(file, source, target) for source, target in EDGE.findall(text)]
        for file, source, target in edges:
            caller = self._name(file, source)
            if target == INDIRECT:
                self.indirect.add(caller)
            else:
                callee = self._public.get(target) or self._name(file, target)
                self.calls.setdefault(caller, set()).add(callee)
        loops = {f for f in self.frames if any("ac_app:ac_app_" in g for g in self._below(f))}
        for caller in self.indirect:  # nothing that is called through a pointer runs the app
            self.calls.setdefault(caller, set()).update(set(self._reached(caller)) - loops)

    def _below(self, name: str) -> set[str]:
        """All that a function may call directly, itself included."""
        found, left = {name}, [name]
        while left:
            more = self.calls.get(left.pop(), set()) - found
            found |= more
            left += more
        return found

    @staticmethod
    def _name(file: str, title: str) -> str:
        return f"{file}:{title.rpartition(':')[2]}"

    def _reached(self, caller: str) -> list[str]:
        file, name = caller.split(":")
        for (of_file, of_name), (to_file, to_name) in REACHES:
            if re.fullmatch(of_file, file) and re.fullmatch(of_name, name.partition(".")[0]):
                return [
                    f
                    for f in self.frames
                    if re.fullmatch(to_file, f.split(":")[0])
                    and re.fullmatch(to_name, f.split(":")[1].partition(".")[0])
                ]
        return []

    def deepest(self, root: str) -> tuple[int, list[str]]:
        """Bytes and functions of the deepest chain of calls from a function. ValueError where calls go in a circle."""
        known: dict[str, tuple[int, list[str]]] = {}
        on_way: set[str] = set()

        def walk(name: str) -> tuple[int, list[str]]:
            if name in on_way:
                raise ValueError(f"calls go in a circle at {name}")
            if name not in known:
                on_way.add(name)
                below = [walk(callee) for callee in sorted(self.calls.get(name, ())) if callee != name]
                on_way.discard(name)
                size, chain = max(below, default=(0, []), key=lambda found: found[0])
                known[name] = (self.frames.get(name, 0) + size, [name, *chain])
            return known[name]

        return walk(self._public.get(root, root))


def read(folder: Path) -> Calls:
    """The calls of all .ci files in a folder."""
    return Calls((path.stem, path.read_text()) for path in sorted(folder.glob("*.ci")))


def main(arguments: list[str]) -> int:
    if not arguments or not list(Path(arguments[0]).glob("*.ci")):
        print(__doc__, file=sys.stderr)
        return 2
    calls = read(Path(arguments[0]))
    size, chain = calls.deepest(arguments[1] if len(arguments) > 1 else "main")
    for name in chain:
        print(f"{calls.frames.get(name, '?'):>6}  {name}")  # ?: of the compiler's own library
    print(f"{size:6d}  bytes of stack at the deepest")
    for name in sorted(calls.unbounded):
        print(f"unbounded: {name}")
    return 1 if calls.unbounded else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
