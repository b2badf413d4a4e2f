/* The index of a block of a sequential stream: built while records are decoded, then used for random
 * reads. */
#define _GNU_SOURCE
#include "core_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* A tree of nodes with 512 words each, like page tables: pages that no record mentions use no memory,
 * however long the block claims to be. */
#define NODE_BITS 9
#define NODE_WORDS ((size_t)1 << NODE_BITS)
#define NODE_LEN (NODE_WORDS * sizeof(uint64_t))

#define KIND_SHIFT 62
#define VALUE_MASK (((uint64_t)1 << KIND_SHIFT) - 1)
#define WORD(kind, value) ((uint64_t)(kind) << KIND_SHIFT | (value))

#define RECORD_GAP 8 /* bytes between the pages of two adjacent records of one block */

union node {
    union node *below[NODE_WORDS];
    uint64_t words[NODE_WORDS];
};

struct qm_index {
    uint64_t npages;
    uint32_t page_size;
    int height; /* levels of the tree; 1: the root has the words */
    union node *root;
    union node *leaf; /* the leaf written to last; its first page is leaf_first */
    uint64_t leaf_first;
    struct qm_change *changes;
    uint64_t nchanges, room;
    uint64_t bytes;
};

static int kind_of(uint64_t word)
{
    return (int)(word >> KIND_SHIFT);
}

static int is_data(uint64_t word)
{
    return word != 0 && word != WORD(QM_PLACE_FILL, 0);
}

qm_index *qm_index_create(uint64_t npages, uint32_t page_size)
{
    if (page_size < QM_MIN_PAGE || page_size > QM_MAX_PAGE || (page_size & (page_size - 1)))
        return NULL;
    qm_index *index = calloc(1, sizeof(*index));
    if (!index)
        return NULL;
    index->npages = npages;
    index->page_size = page_size;
    index->height = 1;
    while (index->height * NODE_BITS < 64 && npages > (uint64_t)1 << index->height * NODE_BITS)
        index->height++;
    return index;
}

static void free_tree(union node *node, int height)
{
    if (!node)
        return;
    for (size_t i = 0; height > 1 && i < NODE_WORDS; i++)
        free_tree(node->below[i], height - 1);
    free(node);
}

void qm_index_destroy(qm_index *index)
{
    if (!index)
        return;
    free_tree(index->root, index->height);
    free(index->changes);
    free(index);
}

uint64_t qm_index_bytes(const qm_index *index)
{
    return index->bytes;
}

/* ---- the tree ------------------------------------------------------------------------------- */

static size_t slot(uint64_t page, int level)
{
    return (size_t)(page >> (level - 1) * NODE_BITS) & (NODE_WORDS - 1);
}

/* Return the leaf with the word of `page`, and create it if necessary; NULL when out of memory. */
static union node *make_leaf(qm_index *index, uint64_t page)
{
    if (index->leaf && page - index->leaf_first < NODE_WORDS)
        return index->leaf;
    union node **at = &index->root;
    for (int level = index->height;; level--) {
        if (!*at) {
            *at = calloc(1, NODE_LEN);
            if (!*at)
                return NULL;
            index->bytes += NODE_LEN;
        }
        if (level == 1)
            break;
        at = &(*at)->below[slot(page, level)];
    }
    index->leaf = *at;
    index->leaf_first = page & ~(uint64_t)(NODE_WORDS - 1);
    return *at;
}

/* Return the leaf with the word of `page`, or NULL and in *missing how many pages from `page` on have
 * no leaf. */
static const union node *find_leaf(const qm_index *index, uint64_t page, uint64_t *missing)
{
    const union node *node = index->root;
    int level = index->height;
    for (; node && level > 1; level--)
        node = node->below[slot(page, level)];
    if (node)
        return node;
    uint64_t span = level * NODE_BITS < 64 ? (uint64_t)1 << level * NODE_BITS : 0;
    *missing = span - (page & (span - 1));
    return NULL;
}

static uint64_t word_at(const qm_index *index, uint64_t page)
{
    uint64_t missing;
    const union node *leaf = find_leaf(index, page, &missing);
    return leaf ? leaf->words[slot(page, 1)] : 0;
}

/* Return 1 when the page was not mentioned before. */
static int set_word(qm_index *index, uint64_t page, uint64_t word)
{
    if (page >= index->npages)
        return -EINVAL;
    union node *leaf = make_leaf(index, page);
    if (!leaf)
        return -ENOMEM;
    uint64_t *at = &leaf->words[slot(page, 1)];
    int first = *at == 0;
    *at = word;
    return first;
}

/* ---- places of pages ------------------------------------------------------------------------ */

int qm_index_fill_is(qm_index *index, uint64_t page, unsigned char fill)
{
    return set_word(index, page, WORD(QM_PLACE_FILL, fill));
}

