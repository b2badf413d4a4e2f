/* The alignment that direct I/O requires. */
#define _GNU_SOURCE
#include "qmigrate.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x2000U
#endif
/* struct statx is always 256 bytes; old C libraries do not declare the field. */
#define STATX_LEN 256
#define AT_MASK 0
#define AT_DIO_MEM 152
#define AT_DIO_OFFSET 156

static uint32_t field(const unsigned char *statx_bytes, size_t at)
{
    uint32_t value;
    memcpy(&value, statx_bytes + at, sizeof(value));
    return value;
}

int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align)
{
    unsigned char stx[STATX_LEN];
    memset(stx, 0, sizeof(stx));
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, stx) < 0)
        return -errno;
    if (!(field(stx, AT_MASK) & STATX_DIOALIGN))
        return -ENOSYS;
    uint32_t mem = field(stx, AT_DIO_MEM), off = field(stx, AT_DIO_OFFSET);
    if (mem == 0 || off == 0)
        return -EOPNOTSUPP;
    if ((mem & (mem - 1)) || (off & (off - 1)) || mem > QM_MAX_PAGE || off > QM_MAX_PAGE)
        return -EOPNOTSUPP;
    *mem_align = mem;
    *off_align = off;
    return 0;
}
