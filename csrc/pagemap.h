/* What /proc/PID/pagemap says of the pages of a process. Inside of the core. */
#ifndef QM_PAGEMAP_H
#define QM_PAGEMAP_H

#include <stdint.h>
#include <sys/ioctl.h>

/* PAGEMAP_SCAN, Linux 6.7. Declared here, since the system's headers may be older than its
 * kernel. */
struct pagemap_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, all_of, any_of, returned;
};

struct pagemap_region {
    uint64_t start, end, categories;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pagemap_scan)
#define PAGEMAP_IS_FILE ((uint64_t)1 << 2)
#define PAGEMAP_IS_PRESENT ((uint64_t)1 << 3)
#define PAGEMAP_IS_SWAPPED ((uint64_t)1 << 4)
#define PAGEMAP_IS_ZERO_PAGE ((uint64_t)1 << 5)
#define PAGEMAP_IS_HUGE ((uint64_t)1 << 6)

/* The words of the file, one a page. The frame is 0 where the kernel does not tell. */
#define PAGEMAP_WORD_FRAME (((uint64_t)1 << 55) - 1)
#define PAGEMAP_WORD_FILE ((uint64_t)1 << 61)
#define PAGEMAP_WORD_SWAPPED ((uint64_t)1 << 62)
#define PAGEMAP_WORD_PRESENT ((uint64_t)1 << 63)

#endif
