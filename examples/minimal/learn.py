"""Learning with a bare Python and libacclimate.so: no numpy, no package, no compiler on the device.

    python learn.py libacclimate.so digits.acp digits.acd learned.acu

The Program and the samples are those of examples/c (make_program.py writes them); learned.acu is the file that
Learner.restore reads. A second run goes on from it.
"""

import ctypes as c
import os
import struct
import sys


class Program(c.Structure):
    _fields_ = [
        (n, c.c_void_p) for n in "bytes rows tensors ops constants initial names entries bindings".split()
    ]
    _fields_ += [(n, c.c_uint32) for n in "tensors_ words entries_ bindings_ constants_ state arena".split()]
    _fields_ += [("more", c.c_uint32 * 3)]


class Memory(c.Structure):
    _fields_ = [("state", c.c_void_p), ("arena", c.c_void_p), ("workers", c.c_void_p)]


class Entry(c.Structure):
    _fields_ = [("name", c.c_char_p), ("words", c.c_uint32 * 5)]


class Tensor(c.Structure):
    _fields_ = [
        ("kind", c.c_uint8 * 4),
        ("offset", c.c_uint32),
        ("size", c.c_uint32),
        ("more", c.c_uint32 * 7),
    ]


class Binding(c.Structure):
    _fields_ = [("name", c.c_char_p), ("tensor", c.POINTER(Tensor)), ("is_output", c.c_uint32)]


Sink = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_size_t)
library, program_path, samples_path, kept = sys.argv[1:5]
ac = c.CDLL(os.path.abspath(library))
ac.ac_address.restype, ac.ac_status_text.restype = c.c_void_p, c.c_char_p


def do(name, *args):
    """Call a function that returns an ac_status."""
    status = getattr(ac, name)(*args)
    if status:
        sys.exit(f"{name}: {ac.ac_status_text(status).decode()}")


def place(entry, name):
    """(address, elements) of an input or output."""
    binding = Binding()
    do("ac_find_binding", p, c.byref(entry), name, c.byref(binding))
    return ac.ac_address(p, memory, binding.tensor), binding.tensor[0].size


def entry(name):
    found = Entry()
    do("ac_find_entry", p, name, c.byref(found))
    return found


with open(program_path, "rb") as f:
    raw = f.read()
code, program = (
    c.create_string_buffer(raw, len(raw)),
    Program(),
)  # malloc aligns it; it must stay as long as `program`
p = c.byref(program)
do("ac_load", p, code, c.c_size_t(len(raw)))
state, arena = c.create_string_buffer(max(program.state, 4)), c.create_string_buffer(max(program.arena, 4))
memory = c.byref(Memory(c.addressof(state), c.addressof(arena), None))
do("ac_reset", p, memory)
if os.path.exists(kept):
    with open(kept, "rb") as f:
        raw = f.read()
    do("ac_delta_load", p, memory, raw, c.c_size_t(len(raw)), None)

with open(samples_path, "rb") as f:
    _, count, floats, held_out = struct.unpack("<4I", f.read(16))
    samples = [
        (f.read(4), f.read(4 * floats)) for _ in range(count)
    ]  # label and pixels, as they lie in memory
step, predict = entry(b"step"), entry(b"predict")
(x, _), (y, batch), (lr, _), (loss, _) = (place(step, name) for name in (b"x", b"y", b"lr", b"loss"))
(seen, _), (output, outputs) = place(predict, b"x"), place(predict, b"output")


def accuracy():
    right = 0
    for label, pixels in samples[count - held_out :]:
        c.memmove(seen, pixels, 4 * floats)
        do("ac_run", p, memory, c.byref(predict))
        scores = struct.unpack(f"<{outputs // batch}f", c.string_at(output, 4 * (outputs // batch)))
        right += scores.index(max(scores)) == struct.unpack("<i", label)[0]
    return right / held_out


print(f"accuracy before {accuracy():.4f}")
for first in list(range(0, count - held_out - batch + 1, batch)) * 3:
    for k, (label, pixels) in enumerate(samples[first : first + batch]):
        c.memmove(x + 4 * floats * k, pixels, 4 * floats)
        c.memmove(y + 4 * k, label, 4)
    c.c_float.from_address(lr).value = 0.005
    do("ac_run", p, memory, c.byref(step))
print(f"accuracy after  {accuracy():.4f}, loss {c.c_float.from_address(loss).value:.4f}")

with open(
    kept + ".part", "wb"
) as f:  # beside the old file, synced, renamed: a power cut leaves one of the two whole
    write = Sink(lambda _, data, size: f.write(c.string_at(data, size)) != size)
    do("ac_delta_save", p, memory, 0, write, None, None)
    f.flush()
    os.fsync(f.fileno())
os.replace(kept + ".part", kept)
