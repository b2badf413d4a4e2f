/* Preloaded under a Python: one system call on files of one directory fails as was asked.
 *
 * faults_arm() says where, which call (counted from 0 over all that are watched) and which of the
 * faults that such a call can have; with `lasting` every later call of its kind fails likewise, as
 * on a disk that stays full. What happened is told by faults_seen() and faults_fired(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { WRITE, READ, SYNC, LINK, SIZE, PUNCH, OPEN, SETUP, SUBMIT, EVENT, KINDS };

#define SHORT 10000 /* about half is moved */
#define END 10001   /* a read finds the end of the file */

static const int possible[KINDS][8] = {
    [WRITE] = {SHORT, EINTR, EIO, ENOSPC, EDQUOT},
    [READ] = {SHORT, EINTR, EIO, END},
    [SYNC] = {EIO, ENOSPC, EDQUOT},
    [LINK] = {EIO, ENOSPC, EMLINK, EDQUOT},
    [SIZE] = {EIO, ENOSPC, EINTR, EFBIG},
    [PUNCH] = {EIO, ENOSPC, EINTR, EOPNOTSUPP},
    [OPEN] = {EIO, ENOSPC, EMFILE, EINTR},
    [SETUP] = {EAGAIN, ENOSYS, ENOMEM},
    [SUBMIT] = {EAGAIN, EIO, EINTR, ENOSPC},
    [EVENT] = {SHORT, EIO, ENOSPC, EINTR, EAGAIN},
};

static char directory[4096];
static size_t directory_len;
static atomic_long calls, target = -1, fired;
static atomic_int fault_kind = -1, fault, lasts, unnamed = 1;
static unsigned chosen;

void faults_arm(const char *where, long at, unsigned choice, int lasting, int unnamed_files)
{
    directory_len = strlen(where);
    memcpy(directory, where, directory_len + 1);
    calls = fired = 0;
    chosen = choice;
    lasts = lasting;
    fault_kind = -1;
    fault = 0;
    unnamed = unnamed_files;
    target = at;
}

/* Calls seen since it was armed. */
long faults_disarm(void)
{
    directory_len = 0;
    target = -1;
    unnamed = 1;
    return calls;
}

long faults_fired(int *kind, int *number)
{
    *kind = fault_kind;
    *number = fault;
    return fired;
}

static int is_below(const char *path)
{
    return directory_len && strncmp(path, directory, directory_len) == 0;
}

static int is_mine(int fd)
{
    if (!directory_len)
        return 0;
    char link[64], path[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof(path) - 1);
    if (len < 0)
        return 0;
    path[len] = 0;
    return is_below(path);
}

static int is_mine_at(int dir, const char *path)
{
    return path[0] == '/' ? is_below(path) : dir != AT_FDCWD && is_mine(dir);
}

/* The fault of this call: 0 for none. */
static int next_fault(enum kind kind)
{
    if (lasts && fired && fault_kind == (int)kind) {
        fired++;
        return fault;
    }
    if (atomic_fetch_add(&calls, 1) != target)
        return 0;
    int n = 0;
    while (n < 8 && possible[kind][n])
        n++;
    fault = possible[kind][chosen % (unsigned)n];
    fault_kind = kind;
    if (fault == EINTR || fault == SHORT)
        lasts = 0;
    fired = 1;
    return fault;
}

#define REAL(result, name, ...)                                                          \
    static result (*real)(__VA_ARGS__);                                                  \
    if (!real)                                                                           \
        real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int fails(int number)
{
    if (number == 0 || number >= SHORT)
        return 0;
    errno = number;
    return 1;
}

static size_t part_of(size_t len)
{
    return len > 8192 ? len / 2 / 4096 * 4096 : len > 1 ? len / 2 : len;
}

#define TRANSFER(name, kind, pointer)                                                    \
    ssize_t name(int fd, pointer buffer, size_t len, off_t at)                           \
    {                                                                                    \
        REAL(ssize_t, name, int, pointer, size_t, off_t);                                \
        int bad = is_mine(fd) ? next_fault(kind) : 0;                                    \
        if (fails(bad))                                                                  \
            return -1;                                                                   \
        return bad == END ? 0 : real(fd, buffer, bad == SHORT ? part_of(len) : len, at); \
    }

TRANSFER(pwrite, WRITE, const void *)
TRANSFER(pwrite64, WRITE, const void *)
TRANSFER(pread, READ, void *)
TRANSFER(pread64, READ, void *)

