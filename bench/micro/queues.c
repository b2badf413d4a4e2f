/*
 * Write a file with direct I/O, in pieces of 1 MiB from buffers on huge pages, several at once, in one
 * of several ways; print the seconds to the end of fsync and the processor time.
 *
 *     queues WAY FILE MIB DEPTH THREADS
 *
 * WAY: sync (pwrite, DEPTH is 1), aio (native AIO), uring, fixed (io_uring with registered buffers and
 * file), polled (fixed, with IORING_SETUP_IOPOLL). 3 is returned where the kernel or the device cannot.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PIECE ((size_t)1 << 20)
#define MOST 64

enum way { SYNC, AIO, URING, FIXED, POLLED, WAYS };
static const char *const names[WAYS] = {"sync", "aio", "uring", "fixed", "polled"};

static struct {
    enum way way;
    int fd;
    unsigned depth, threads;
    size_t pieces;
} job;

static void give_up(const char *what, int error)
{
    int unsupported = error == ENOSYS || error == EOPNOTSUPP || error == EPERM || error == EINVAL;
    fprintf(stderr, "%s: %s\n", what, strerror(error));
    exit(unsupported ? 3 : 1);
}

static unsigned char *make_buffers(void)
{
    size_t len = MOST * PIECE;
    unsigned char *buffers;
    if (posix_memalign((void **)&buffers, (size_t)2 << 20, len))
        give_up("memory", ENOMEM);
    madvise(buffers, len, MADV_HUGEPAGE);
    for (size_t i = 0; i < len / 8; i++)
        ((uint64_t *)buffers)[i] = i * 0x9e3779b97f4a7c15u;
    return buffers;
}

static void expect(int64_t result)
{
    if (result != (int64_t)PIECE)
        give_up("write", result < 0 ? (int)-result : EIO);
}

static void by_calls(size_t first)
{
    unsigned char *buffers = make_buffers();
    for (size_t k = first; k < job.pieces; k += job.threads) {
        ssize_t n = pwrite(job.fd, buffers + k % MOST * PIECE, PIECE, (off_t)(k * PIECE));
        expect(n < 0 ? -errno : n);
    }
}

static void by_aio(size_t first)
{
    unsigned char *buffers = make_buffers();
    aio_context_t context = 0;
    struct iocb cbs[MOST];
    struct io_event done[MOST];
    unsigned slots[MOST], nfree = job.depth;
    if (syscall(SYS_io_setup, job.depth, &context))
        give_up("io_setup", errno);
    for (unsigned i = 0; i < job.depth; i++)
        slots[i] = i;
    for (size_t k = first; k < job.pieces || nfree < job.depth;) {
        while (k < job.pieces && nfree > 0) {
            unsigned s = slots[--nfree];
            struct iocb *cb = &cbs[s];
            memset(cb, 0, sizeof(*cb));
            cb->aio_data = s;
            cb->aio_lio_opcode = IOCB_CMD_PWRITE;
            cb->aio_fildes = (uint32_t)job.fd;
            cb->aio_buf = (uintptr_t)(buffers + s * PIECE);
            cb->aio_nbytes = PIECE;
            cb->aio_offset = (int64_t)(k * PIECE);
            if (syscall(SYS_io_submit, context, 1, &cb) != 1)
                give_up("io_submit", errno);
            k += job.threads;
        }
        long n = syscall(SYS_io_getevents, context, 1, job.depth, done, NULL);
        if (n < 0 && errno != EINTR)
            give_up("io_getevents", errno);
        for (long i = 0; i < n; i++) {
            expect(done[i].res);
            slots[nfree++] = (unsigned)done[i].data;
        }
    }
    syscall(SYS_io_destroy, context);
}

struct ring {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

static struct ring make_ring(void)
{
    struct io_uring_params p = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 (job.way == POLLED ? IORING_SETUP_IOPOLL : 0),
    };
    struct ring r;
    r.fd = (int)syscall(SYS_io_uring_setup, job.depth, &p);
    if (r.fd < 0)
        give_up("io_uring_setup", errno);
    size_t sq_len = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_len = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    size_t len = sq_len > cq_len ? sq_len : cq_len; /* IORING_FEAT_SINGLE_MMAP, Linux 5.4 */
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    unsigned char *map = mmap(NULL, len, prot, flags, r.fd, IORING_OFF_SQ_RING);
    r.sqes = mmap(NULL, p.sq_entries * sizeof(*r.sqes), prot, flags, r.fd, IORING_OFF_SQES);
    if (map == MAP_FAILED || (void *)r.sqes == MAP_FAILED)
        give_up("mmap", errno);
    r.sq_tail = (unsigned *)(map + p.sq_off.tail);
    r.sq_mask = (unsigned *)(map + p.sq_off.ring_mask);
    r.sq_array = (unsigned *)(map + p.sq_off.array);
    r.cq_head = (unsigned *)(map + p.cq_off.head);
    r.cq_tail = (unsigned *)(map + p.cq_off.tail);
    r.cq_mask = (unsigned *)(map + p.cq_off.ring_mask);
    r.cqes = (struct io_uring_cqe *)(map + p.cq_off.cqes);
    return r;
}

