/*
 * qmigrate: moves pages between guest memory and a mapped-ram file.
 *
 * Notions
 *   block    a contiguous piece of guest memory, `len` bytes, cut into pages of `page_size` bytes
 *            (a power of two, 1 KiB to 64 KiB). Page k stands at file position
 *            `pages_offset + k * page_size`, always.
 *   bitmap   one bit a page in native 64-bit words, bit k is word k/64, bit k%64.
 *   chunk    QM_CHUNK bytes of a block: the piece that is scanned, planned and moved at a time.
 *            Never less than 64 pages, so that two chunks share no bitmap word.
 *   run      consecutive pages of one chunk that one system call moves.
 *   unit     the file alignment that direct I/O demands (`off_align`).
 *   job      the atomics that all channels of one save or load share.
 *   channel  what one thread needs for itself: bounce buffers, and a queue of direct transfers that
 *            are under way while the next ones are prepared. None is when a function returns.
 *
 * Conventions
 *   Every function returns 0 or a count, or -errno; errno itself is never part of the contract.
 *   Sizes named `len` are bytes, those named `npages` are pages, file positions are off_t.
 *   Nothing here allocates by a number that comes from a file. No global state.
 *   EINTR and EAGAIN are retried; short reads and writes are continued.
 *   All functions that move pages poll the job before every chunk and every system call, that is
 *   at least every QM_CHUNK bytes, and return -ECANCELED once it is cancelled.
 */
#ifndef QMIGRATE_H
#define QMIGRATE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define QM_CHUNK ((size_t)4 << 20)
#define QM_MIN_PAGE 1024u
#define QM_MAX_PAGE 65536u
/* Limits of one readv/writev call on Linux. */
#define QM_MAX_IOV 1024

/* ---- job ------------------------------------------------------------------------------------ */

typedef struct qm_job qm_job;

/* Running totals of a job. `bytes_done` counts guest bytes dealt with, moved or not (progress);
 * `data_pages` and `zero_pages` the pages dealt with, by kind; `bytes_moved` the bytes that
 * system calls moved to or from the file, gaps included; `calls` those system calls. */
struct qm_totals {
    uint64_t bytes_done;
    uint64_t data_pages;
    uint64_t zero_pages;
    uint64_t bytes_moved;
    uint64_t calls;
};

/* NULL when there is no memory. Destroy it only after the last call that uses it returned. */
qm_job *qm_job_create(void);
void qm_job_destroy(qm_job *job);
/* From any thread, any number of times. */
void qm_job_cancel(qm_job *job);
int qm_job_cancelled(const qm_job *job);
/* Limit bytes moved a second over all channels; 0 is no limit. May change while the job runs:
 * who waits for the old rate goes on at the new one. */
void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second);
void qm_job_totals(const qm_job *job, struct qm_totals *out);
/* Count bytes that were written elsewhere (head, bitmaps) into bytes_moved. */
void qm_job_add_moved(qm_job *job, uint64_t len);

/* ---- channel -------------------------------------------------------------------------------- */

typedef struct qm_channel qm_channel;

/* Bounce buffers (QM_CHUNK plus room for rounding, aligned for any device, not inherited by fork)
 * are allocated when first needed. A channel serves one thread at a time. */
qm_channel *qm_channel_create(void);
void qm_channel_destroy(qm_channel *channel);

/* ---- memory --------------------------------------------------------------------------------- */

/* Fills `len` bytes at `buf` with guest memory from byte `off` of the block. Returns `len`, fewer
 * when the memory ends early, or -errno. Called from the channel's thread. */
typedef ssize_t (*qm_fill_fn)(void *arg, void *buf, uint64_t off, size_t len);

/* Where the bytes of a block live. One of three:
 *   base, fd < 0     plain memory that stays mapped while we work.
 *   base and fd      a mapping of `fd`. On a save, fd cannot shrink; its holes are neither read nor
 *                    made resident (where a page may hold part of one, it is read with pread). On
 *                    a load, fd may shrink: only the kernel touches the mapping, and holes are made
 *                    by punching.
 *   fd, no base      a file that may shrink: read with pread, written with pwrite.
 * or a `fill` callback, for memory that has no address here (saves only).
 * Byte 0 of the block is base[0] and file position fd_offset. `fd` must be a description of our
 * own, since SEEK_DATA moves its position. */
struct qm_memory {
    unsigned char *base;
    int fd;
    off_t fd_offset;
    qm_fill_fn fill;
    void *fill_arg;
};

struct qm_block {
    uint64_t len;
    off_t pages_offset;
    uint32_t page_size;
};

/* The file. `fd` is buffered; `fd_direct` has O_DIRECT and is -1 where direct I/O is off.
 * mem_align and off_align are what the direct descriptor demands of memory addresses, and of file
 * positions and lengths: powers of two, at most QM_MAX_PAGE. */
struct qm_file {
    int fd;
    int fd_direct;
    uint32_t mem_align;
    uint32_t off_align;
};

/* Where a call failed: `at` is the file position (target) or the byte of the block (memory). */
struct qm_fault {
    int in_memory;
    int64_t at;
};

/* ---- scan ----------------------------------------------------------------------------------- */