#define VECTOR(name, kind)                                                               \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t at)                       \
    {                                                                                    \
        REAL(ssize_t, name, int, const struct iovec *, int, off_t);                      \
        int bad = is_mine(fd) ? next_fault(kind) : 0;                                    \
        if (fails(bad))                                                                  \
            return -1;                                                                   \
        if (bad == END)                                                                  \
            return 0;                                                                    \
        if (bad != SHORT)                                                                \
            return real(fd, iov, n, at);                                                 \
        struct iovec first = iov[0];                                                     \
        if (n == 1)                                                                      \
            first.iov_len = part_of(first.iov_len);                                      \
        return real(fd, &first, 1, at);                                                  \
    }

VECTOR(pwritev, WRITE)
VECTOR(pwritev64, WRITE)
VECTOR(preadv, READ)
VECTOR(preadv64, READ)

ssize_t write(int fd, const void *buffer, size_t len)
{
    REAL(ssize_t, write, int, const void *, size_t);
    int bad = is_mine(fd) ? next_fault(WRITE) : 0;
    return fails(bad) ? -1 : real(fd, buffer, bad == SHORT ? part_of(len) : len);
}

ssize_t read(int fd, void *buffer, size_t len)
{
    REAL(ssize_t, read, int, void *, size_t);
    int bad = is_mine(fd) ? next_fault(READ) : 0;
    if (fails(bad))
        return -1;
    return bad == END ? 0 : real(fd, buffer, bad == SHORT ? part_of(len) : len);
}

#define SYNCING(name)                                                                    \
    int name(int fd)                                                                     \
    {                                                                                    \
        REAL(int, name, int);                                                            \
        return is_mine(fd) && fails(next_fault(SYNC)) ? -1 : real(fd);                   \
    }

SYNCING(fsync)
SYNCING(fdatasync)

#define SIZING(name)                                                                     \
    int name(int fd, off_t len)                                                          \
    {                                                                                    \
        REAL(int, name, int, off_t);                                                     \
        return is_mine(fd) && fails(next_fault(SIZE)) ? -1 : real(fd, len);              \
    }

SIZING(ftruncate)
SIZING(ftruncate64)

#define PUNCHING(name)                                                                   \
    int name(int fd, int mode, off_t at, off_t len)                                      \
    {                                                                                    \
        REAL(int, name, int, int, off_t, off_t);                                         \
        return is_mine(fd) && fails(next_fault(PUNCH)) ? -1 : real(fd, mode, at, len);   \
    }

PUNCHING(fallocate)
PUNCHING(fallocate64)

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
    REAL(int, linkat, int, const char *, int, const char *, int);
    return is_mine_at(to_dir, to) && fails(next_fault(LINK))
               ? -1
               : real(from_dir, from, to_dir, to, flags);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
    REAL(int, renameat, int, const char *, int, const char *);
    return is_mine_at(to_dir, to) && fails(next_fault(LINK)) ? -1 : real(from_dir, from, to_dir, to);
}

int rename(const char *from, const char *to)
{
    REAL(int, rename, const char *, const char *);
    return is_below(to) && fails(next_fault(LINK)) ? -1 : real(from, to);
}

/* What is opened for reading or made anew; the directory itself, and what is only looked for, is
 * left alone. */
static int open_fails(int dir, const char *path, int flags)
{
    if (!unnamed && (flags & O_TMPFILE) == O_TMPFILE && directory_len) {
        errno = EOPNOTSUPP;
        return 1;
    }
    return (flags & O_DIRECTORY) != O_DIRECTORY && is_mine_at(dir, path) && fails(next_fault(OPEN));
}

#define OPENING(name)                                                                    \
    int name(const char *path, int flags, ...)                                           \
    {                                                                                    \
        REAL(int, name, const char *, int, ...);                                         \
        va_list list;                                                                    \
        va_start(list, flags);                                                           \
        mode_t mode = va_arg(list, mode_t);                                              \
        va_end(list);                                                                    \
        return open_fails(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);         \
    }

OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                                 \
    int name(int dir, const char *path, int flags, ...)                                  \
    {                                                                                    \
        REAL(int, name, int, const char *, int, ...);                                    \
        va_list list;                                                                    \
        va_start(list, flags);                                                           \
        mode_t mode = va_arg(list, mode_t);                                              \
        va_end(list);                                                                    \
        return open_fails(dir, path, flags) ? -1 : real(dir, path, flags, mode);         \
    }

OPENING_AT(openat)
OPENING_AT(openat64)

static void change(struct io_event *event, int bad)
{
    event->res = bad == SHORT ? event->res / 2 : -bad;
}

long syscall(long number, ...)
{
    REAL(long, syscall, long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (directory_len && number == SYS_io_setup && fails(next_fault(SETUP)))
        return -1;
    if (directory_len && number == SYS_io_submit && fails(next_fault(SUBMIT)))
        return -1;
    long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (directory_len && number == SYS_io_getevents)
        for (long i = 0; i < result; i++) {
            int bad = next_fault(EVENT);
            if (bad)
                change((struct io_event *)a[3] + i, bad);
        }
    return result;
}
