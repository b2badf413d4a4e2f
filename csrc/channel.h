/* The private state of one thread: bounce buffers, and its asynchronous transfers. */
#ifndef QM_CHANNEL_H
#define QM_CHANNEL_H

#include "core_internal.h"

#include <linux/aio_abi.h>
#include <sys/uio.h>

/* How many transfers run at once, and how many bytes each has at most. */
#define QM_QUEUE 8
#define QM_QUEUE_PIECE ((size_t)1 << 20)
/* Transfers with more iovecs are synchronous: their cost is in the number of iovecs. */
#define QM_SLOT_IOV 256
/* While one buffer of a chunk is filled, the transfers that run are of the two chunks before. */
#define QM_BUFFERS 3

struct qm_slot {
    int opcode, fd, n;
    int buffer; /* the bounce buffer in use until the end, or -1 */
    struct iovec *iov;
    off_t at;
    size_t unit, len;
    struct iovec own[QM_SLOT_IOV];
};

struct qm_queue {
    int tried, open;
    aio_context_t context;
    uint32_t free; /* one bit per slot */
    int busy[QM_BUFFERS];
    int error; /* the first error, and where; the next call returns it */
    off_t bad;
    struct qm_slot slots[QM_QUEUE];
};

struct qm_channel {
    unsigned char *buffers[QM_BUFFERS];
    int current;
    /* The data extent last seen in `memory`, bytes of the block. */
    const struct qm_memory *memory;
    uint64_t data_from;
    uint64_t data_to;
    struct qm_queue queue;
};

/* Return buffer number k, or NULL when out of memory. */
unsigned char *qm_channel_buffer(qm_channel *channel, int k);
/* Return the number of a buffer that no transfer uses. */
int qm_channel_next(qm_channel *channel, qm_job *job);

/* Start a transfer of whole units. The error may be that of an earlier transfer; *bad is its file
 * position. -ENODATA: the file ends within the transfer. `buffer` is the bounce buffer that `iov`
 * points into, or -1; the memory must stay valid until the queue is drained. The array is
 * modified. */
int qm_queue_write(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                   size_t unit, int buffer, off_t *bad);
int qm_queue_read(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                  size_t unit, off_t *bad);
/* Return how many bytes one transfer should have. */
size_t qm_queue_piece(struct qm_queue *q);
void qm_queue_wait_for(struct qm_queue *q, qm_job *job, int buffer);
/* Wait for all transfers and return the first error of any of them. Call it before every return to
 * Python. */
int qm_queue_drain(struct qm_queue *q, qm_job *job, off_t *bad);
void qm_queue_close(struct qm_queue *q);

/* Return where the data at `off` ends, at most `end`; `off` itself if a hole is there. The channel
 * caches the extent: finding its end takes time in proportion to its length. */
uint64_t qm_channel_data_until(qm_channel *channel, const struct qm_memory *memory, uint64_t off,
                               uint64_t end);

#endif
