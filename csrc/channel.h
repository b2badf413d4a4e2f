/* What one thread has for itself: bounce buffers, and transfers under way. Inside of the core. */
#ifndef QM_CHANNEL_H
#define QM_CHANNEL_H

#include "core_internal.h"

#include <linux/aio_abi.h>
#include <sys/uio.h>

/* Transfers under way at once, and how many bytes each has at most. */
#define QM_QUEUE 8
#define QM_QUEUE_PIECE ((size_t)1 << 20)
/* Pieces with more parts are transferred at once: it is their number that costs. */
#define QM_SLOT_IOV 256
#define QM_BUFFERS 4

struct qm_slot {
    int opcode, fd, n;
    int buffer; /* the bounce buffer that is in use meanwhile, or -1 */
    struct iovec *iov;
    off_t at;
    size_t unit, len;
    struct iovec own[QM_SLOT_IOV];
};

struct qm_queue {
    int tried, open;
    aio_context_t context;
    uint32_t free; /* a bit for each slot */
    int busy[QM_BUFFERS];
    int error; /* the first one, and where; told by the next call */
    off_t bad;
    struct qm_slot slots[QM_QUEUE];
};

struct qm_channel {
    unsigned char *buffers[QM_BUFFERS];
    int current;
    /* The extent of data last seen in `memory`, bytes of the block. */
    const struct qm_memory *memory;
    uint64_t data_from;
    uint64_t data_to;
    struct qm_queue queue;
};

/* Buffer number k, or NULL when there is no memory. */
unsigned char *qm_channel_buffer(qm_channel *channel, int k);
/* The number of a buffer that no transfer uses. */
int qm_channel_next(qm_channel *channel, qm_job *job);

/* Begin a transfer of whole units; errors are those of this one or of an earlier one, with the
 * file position in *bad. Less than all at the end of the file is -ENODATA. `buffer` is the bounce
 * buffer that `iov` points into, or -1; memory must stay until the queue is drained. The array
 * is used up. */
int qm_queue_write(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                   size_t unit, int buffer, off_t *bad);
int qm_queue_read(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                  size_t unit, off_t *bad);
/* How many bytes one transfer should have. */
size_t qm_queue_piece(struct qm_queue *q);
void qm_queue_wait_for(struct qm_queue *q, qm_job *job, int buffer);
/* Waits for all transfers; the first error of any of them. To be called before every return. */
int qm_queue_drain(struct qm_queue *q, qm_job *job, off_t *bad);
void qm_queue_close(struct qm_queue *q);

/* Where the data that starts at `off` ends, at most `end`; `off` itself when there is a hole. The
 * channel keeps the extent: to find the end of one costs time that grows with its length. */
uint64_t qm_channel_data_until(qm_channel *channel, const struct qm_memory *memory, uint64_t off,
                               uint64_t end);

#endif
