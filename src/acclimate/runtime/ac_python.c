/* The Python binding: load a Program, run a range of its ops on two buffers. Limited API, no numpy headers.
 *
 * Memory is the caller's (numpy arrays); a Program object keeps an aligned copy of its bytes.
 */
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "ac_kernel.h"

typedef struct {
    ac_program program;
    uint32_t *bytes;
} loaded;

static const char *const CAPSULE = "acclimate.Program";

static void release(PyObject *capsule) {
    loaded *l = PyCapsule_GetPointer(capsule, CAPSULE);
    if (l) free(l->bytes);
    free(l);
}

/* The table of a named instruction set, NULL where it was not built. The caller must know that the processor has it. */
static const ac_row *table_of(const char *isa) {
    if (strcmp(isa, "auto") == 0) return ac_best_table();
    if (strcmp(isa, "base") == 0) return ac_table_base;
#if defined(AC_HAVE_V3)
    if (strcmp(isa, "v3") == 0) return ac_table_v3;
#endif
#if defined(AC_HAVE_V4)
    if (strcmp(isa, "v4") == 0) return ac_table_v4;
#endif
    return NULL;
}

/* load(bytes, isa) -> (status, text, Program or None) */
static PyObject *py_load(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer view;
    const char *isa;
    if (!PyArg_ParseTuple(args, "y*s", &view, &isa)) return NULL;
    const ac_row *rows = table_of(isa);
    if (!rows) {
        PyBuffer_Release(&view);
        return PyErr_Format(PyExc_ValueError, "no kernels were built for %s", isa);
    }
    loaded *l = malloc(sizeof *l);
    if (l) l->bytes = malloc(view.len ? (size_t)view.len : 4);
    if (!l || !l->bytes) {
        free(l);
        PyBuffer_Release(&view);
        return PyErr_NoMemory();
    }
    memcpy(l->bytes, view.buf, (size_t)view.len);
    ac_status status = ac_load_with(&l->program, l->bytes, (size_t)view.len, rows);
    PyBuffer_Release(&view);
    if (status != AC_OK) {
        free(l->bytes);
        free(l);
        return Py_BuildValue("isO", (int)status, ac_status_text(status), Py_None);
    }
    PyObject *capsule = PyCapsule_New(l, CAPSULE, release);
    if (!capsule) {
        free(l->bytes);
        free(l);
        return NULL;
    }
    return Py_BuildValue("isN", 0, ac_status_text(AC_OK), capsule);
}

/* Get the two blocks of memory, large enough for the program; 0 on success. */
static int memory_of(const loaded *l, PyObject *state, PyObject *arena, Py_buffer *s, Py_buffer *a, ac_memory *m) {
    if (PyObject_GetBuffer(state, s, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) return -1;
    if (PyObject_GetBuffer(arena, a, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) {
        PyBuffer_Release(s);
        return -1;
    }
    if ((size_t)s->len < l->program.state_bytes || (size_t)a->len < l->program.arena_bytes || (uintptr_t)s->buf % 4
        || (uintptr_t)a->buf % 4) {
        PyBuffer_Release(s);
        PyBuffer_Release(a);
        PyErr_SetString(PyExc_ValueError, "state or arena is too small or not aligned");
        return -1;
    }
    m->state = s->buf;
    m->arena = a->buf;
    return 0;
}

/* reset(Program, state) */
static PyObject *py_reset(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *state;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &state)) return NULL;
    const loaded *l = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!l) return NULL;
    Py_buffer s;
    if (PyObject_GetBuffer(state, &s, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) return NULL;
    ac_memory m = {s.buf, s.buf};
    ac_status status = (size_t)s.len < l->program.state_bytes ? AC_E_OFFSET : ac_reset(&l->program, &m);
    PyBuffer_Release(&s);
    if (status != AC_OK) {
        PyErr_SetString(PyExc_ValueError, ac_status_text(status));
        return NULL;
    }
    Py_RETURN_NONE;
}

/* run(Program, entry name, state, arena, first, end) -> status; end < 0 runs to the last op. Releases the GIL. */
static PyObject *py_run(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *state, *arena;
    const char *name;
    long first, end;
    if (!PyArg_ParseTuple(args, "OsOOll", &capsule, &name, &state, &arena, &first, &end)) return NULL;
    const loaded *l = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!l) return NULL;
    ac_entry entry;
    if (ac_find_entry(&l->program, name, &entry) != AC_OK) return PyErr_Format(PyExc_KeyError, "no entry is called %s", name);
    Py_buffer s, a;
    ac_memory m;
    if (memory_of(l, state, arena, &s, &a, &m) != 0) return NULL;
    ac_status status;
    Py_BEGIN_ALLOW_THREADS
    const uint32_t last = end < 0 || (unsigned long)end > entry.n_ops ? entry.n_ops : (uint32_t)end;
    status = ac_run_range(&l->program, &m, &entry, first < 0 ? 0 : first > (long)last ? last : (uint32_t)first, last);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&s);
    PyBuffer_Release(&a);
    return PyLong_FromLong(status);
}

static PyObject *py_status_text(PyObject *self, PyObject *arg) {
    (void)self;
    return PyUnicode_FromString(ac_status_text((ac_status)PyLong_AsLong(arg)));
}

static PyObject *py_best_isa(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    const ac_row *best = ac_best_table();
    return PyUnicode_FromString(best == ac_table_base ? "base" : best == table_of("v3") ? "v3" : "v4");
}

static PyMethodDef methods[] = {
    {"load", py_load, METH_VARARGS, "load(bytes, isa) -> (status, text, Program or None)"},
    {"reset", py_reset, METH_VARARGS, "reset(Program, state): fill the state block with its initial content"},
    {"run", py_run, METH_VARARGS, "run(Program, entry, state, arena, first, end) -> status"},
    {"status_text", py_status_text, METH_O, "status_text(status) -> str"},
    {"best_isa", py_best_isa, METH_NOARGS, "best_isa() -> the instruction set that auto takes here"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", "Binding of the C runtime.", 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) {
    return PyModule_Create(&module);
}