static void by_uring(size_t first)
{
    unsigned char *buffers = make_buffers();
    struct ring r = make_ring();
    int fixed = job.way != URING;
    if (fixed) {
        struct iovec iov[MOST];
        for (unsigned i = 0; i < job.depth; i++)
            iov[i] = (struct iovec){.iov_base = buffers + i * PIECE, .iov_len = PIECE};
        if (syscall(SYS_io_uring_register, r.fd, IORING_REGISTER_BUFFERS, iov, job.depth) ||
            syscall(SYS_io_uring_register, r.fd, IORING_REGISTER_FILES, &job.fd, 1))
            give_up("io_uring_register", errno);
    }
    unsigned slots[MOST], nfree = job.depth;
    for (unsigned i = 0; i < job.depth; i++)
        slots[i] = i;
    for (size_t k = first; k < job.pieces || nfree < job.depth;) {
        unsigned submitted = 0;
        for (; k < job.pieces && nfree > 0; k += job.threads, submitted++) {
            unsigned s = slots[--nfree], tail = *r.sq_tail, at = tail & *r.sq_mask;
            r.sqes[at] = (struct io_uring_sqe){
                .opcode = fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE,
                .flags = fixed ? IOSQE_FIXED_FILE : 0,
                .fd = fixed ? 0 : job.fd,
                .addr = (uintptr_t)(buffers + s * PIECE),
                .len = PIECE,
                .off = k * PIECE,
                .buf_index = (uint16_t)(fixed ? s : 0),
                .user_data = s,
            };
            r.sq_array[at] = at;
            __atomic_store_n(r.sq_tail, tail + 1, __ATOMIC_RELEASE);
        }
        if (syscall(SYS_io_uring_enter, r.fd, submitted, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            give_up("io_uring_enter", errno);
        unsigned head = *r.cq_head;
        for (; head != __atomic_load_n(r.cq_tail, __ATOMIC_ACQUIRE); head++) {
            const struct io_uring_cqe *done = &r.cqes[head & *r.cq_mask];
            expect(done->res);
            slots[nfree++] = (unsigned)done->user_data;
        }
        __atomic_store_n(r.cq_head, head, __ATOMIC_RELEASE);
    }
    close(r.fd);
}

static void *run(void *arg)
{
    size_t first = (size_t)(uintptr_t)arg;
    if (job.way == SYNC)
        by_calls(first);
    else if (job.way == AIO)
        by_aio(first);
    else
        by_uring(first);
    return NULL;
}

static double seconds(struct timeval t)
{
    return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    while (job.way < WAYS && strcmp(names[job.way], argv[1]))
        job.way++;
    job.pieces = strtoul(argv[3], NULL, 10);
    job.depth = (unsigned)strtoul(argv[4], NULL, 10);
    job.threads = (unsigned)strtoul(argv[5], NULL, 10);
    if (job.way == WAYS || job.depth < 1 || job.depth > MOST || job.threads < 1 ||
        job.threads > MOST)
        return 2;
    job.fd = open(argv[2], O_WRONLY | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0600);
    if (job.fd < 0 || ftruncate(job.fd, (off_t)(job.pieces * PIECE)))
        give_up(argv[2], errno);

    pthread_t threads[MOST];
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (unsigned i = 0; i < job.threads; i++)
        if (pthread_create(&threads[i], NULL, run, (void *)(uintptr_t)i))
            give_up("thread", EAGAIN);
    for (unsigned i = 0; i < job.threads; i++)
        pthread_join(threads[i], NULL);
    if (fsync(job.fd))
        give_up("fsync", errno);
    clock_gettime(CLOCK_MONOTONIC, &to);
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("%.4f %.4f\n",
           (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9,
           seconds(used.ru_utime) + seconds(used.ru_stime));
    return 0;
}
