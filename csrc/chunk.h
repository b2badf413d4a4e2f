/* Guest memory, a chunk at a time. */
#ifndef QM_CHUNK_H
#define QM_CHUNK_H

#include "core_internal.h"

#define MAX_PAGES (QM_CHUNK / QM_MIN_PAGE)
#define WORDS (MAX_PAGES / 64)

/* Where chunks come from, and how they are read. */
struct qm_source {
    const struct qm_transfer *transfer;
    qm_channel *channel;
    struct qm_fault *fault;
    uint64_t longest_gap; /* bytes: longer holes are left undefined where a chunk is copied */
    int look_for_holes;   /* at the start of a chunk that has to be copied */
    int direct;           /* where the chunks go: small pages of a file are copied first */
    int pagemap;          /* /proc/self/pagemap for direct I/O; -1 if there is none */
};

struct chunk {
    uint64_t first; /* page of the block */
    size_t npages;
    uint64_t off; /* byte of the block */
    size_t len;
    const unsigned char *bytes; /* the chunk in memory; only resident pages may be touched */
    int buffer;                 /* the bounce buffer it was copied into, or -1 */
    int has_holes;
    uint64_t resident[WORDS];
    uint64_t data[WORDS]; /* pages that are not zero */
};

/* Make `c` the chunk that starts at page `first` and ends at page `end` at the latest. Its bytes are
 * in guest memory, or in a buffer of the channel until the next chunk but one. */
int qm_chunk_load(struct qm_source *s, struct chunk *c, uint64_t first, uint64_t end);

/* Copy `len` bytes at `off` of memory that is a file or has no address. Returns the number of bytes,
 * fewer when the memory ends early, or -errno. */
ssize_t qm_memory_fill(const struct qm_memory *memory, void *buf, uint64_t off, size_t len);

/* Return a descriptor of /proc/self/pagemap, or -1. */
int qm_pagemap_open(void);
/* Return whether the page that contains `byte`, which may be read, is mapped as part of a huge page. */
int qm_maps_huge(int pagemap, const unsigned char *byte);

static inline int memory_fault(struct qm_fault *fault, uint64_t off, int rc)
{
    fault->in_memory = 1;
    fault->at = (int64_t)off;
    return rc;
}

static inline int file_fault(struct qm_fault *fault, off_t at, int rc)
{
    fault->in_memory = 0;
    fault->at = at;
    return rc;
}

#endif
