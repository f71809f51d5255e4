"""Write the C side of the op table and the docs' table from the rows; `--check` only compares.

python -m acclimate.ops.generate [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import TABLE, parse, table_hash

ROOT = Path(__file__).resolve().parents[3]
RUNTIME = ROOT / "src/acclimate/runtime"
BANNER = "Generated from src/acclimate/ops by `make generate`. Do not edit."


def header() -> str:
    lines = [
        f"/* {BANNER} */",
        "#ifndef AC_OPS_H",
        "#define AC_OPS_H",
        "",
        '#include "ac_kernel.h"',
        "",
        f"#define AC_TABLE_HASH 0x{table_hash():08X}u",
        "",
        "typedef enum {",
    ]
    lines += [f"    AC_OP_{name.upper()} = {i}," for i, name in enumerate(TABLE)]
    lines += [f"    AC_OP_COUNT = {len(TABLE)}", "} ac_op;", ""]
    for row in TABLE.values():
        if row.encoded():
            lines.append("typedef struct {")
            for name, attr in row.encoded().items():
                size = f"[{attr.kind[1:]}]" if attr.kind[1:] else ""
                lines.append(f"    {'float' if attr.kind == 'f' else 'int32_t'} {name}{size};")
            lines += [f"}} ac_attr_{row.name};", ""]
    for row in TABLE.values():
        if not row.view:
            lines.append(f"ac_status AC_KERNEL({row.name})(const ac_call *call);")
        if row.fast:
            lines.append(f"ac_status AC_FAST_KERNEL({row.name})(const ac_call *call);")
    lines += [f"ac_status ac_check_{row.name}(const ac_call *call);" for row in TABLE.values() if row.check]
    return "\n".join([*lines, "", "#endif", ""])


def table() -> str:
    lines = [
        f"/* {BANNER} */",
        '#include "ac_ops.h"',
        "",
        "extern const ac_row AC_TABLE[AC_OP_COUNT];",
        "const ac_row AC_TABLE[AC_OP_COUNT] = {",
    ]
    for row in TABLE.values():
        ins, outs = parse(row.signature)
        lines.append(
            "    {"
            + ", ".join(
                [
                    f'"{row.name}"',
                    f'"{row.signature}"',
                    str(len(ins)),
                    str(len(outs)),
                    str(sum(a.words for a in row.encoded().values())),
                    str(sum(1 << i for i in row.updates)),
                    "NULL"
                    if row.view
                    else f"AC_FAST_OR_PLAIN({row.name})"
                    if row.fast
                    else f"AC_KERNEL({row.name})",
                    f"ac_check_{row.name}" if row.check else "NULL",
                ]
            )
            + "},"
        )
    return "\n".join([*lines, "};", ""])


def docs() -> str:
    lines = [
        f"<!-- {BANNER} -->",
        "# The op table",
        "",
        f"{len(TABLE)} rows. Signatures: one letter a dimension, `~` any further ones, `*` a whole shape, `?` optional,"
        " `+` repeated, `:i32` the element type (float32 unless said).",
        "",
        "| op | signature | what | gradient | in place over |",
        "|---|---|---|---|---|",
    ]
    for row in TABLE.values():
        over = ", ".join(str(i) for i in row.in_place) or "-"
        grad = "yes" if row.grad else f"no: {row.no_grad}"
        lines.append(f"| `{row.name}` | `{row.signature}` | {row.doc} | {grad} | {over} |")
    return "\n".join([*lines, ""])


def main() -> int:
    return publish(
        {RUNTIME / "ac_ops.h": header(), RUNTIME / "ac_table.c": table(), ROOT / "docs/ops.md": docs()}
    )


def publish(targets: dict[Path, str]) -> int:
    """Write the files that are not as they should be, or with `--check` say so; an exit status."""
    stale = [path for path, text in targets.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(
                f"{path.relative_to(ROOT)} does not match what it is made from. Next: make generate",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(targets[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
