/* Preloaded under a Python: makes vectored reads and writes fail as FAULT says.
 *   FAULT=read|write,MODE,FROM,EVERY
 * Calls of that kind are counted from 1; call FROM and every EVERY-th after it is hit.
 *   eintr, eagain, eio, enospc   fail so
 *   short    move about half, whole 4 KiB
 *   odd      move everything, and own up to 100 bytes less than half
 *   end      (read) claim the end of the file
 * QUEUE=off makes native AIO unavailable. Otherwise what it returns is changed likewise, every
 * EVERY-th result; the core then repeats the transfer with the calls above. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef ssize_t (*transfer)(int, const struct iovec *, int, off_t);

static ssize_t faulty(const char *kind, atomic_int *calls, transfer real, int fd,
                      const struct iovec *iov, int n, off_t at)
{
    char wanted[8], mode[16];
    int from, every;
    const char *fault = getenv("FAULT");
    if (!fault || sscanf(fault, "%7[^,],%15[^,],%d,%d", wanted, mode, &from, &every) != 4 ||
        strcmp(wanted, kind))
        return real(fd, iov, n, at);
    int call = atomic_fetch_add(calls, 1) + 1;
    if (call < from || (call - from) % every)
        return real(fd, iov, n, at);
    int error = !strcmp(mode, "eintr")    ? EINTR
                : !strcmp(mode, "eagain") ? EAGAIN
                : !strcmp(mode, "eio")    ? EIO
                : !strcmp(mode, "enospc") ? ENOSPC
                                          : 0;
    if (error) {
        errno = error;
        return -1;
    }
    if (!strcmp(mode, "end"))
        return 0;
    if (!strcmp(mode, "odd")) {
        ssize_t moved = real(fd, iov, n, at);
        return moved > 8192 ? moved / 2 - 100 : moved;
    }
    struct iovec first = iov[0];
    if (first.iov_len > 4096)
        first.iov_len = first.iov_len / 2 / 4096 * 4096 ? first.iov_len / 2 / 4096 * 4096 : 4096;
    return real(fd, &first, 1, at);
}

#define REPLACE(name, kind)                                                              \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t at)                       \
    {                                                                                    \
        static transfer real;                                                            \
        static atomic_int calls;                                                         \
        if (!real)                                                                       \
            real = (transfer)dlsym(RTLD_NEXT, #name);                                    \
        return faulty(kind, &calls, real, fd, iov, n, at);                               \
    }

REPLACE(pwritev, "write")
REPLACE(pwritev64, "write")
REPLACE(preadv, "read")
REPLACE(preadv64, "read")

static void change(struct io_event *event, const char *mode)
{
    if (!strcmp(mode, "eintr"))
        event->res = -EINTR;
    else if (!strcmp(mode, "eagain"))
        event->res = -EAGAIN;
    else if (!strcmp(mode, "eio"))
        event->res = -EIO;
    else if (!strcmp(mode, "enospc"))
        event->res = -ENOSPC;
    else if (!strcmp(mode, "end"))
        event->res = 0;
    else
        event->res = event->res / 2 - (strcmp(mode, "odd") ? 0 : 100);
}

long syscall(long number, ...)
{
    static long (*real)(long, ...);
    static atomic_int results;
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    const char *queue = getenv("QUEUE"), *fault = getenv("FAULT");
    if (number == SYS_io_setup && queue && !strcmp(queue, "off")) {
        errno = ENOSYS;
        return -1;
    }
    long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    char mode[16];
    int every;
    if (number == SYS_io_getevents && fault &&
        sscanf(fault, "%*7[^,],%15[^,],%*d,%d", mode, &every) == 2)
        for (long i = 0; i < result; i++)
            if (atomic_fetch_add(&results, 1) % every == 0)
                change((struct io_event *)a[3] + i, mode);
    return result;
}
