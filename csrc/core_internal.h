/* What the files of the core share; Python does not see it. */
#ifndef QM_CORE_INTERNAL_H
#define QM_CORE_INTERNAL_H

#include "qmigrate.h"

struct iovec;

/* Wait until `len` more bytes may move; -ECANCELED. */
int qm_job_throttle(qm_job *job, uint64_t len);
/* Return how many bytes one call should move at most, so that a low rate stays smooth. */
size_t qm_job_piece(const qm_job *job, size_t unit);
/* Transfer an iovec array completely; a short call is continued at a multiple of `unit`. The array
 * is modified. qm_preadv returns the number of bytes before the end of the file. On failure *bad is
 * the file position. */
int qm_pwritev(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad);
ssize_t qm_preadv(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad);
/* Write to a pipe or socket, which has no positions; *done is the number of bytes written, also
 * after a failure. With O_NONBLOCK, and for any socket, cancelling the job ends it at once. */
int qm_write_forward(qm_job *job, int fd, const unsigned char *bytes, size_t len, size_t *done);
/* Return the next byte of the block at or after `off` that may hold data, at most `end`; -errno. */
int64_t qm_next_data(const struct qm_memory *memory, uint64_t off, uint64_t end);
/* Copy bytes to `off` of the block's memory, with pwrite if it is a file. */
int qm_store(const struct qm_memory *memory, uint64_t off, const unsigned char *bytes, size_t len,
             struct qm_fault *fault);
int qm_storev(const struct qm_memory *memory, uint64_t off, const struct iovec *iov, int n,
              struct qm_fault *fault);
/* Zero [off, end) of the block, whole pages; punched if the memory is a file. */
int qm_store_zeros(const struct qm_memory *memory, uint32_t page_size, uint64_t off, uint64_t end,
                   struct qm_fault *fault);
/* Zero the pages [first, end) whose bits in the transfer's `data` are clear. */
int qm_store_clear(const struct qm_transfer *t, uint64_t first, uint64_t end,
                   struct qm_fault *fault);

/* Check block, file (can be NULL) and range; -EINVAL. */
int qm_transfer_check(const struct qm_transfer *t, uint64_t first, uint64_t npages);

/* Sleep for `ns` nanoseconds, or until a signal. */
void qm_nap(uint64_t ns);
/* Read `len` bytes at a file position; -ENODATA when the file ends before. */
int qm_read_all(int fd, void *buf, size_t len, uint64_t at);

#endif
