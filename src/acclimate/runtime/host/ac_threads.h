/* A pool of POSIX threads for ac_memory.workers. Not part of the runtime proper: it allocates, once, when opened. */
#ifndef AC_THREADS_H
#define AC_THREADS_H

#include "acclimate.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef AC_EXPORT
#pragma GCC visibility push(default)
#endif

#define AC_MAX_THREADS 64

/* Start count - 1 threads (1 <= count <= AC_MAX_THREADS) and give each, and the caller, its scratch; NULL where the
 * machine refuses. One run at a time may use a pool, in the process that opened it: a forked child opens
 * one of its own, and leaves its parent's. */
ac_workers *ac_workers_open(int count);

/* End the threads and free everything; NULL is allowed. */
void ac_workers_close(ac_workers *workers);

#ifdef AC_EXPORT
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
