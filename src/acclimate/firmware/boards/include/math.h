/* All of libc's math.h that the runtime needs, for compilers that come without one. */
#ifndef AC_MATH_LIBC_H
#define AC_MATH_LIBC_H
#define INFINITY __builtin_inff()
#endif
