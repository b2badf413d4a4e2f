/* What the parts of the core share, and Python does not see. */
#ifndef QM_CORE_INTERNAL_H
#define QM_CORE_INTERNAL_H

#include "qmigrate.h"

struct iovec;

/* Waits until `len` more bytes may move; -ECANCELED. */
int qm_job_throttle(qm_job *job, uint64_t len);
/* How many bytes one call should move at most, so that a low rate stays smooth. */
size_t qm_job_piece(const qm_job *job, size_t unit);
/* Whole transfer of an iovec array, `unit` the granularity at which a short one is taken up. The
 * array is used up. qm_preadv returns how many bytes there were before the end of the file. */
int qm_pwritev(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad);
ssize_t qm_preadv(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad);
/* Whole transfer to a pipe or socket, which has no positions; *done bytes went out, also after a
 * failure. A descriptor with O_NONBLOCK, and any socket, is left as soon as the job is
 * cancelled. */
int qm_write_forward(qm_job *job, int fd, const unsigned char *bytes, size_t len, size_t *done);
/* Next byte of the block at or after `off` that may hold data, at most `end`; -errno. */
int64_t qm_next_data(const struct qm_memory *memory, uint64_t off, uint64_t end);
/* Bytes -> the block's memory at `off`; by pwrite where it is a file. */
int qm_store(const struct qm_memory *memory, uint64_t off, const unsigned char *bytes, size_t len,
             struct qm_fault *fault);
int qm_storev(const struct qm_memory *memory, uint64_t off, const struct iovec *iov, int n,
              struct qm_fault *fault);
/* Zeroes [off, end) of the block, whole pages; punched where the memory is a file. */
int qm_store_zeros(const struct qm_memory *memory, uint32_t page_size, uint64_t off, uint64_t end,
                   struct qm_fault *fault);
/* The same for the pages of [first, end) whose bits are clear. */
int qm_store_clear(const struct qm_memory *memory, uint32_t page_size, const uint64_t *bits,
                   uint64_t first, uint64_t end, struct qm_fault *fault);

/* -EINVAL when numbers do not fit together. */
int qm_block_check(const struct qm_block *block, const struct qm_file *file, uint64_t first,
                   uint64_t npages);

/* Sleeps so long, or until a signal comes. */
void qm_nap(uint64_t ns);
/* Reads `len` bytes at a file position; -ENODATA when the file ends before. */
int qm_read_all(int fd, void *buf, size_t len, uint64_t at);

#endif
