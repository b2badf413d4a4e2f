/* The bounce buffers of a channel, and the data extent that it looked up last. */
#define _GNU_SOURCE
#include "channel.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Room for a chunk that is rounded outward at both ends. */
#define BUFFER_LEN (QM_CHUNK + 2 * (size_t)QM_MAX_PAGE)
#define BUFFER_ALIGN ((size_t)2 << 20)

qm_channel *qm_channel_create(void)
{
    return calloc(1, sizeof(qm_channel));
}

unsigned char *qm_channel_buffer(qm_channel *channel, int k)
{
    if (channel->buffers[k])
        return channel->buffers[k];
    void *buffer;
    if (posix_memalign(&buffer, BUFFER_ALIGN, BUFFER_LEN))
        return NULL;
    /* A child that is forked while direct I/O runs must not make these pages copy-on-write. */
    madvise(buffer, BUFFER_LEN, MADV_DONTFORK);
    madvise(buffer, BUFFER_LEN, MADV_HUGEPAGE);
    channel->buffers[k] = buffer;
    return buffer;
}

int qm_channel_next(qm_channel *channel, qm_job *job)
{
    channel->current = (channel->current + 1) % QM_BUFFERS;
    qm_queue_wait_for(&channel->queue, job, channel->current);
    return channel->current;
}

void qm_channel_destroy(qm_channel *channel)
{
    if (!channel)
        return;
    qm_queue_close(&channel->queue);
    for (int k = 0; k < QM_BUFFERS; k++) {
        if (!channel->buffers[k])
            continue;
        /* The allocator may reuse this memory for data that a child needs. */
        madvise(channel->buffers[k], BUFFER_LEN, MADV_DOFORK);
        free(channel->buffers[k]);
    }
    free(channel);
}

uint64_t qm_channel_data_until(qm_channel *channel, const struct qm_memory *memory, uint64_t off,
                               uint64_t end)
{
    if (channel->memory != memory || off < channel->data_from || off >= channel->data_to) {
        if (qm_next_data(memory, off, off + 1) != (int64_t)off)
            return off;
        off_t hole = lseek(memory->fd, memory->fd_offset + (off_t)off, SEEK_HOLE);
        channel->memory = memory;
        channel->data_from = off;
        channel->data_to = hole < 0 ? UINT64_MAX : (uint64_t)(hole - memory->fd_offset);
    }
    return channel->data_to < end ? channel->data_to : end;
}
