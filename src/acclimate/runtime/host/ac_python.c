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
#include <unistd.h>

#include "ac_kernel.h"
#include "ac_threads.h"

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

/* Threads belong to the process that started them: a forked child starts its own at its first run. */
typedef struct {
    ac_workers *workers;
    pid_t process;
    int count;
} team;

static const char *const TEAM = "acclimate.Workers";

static void dismiss(PyObject *capsule) {
    team *t = PyCapsule_GetPointer(capsule, TEAM);
    if (t && t->process == getpid()) ac_workers_close(t->workers);
    free(t);
}

static int recruit(team *t) {
    if (t->workers && t->process == getpid()) return 0;
    t->workers = ac_workers_open(t->count);
    t->process = getpid();
    if (t->workers) return 0;
    PyErr_Format(PyExc_OSError, "cannot start %d threads", t->count);
    return -1;
}

/* workers(count) -> Workers, for one run at a time */
static PyObject *py_workers(PyObject *self, PyObject *arg) {
    (void)self;
    const long count = PyLong_AsLong(arg);
    if (PyErr_Occurred()) return NULL;
    if (count < 1 || count > AC_MAX_THREADS) return PyErr_Format(PyExc_ValueError, "1 to %d threads", AC_MAX_THREADS);
    team *t = calloc(1, sizeof *t);
    if (!t) return PyErr_NoMemory();
    t->count = (int)count;
    PyObject *capsule = recruit(t) == 0 ? PyCapsule_New(t, TEAM, dismiss) : NULL;
    if (!capsule) {
        ac_workers_close(t->workers);
        free(t);
    }
    return capsule;
}

/* load(bytes, isa, fast) -> (status, text, Program or None) */
static PyObject *py_load(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer view;
    const char *isa;
    int fast;
    if (!PyArg_ParseTuple(args, "y*sp", &view, &isa, &fast)) return NULL;
    const ac_row *rows = ac_table_of(isa, fast);
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
    m->workers = NULL;
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
    ac_memory m = {s.buf, s.buf, NULL};
    ac_status status = (size_t)s.len < l->program.state_bytes ? AC_E_OFFSET : ac_reset(&l->program, &m);
    PyBuffer_Release(&s);
    if (status != AC_OK) {
        PyErr_SetString(PyExc_ValueError, ac_status_text(status));
        return NULL;
    }
    Py_RETURN_NONE;
}

/* run(Program, entry name, state, arena, first, end, Workers or None) -> status; end < 0 runs to the last op.
 * Releases the GIL. */
static PyObject *py_run(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule, *state, *arena, *workers;
    const char *name;
    long first, end;
    if (!PyArg_ParseTuple(args, "OsOOllO", &capsule, &name, &state, &arena, &first, &end, &workers)) return NULL;
    const loaded *l = PyCapsule_GetPointer(capsule, CAPSULE);
    team *t = workers == Py_None ? NULL : PyCapsule_GetPointer(workers, TEAM);
    if (!l || (workers != Py_None && (!t || recruit(t) != 0))) return NULL;
    ac_entry entry;
    if (ac_find_entry(&l->program, name, &entry) != AC_OK) return PyErr_Format(PyExc_KeyError, "no entry is called %s", name);
    Py_buffer s, a;
    ac_memory m;
    if (memory_of(l, state, arena, &s, &a, &m) != 0) return NULL;
    m.workers = t ? t->workers : NULL;
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
    const ac_row *best = ac_table_of("auto", 0);
    return PyUnicode_FromString(best == ac_table_of("base", 0) ? "base" : best == ac_table_of("v3", 0) ? "v3" : "v4");
}

static PyMethodDef methods[] = {
    {"load", py_load, METH_VARARGS, "load(bytes, isa, fast) -> (status, text, Program or None)"},
    {"reset", py_reset, METH_VARARGS, "reset(Program, state): fill the state block with its initial content"},
    {"run", py_run, METH_VARARGS, "run(Program, entry, state, arena, first, end, Workers or None) -> status"},
    {"workers", py_workers, METH_O, "workers(count) -> Workers: threads and their scratch, for one run at a time"},
    {"status_text", py_status_text, METH_O, "status_text(status) -> str"},
    {"best_isa", py_best_isa, METH_NOARGS, "best_isa() -> the instruction set that auto takes here"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", "Binding of the C runtime.", 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) {
    return PyModule_Create(&module);
}