int qm_index_page_at(qm_index *index, uint64_t page, uint64_t at)
{
    return at > VALUE_MASK ? -EFBIG : set_word(index, page, WORD(QM_PLACE_PAGE, at));
}

static int add_change(qm_index *index, const struct qm_change *change)
{
    if (index->nchanges == index->room) {
        uint64_t room = index->room ? index->room + index->room / 2 : 64;
        if (room > SIZE_MAX / sizeof(*change))
            return -ENOMEM;
        struct qm_change *grown = realloc(index->changes, (size_t)room * sizeof(*change));
        if (!grown)
            return -ENOMEM;
        index->bytes += (room - index->room) * sizeof(*change);
        index->changes = grown;
        index->room = room;
    }
    index->changes[index->nchanges++] = *change;
    return 0;
}

static uint32_t depth_of(const qm_index *index, uint64_t word)
{
    return kind_of(word) == QM_PLACE_CHANGED ? index->changes[word & VALUE_MASK].depth : 0;
}

int qm_index_changed(qm_index *index, uint64_t page, uint64_t at, uint16_t len)
{
    if (page >= index->npages)
        return -EINVAL;
    uint64_t before = word_at(index, page);
    struct qm_change change = {
        .before = before,
        .at = at,
        .len = len,
        .depth = depth_of(index, before) + 1,
    };
    if (change.depth > QM_CHANGES_MAX)
        return -EMLINK;
    int rc = add_change(index, &change);
    return rc ? rc : set_word(index, page, WORD(QM_PLACE_CHANGED, index->nchanges - 1));
}

/* ---- export and import ---------------------------------------------------------------------- */

uint64_t qm_index_next(const qm_index *index, uint64_t page)
{
    while (page < index->npages) {
        uint64_t missing;
        const union node *leaf = find_leaf(index, page, &missing);
        if (!leaf) {
            if (missing > index->npages - page)
                break;
            page += missing;
            continue;
        }
        for (size_t k = slot(page, 1); k < NODE_WORDS && page < index->npages; k++, page++)
            if (leaf->words[k])
                return page;
    }
    return index->npages;
}

int qm_index_get(const qm_index *index, uint64_t first, uint64_t npages, uint64_t *words)
{
    if (first > index->npages || npages > index->npages - first)
        return -EINVAL;
    for (uint64_t k = 0; k < npages; k++)
        words[k] = word_at(index, first + k);
    return 0;
}

static int is_possible(const qm_index *index, uint64_t word, uint64_t nchanges, uint64_t end)
{
    uint64_t value = word & VALUE_MASK;
    switch (kind_of(word)) {
    case QM_PLACE_FILL:
        return value <= UINT8_MAX;
    case QM_PLACE_PAGE:
        return value <= end && end - value >= index->page_size;
    case QM_PLACE_CHANGED:
        return value < nchanges;
    default:
        return word == 0;
    }
}

