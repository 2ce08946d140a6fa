// Read before every source by tools/wheels.py: exp2 and log2 by the versions that every glibc has. Those of 2.29 give the
// same values, and differ in errno alone, which nothing here reads.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
__asm__(".symver exp2, exp2@GLIBC_2.2.5\n.symver log2, log2@GLIBC_2.2.5");
#elif defined(__linux__) && defined(__aarch64__)
__asm__(".symver exp2, exp2@GLIBC_2.17\n.symver log2, log2@GLIBC_2.17");
#endif
