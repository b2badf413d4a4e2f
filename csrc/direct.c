/* The alignment that direct I/O requires. */
#define _GNU_SOURCE
#include "qmigrate.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
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

static int is_btrfs(int fd, struct statfs *info)
{
    return fstatfs(fd, info) == 0 && (unsigned long)info->f_type == BTRFS_SUPER_MAGIC;
}

/* btrfs, up to Linux 6.18 at least, does not report what direct I/O requires: whole sectors. */
static int btrfs_align(int fd, uint32_t *mem_align, uint32_t *off_align)
{
    struct statfs info;
    if (!is_btrfs(fd, &info) || info.f_bsize <= 0 || info.f_bsize > QM_MAX_PAGE)
        return -ENOSYS;
    *mem_align = *off_align = (uint32_t)info.f_bsize;
    return 0;
}

int qm_buffers_direct_writes(int fd)
{
    struct statfs info;
    int flags = 0;
    if (!is_btrfs(fd, &info))
        return 0;
    return ioctl(fd, FS_IOC_GETFLAGS, &flags) < 0 || !(flags & FS_NOCOW_FL);
}

int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align)
{
    unsigned char stx[STATX_LEN];
    memset(stx, 0, sizeof(stx));
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, stx) < 0)
        return -errno;
    if (!(field(stx, AT_MASK) & STATX_DIOALIGN))
        return btrfs_align(fd, mem_align, off_align);
    uint32_t mem = field(stx, AT_DIO_MEM), off = field(stx, AT_DIO_OFFSET);
    if (mem == 0 || off == 0)
        return -EOPNOTSUPP;
    if ((mem & (mem - 1)) || (off & (off - 1)) || mem > QM_MAX_PAGE || off > QM_MAX_PAGE)
        return -EOPNOTSUPP;
    *mem_align = mem;
    *off_align = off;
    return 0;
}