int qm_index_put(qm_index *index, uint64_t first, uint64_t npages, const uint64_t *words,
                 uint64_t end)
{
    if (first > index->npages || npages > index->npages - first)
        return -EINVAL;
    for (uint64_t k = 0; k < npages; k++) {
        if (!is_possible(index, words[k], index->nchanges, end))
            return -EBADMSG;
        int rc = words[k] ? set_word(index, first + k, words[k]) : 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}

uint64_t qm_index_changes(const qm_index *index, const struct qm_change **changes)
{
    *changes = index->changes;
    return index->nchanges;
}

int qm_index_put_changes(qm_index *index, const struct qm_change *changes, uint64_t n, uint64_t end)
{
    for (uint64_t i = 0; i < n; i++) {
        /* A change may refer to earlier ones only, so that no chain is a loop. */
        if (!is_possible(index, changes[i].before, index->nchanges, end) || changes[i].at > end ||
            end - changes[i].at < changes[i].len)
            return -EBADMSG;
        struct qm_change change = changes[i];
        change.depth = depth_of(index, change.before) + 1;
        if (change.depth > QM_CHANGES_MAX)
            return -EBADMSG;
        int rc = add_change(index, &change);
        if (rc)
            return rc;
    }
    return 0;
}

uint64_t qm_index_count(const qm_index *index)
{
    uint64_t data = 0;
    for (uint64_t k = qm_index_next(index, 0); k < index->npages; k = qm_index_next(index, k + 1))
        data += (uint64_t)is_data(word_at(index, k));
    return data;
}

uint64_t qm_index_run(const qm_index *index, uint64_t first, uint64_t end, int *data)
{
    if (end > index->npages)
        end = index->npages;
    *data = first < end && is_data(word_at(index, first));
    uint64_t k = first;
    while (k < end) {
        uint64_t missing;
        const union node *leaf = find_leaf(index, k, &missing);
        if (!leaf) {
            if (*data)
                return k;
            k = missing > end - k ? end : k + missing;
            continue;
        }
        for (size_t i = slot(k, 1); i < NODE_WORDS && k < end; i++, k++)
            if (is_data(leaf->words[i]) != *data)
                return k;
    }
    return end;
}

static int is_from(const qm_index *index, uint64_t word, uint64_t start, uint64_t end)
{
    for (;;) {
        uint64_t value = word & VALUE_MASK;
        if (kind_of(word) == QM_PLACE_PAGE)
            return value < end && start < value + index->page_size;
        if (kind_of(word) != QM_PLACE_CHANGED)
            return 0;
        const struct qm_change *change = &index->changes[value];
        if (change->at < end && start < change->at + change->len)
            return 1;
        word = change->before;
    }
}

uint64_t qm_index_from(const qm_index *index, uint64_t page, uint64_t start, uint64_t end)
{
    page = qm_index_next(index, page);
    while (page < index->npages && !is_from(index, word_at(index, page), start, end))
        page = qm_index_next(index, page + 1);
    return page;
}

/* ---- reading pages -------------------------------------------------------------------------- */

static int read_unchanged(const struct qm_indexed *s, uint64_t word, unsigned char *page)
{
    uint64_t value = word & VALUE_MASK;
    if (kind_of(word) == QM_PLACE_PAGE)
        return qm_read_all(s->fd, page, s->index->page_size, value);
    memset(page, (int)value, s->index->page_size);
    return 0;
}

static int read_changed(const struct qm_indexed *s, uint64_t word, unsigned char *page)
{
    const struct qm_change *chain[QM_CHANGES_MAX];
    unsigned char delta[UINT16_MAX];
    size_t n = 0;
    for (; kind_of(word) == QM_PLACE_CHANGED; word = chain[n++]->before)
        chain[n] = &s->index->changes[word & VALUE_MASK];
    int rc = read_unchanged(s, word, page);
    while (rc == 0 && n-- > 0) {
        rc = qm_read_all(s->fd, delta, chain[n]->len, chain[n]->at);
        if (rc == 0)
            rc = qm_apply_delta(delta, chain[n]->len, page, s->index->page_size);
    }
    return rc;
}

/* Read the page of `word`, and those whose records follow it directly, at most `most`, in one call.
 * Returns how many pages were read. */
static int64_t read_together(const struct qm_indexed *s, uint64_t page, uint64_t word,
                             uint64_t most, unsigned char *out)
{
    struct iovec iov[QM_MAX_IOV];
    unsigned char gap[RECORD_GAP];
    uint64_t size = s->index->page_size, at = word & VALUE_MASK;
    size_t len = 0;
    int n = 0;
    uint64_t k = 0;
    do {
        if (n) {
            iov[n++] = (struct iovec){.iov_base = gap, .iov_len = RECORD_GAP};
            len += RECORD_GAP;
        }
        iov[n++] = (struct iovec){.iov_base = out + k * size, .iov_len = (size_t)size};
        len += (size_t)size;
        k++;
    } while (k < most && n + 2 <= QM_MAX_IOV &&
             word_at(s->index, page + k) == WORD(QM_PLACE_PAGE, at + k * (size + RECORD_GAP)));
    if (preadv(s->fd, iov, n, (off_t)at) == (ssize_t)len)
        return (int64_t)k;
    /* Page by page, to find out where it fails. */
    int rc = qm_read_all(s->fd, out, (size_t)size, at);
    return rc ? rc : 1;
}

ssize_t qm_indexed_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    const struct qm_indexed *s = arg;
    uint64_t size = s->index->page_size;
    uint64_t first = off / size, npages = len / size;
    if (off % size || len % size || first > s->index->npages || npages > s->index->npages - first)
        return -EINVAL;
    unsigned char *out = buf;
    for (uint64_t k = 0; k < npages;) {
        uint64_t word = word_at(s->index, first + k);
        int64_t done = 1;
        if (kind_of(word) == QM_PLACE_PAGE)
            done = read_together(s, first + k, word, npages - k, out + k * size);
        else if (kind_of(word) == QM_PLACE_CHANGED)
            done = read_changed(s, word, out + k * size);
        else
            memset(out + k * size, (int)(word & VALUE_MASK), (size_t)size);
        if (done < 0)
            return done;
        k += done ? (uint64_t)done : 1;
    }
    return (ssize_t)len;
}

int64_t qm_indexed_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_indexed *s = arg;
    uint64_t size = s->index->page_size;
    uint64_t last = end / size + (end % size != 0);
    int data;
    uint64_t stop = qm_index_run(s->index, off / size, last, &data);
    if (data)
        return (int64_t)off;
    uint64_t at = stop * size;
    return (int64_t)(at < off ? off : at < end ? at : end);
}
