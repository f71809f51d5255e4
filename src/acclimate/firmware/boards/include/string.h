/* All of libc that the runtime needs, for compilers that come without one; the compiler's own library defines it. */
#ifndef AC_STRING_H
#define AC_STRING_H
#include <stddef.h>
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
#endif
