/* Memory of another process: read it, and find the pages that were never touched. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "qmigrate.h"

#include <errno.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#define WORDS_AT_ONCE 512

/* Called after the process number was used: as long as the old process exists, the number cannot
 * belong to a new one. */
static int is_gone(const struct qm_process *p)
{
    struct pollfd watch = {.fd = p->pidfd, .events = POLLIN};
    int n;
    do
        n = poll(&watch, 1, 0);
    while (n < 0 && errno == EINTR);
    return n != 0;
}

ssize_t qm_process_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    const struct qm_process *p = arg;
    size_t have = 0;
    int rc = 0;
    while (have < len) {
        struct iovec to = {.iov_base = (unsigned char *)buf + have, .iov_len = len - have};
        struct iovec from = {
            .iov_base = (void *)(uintptr_t)(p->address + off + have),
            .iov_len = len - have,
        };
        ssize_t got = process_vm_readv(p->pid, &to, 1, &from, 1, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            rc = got < 0 ? -errno : -EFAULT;
            break;
        }
        have += (size_t)got;
    }
    if (is_gone(p))
        return -ESRCH;
    /* If the memory ends within the range, return the length of the readable part. */
    return rc && (have == 0 || rc != -EFAULT) ? rc : (ssize_t)have;
}

static int64_t next_by_scan(const struct qm_process *p, uint64_t from, uint64_t end)
{
    struct pagemap_region found;
    struct pagemap_scan scan = {
        .size = sizeof(scan),
        .start = from,
        .end = end,
        .vec = (uintptr_t)&found,
        .vec_len = 1,
        .max_pages = 1,
        .inverted = PAGEMAP_IS_ZERO_PAGE,
        .all_of = PAGEMAP_IS_ZERO_PAGE,
        .any_of = PAGEMAP_IS_PRESENT | PAGEMAP_IS_SWAPPED,
        .returned = PAGEMAP_IS_PRESENT,
    };
    int n = ioctl(p->pagemap, PAGEMAP_SCAN, &scan);
    if (n < 0)
        return -errno;
    return (int64_t)(n > 0 ? found.start : end);
}

int qm_process_can_scan(int pagemap)
{
    struct pagemap_scan nothing = {.size = sizeof(nothing)};
    return ioctl(pagemap, PAGEMAP_SCAN, &nothing) == 0;
}

static int64_t next_by_words(const struct qm_process *p, uint64_t from, uint64_t end, uint64_t page)
{
    uint64_t words[WORDS_AT_ONCE];
    while (from < end) {
        size_t wanted = (size_t)((end - from + page - 1) / page);
        if (wanted > WORDS_AT_ONCE)
            wanted = WORDS_AT_ONCE;
        ssize_t got = pread(p->pagemap, words, wanted * sizeof(words[0]),
                            (off_t)(from / page * sizeof(words[0])));
        if (got < (ssize_t)sizeof(words[0]))
            return got < 0 ? -errno : -ESRCH;
        for (size_t k = 0; k < (size_t)got / sizeof(words[0]); k++, from += page)
            if (words[k] & (PAGEMAP_WORD_PRESENT | PAGEMAP_WORD_SWAPPED))
                return (int64_t)from;
    }
    return (int64_t)end;
}

/* Return the address of the first touched page at or after p->address + off; -errno. */
static int64_t next_touched(const struct qm_process *p, uint64_t off, uint64_t end)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t from = (p->address + off) / page * page;
    uint64_t stop = p->address + end;
    return p->has_scan ? next_by_scan(p, from, (stop + page - 1) / page * page)
                       : next_by_words(p, from, stop, page);
}

uint64_t qm_next_touched(int pagemap, int has_scan, const void *memory, uint64_t from, uint64_t end)
{
    struct qm_process self = {
        .pagemap = pagemap,
        .has_scan = has_scan,
        .address = (uintptr_t)memory,
    };
    int64_t at = next_touched(&self, from, end);
    if (at < 0)
        return from;
    uint64_t found = (uint64_t)at - self.address;
    return found < from ? from : found < end ? found : end;
}

int64_t qm_process_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_process *p = arg;
    uint64_t stop = p->address + end;
    int64_t at = next_touched(p, off, end);
    /* When a process exits, its pages go first: an absent page proves nothing unless the memory can
     * still be read afterwards. */
    unsigned char byte;
    if (at < 0 || qm_process_fill(arg, &byte, 0, 1) != 1)
        return (int64_t)off; /* reading it returns the error */
    uint64_t found = (uint64_t)at < p->address + off ? p->address + off : (uint64_t)at;
    return (int64_t)((found < stop ? found : stop) - p->address);
}