/* 1 when all `len` bytes (a multiple of 64) are zero. */
int qm_is_zero(const void *bytes, size_t len);

/* Sets bit k of `bits` when page k of `bytes` has a byte that is not zero, clears it otherwise;
 * the unused bits of the last word are cleared. Returns how many were set, or -EINVAL for a
 * page size that is none. */
int64_t qm_scan(const void *bytes, uint64_t npages, uint32_t page_size, uint64_t *bits);

/* Sum of all 64-bit words: how fast this machine can read memory, to hold the scan against. */
uint64_t qm_sum(const void *bytes, size_t len);

/* ---- write ---------------------------------------------------------------------------------- */

/* Which zero pages may be written along with data, to have fewer and larger writes.
 *   max_gap     bytes: no longer gap is bridged (0: none).
 *   gap_share   percent: the gaps bridged in a chunk hold at most this share of its data bytes.
 *   everything  every page is written, whatever it holds.
 *   mark_zero   together with everything: a zero page counts as data, and its bit is set.
 * Otherwise the bit of a zero page stays clear, written or not. */
struct qm_sparse {
    uint64_t max_gap;
    uint32_t gap_share;
    int everything;
    int mark_zero;
};

/* Writes the pages [first, first + npages) of a block: those that `selection` has (NULL: all) and
 * that are not zero. In `data` their bits are set and those of selected zero pages are cleared;
 * bits outside the selection are left alone, even where their page is written to bridge a gap.
 *
 * `first` is a multiple of 64 and of QM_CHUNK / page_size; selection and data are bitmaps of the
 * whole block. With direct I/O the pages in the last, partial unit of the block are left out:
 * qm_write_tail does them, when every direct write of the block has returned, so that no file
 * block is ever written through both descriptors at once. With file->fd < 0 nothing is written:
 * pages are only counted.
 *
 * Straight from guest memory where address, position and length satisfy the descriptor,
 * through the bounce buffer otherwise. */
int qm_write(qm_job *job, qm_channel *channel, const struct qm_file *file,
             const struct qm_block *block, const struct qm_memory *memory,
             const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
             uint64_t first, uint64_t npages, struct qm_fault *fault);

/* Writes, through the buffered descriptor, the pages that qm_write left out. */
int qm_write_tail(qm_job *job, qm_channel *channel, const struct qm_file *file,
                  const struct qm_block *block, const struct qm_memory *memory,
                  const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
                  struct qm_fault *fault);

/* ---- read ----------------------------------------------------------------------------------- */

/* Reads the set pages among [first, first + npages) into memory. Reads may go over clear pages
 * (at most `max_gap` bytes at a time), whose file bytes never reach guest memory. Clear pages are
 * zeroed (punched, where the memory is a file) when `zero_clear`, left alone otherwise.
 * pages_offset need not be aligned; the file may end early. A set page beyond the end of the
 * file is -ENODATA. `first` as in qm_write. */
int qm_read(qm_job *job, qm_channel *channel, const struct qm_file *file,
            const struct qm_block *block, const struct qm_memory *memory, const uint64_t *data,
            uint64_t max_gap, int zero_clear, uint64_t first, uint64_t npages,
            struct qm_fault *fault);

/* Makes the clear pages among [first, first + npages) read as zeros in the file, by punching holes
 * where the file system can. Only what the file holds there is read. file->fd must be readable,
 * and a description of our own. Returns how many pages were not zero, or -errno. */
int64_t qm_clean(qm_job *job, qm_channel *channel, const struct qm_file *file,
                 const struct qm_block *block, const uint64_t *data, uint64_t first,
                 uint64_t npages, struct qm_fault *fault);

/* Number of set bits among the first `npages`; the highest of them goes to *last (-1: none). */
uint64_t qm_count(const uint64_t *bits, uint64_t npages, int64_t *last);

/* ---- direct I/O ----------------------------------------------------------------------------- */

/* What direct I/O on the file demands of addresses and of positions, as the kernel tells it.
 * -EOPNOTSUPP: this file system does none; -ENOSYS: the kernel cannot tell. */
int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align);

/* ---- between the parts of the core ---------------------------------------------------------- */

struct iovec;

void qm_job_did(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages);
void qm_job_moved(qm_job *job, uint64_t len);
/* Waits until `len` more bytes may move; -ECANCELED. */
int qm_job_admit(qm_job *job, uint64_t len);
/* How many bytes one call should move at most, so that a low rate stays smooth. */
size_t qm_job_piece(const qm_job *job, size_t unit);
/* Whole transfer of an iovec array, `unit` the granularity at which a short one is taken up. The
 * array is used up. qm_preadv returns how many bytes there were before the end of the file. */
int qm_pwritev(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad);
ssize_t qm_preadv(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit,
                  off_t *bad);
/* Next byte of the block at or after `off` that may hold data, at most `end`; -errno. */
int64_t qm_next_data(const struct qm_memory *memory, uint64_t off, uint64_t end);
/* -EINVAL when numbers do not fit together. */
int qm_block_check(const struct qm_block *block, const struct qm_file *file, uint64_t first,
                   uint64_t npages);

#endif
