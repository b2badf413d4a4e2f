/* The memory of a block -> how many pages of each class are in each cell of a map. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "page_class.h"

#include <errno.h>
#include <string.h>

/* Bytes that are read and classified at a time. */
#define STEP ((size_t)512 << 10)

struct mapper {
    struct qm_page_map *map;
    struct qm_fault *fault;
    struct entropy_table table;
    unsigned char *bytes;
    struct qm_cell counts; /* of the cell `cell`, not yet added to it */
    uint64_t cell;
    uint64_t levels[QM_LEVELS];
};

/* Add the counts to their cell. Several channels may count pages of one cell. */
static void flush(struct mapper *m)
{
    struct qm_cell *to = &m->map->cells[m->cell];
    const struct qm_cell *from = &m->counts;
    __atomic_fetch_add(&to->entropy, from->entropy, __ATOMIC_RELAXED);
    __atomic_fetch_add(&to->data, from->data, __ATOMIC_RELAXED);
    __atomic_fetch_add(&to->filled, from->filled, __ATOMIC_RELAXED);
    __atomic_fetch_add(&to->zero, from->zero, __ATOMIC_RELAXED);
    __atomic_fetch_add(&to->hole, from->hole, __ATOMIC_RELAXED);
    memset(&m->counts, 0, sizeof(m->counts));
}

/* Make the counts those of the cell of page k; returns the end of that cell's pages, at most `end`. */
static uint64_t enter(struct mapper *m, uint64_t k, uint64_t end)
{
    const struct qm_page_map *map = m->map;
    uint64_t cell = (map->lead + k) / map->cell_pages;
    if (cell != m->cell) {
        flush(m);
        m->cell = cell;
    }
    uint64_t stop = (cell + 1) * map->cell_pages - map->lead;
    return stop < end ? stop : end;
}

static void count_holes(struct mapper *m, uint64_t first, uint64_t end)
{
    qm_job_count_pages(m->map->job, (end - first) * m->map->page_size, 0, end - first);
    while (first < end) {
        uint64_t stop = enter(m, first, end);
        m->counts.hole += (uint32_t)(stop - first);
        first = stop;
    }
}

static void count_page(struct mapper *m, uint64_t k, uint16_t class)
{
    enter(m, k, k + 1);
    if (class == QM_CLASS_ZERO) {
        m->counts.zero++;
    } else if (class == QM_CLASS_FILLED) {
        m->counts.filled++;
    } else {
        m->counts.data++;
        m->counts.entropy += class;
        m->levels[class / QM_LEVEL < QM_LEVELS ? class / QM_LEVEL : QM_LEVELS - 1]++;
    }
}

static int fail(struct mapper *m, uint64_t off, int rc)
{
    m->fault->in_memory = 1;
    m->fault->at = (int64_t)off;
    return rc;
}

/* The first page among [first, end) that may have data, `end` without any; -errno. */
static int64_t data_start(struct mapper *m, uint64_t first, uint64_t end)
{
    const struct qm_memory *memory = m->map->memory;
    size_t page = m->map->page_size;
    if (!memory->next)
        return (int64_t)first;
    int64_t data = memory->next(memory->fill_arg, first * page, end * page);
    if (data < 0)
        return fail(m, first * page, (int)data);
    return (uint64_t)data == end * page ? (int64_t)end : (int64_t)((uint64_t)data / page);
}

/* Pages [first, end), at most STEP bytes, of which the first may have data. */
static int map_step(struct mapper *m, uint64_t first, uint64_t end)
{
    struct qm_page_map *map = m->map;
    size_t page = map->page_size, len = (size_t)(end - first) * page;
    uint16_t classes[STEP / QM_MIN_PAGE];
    ssize_t got = map->memory->fill(map->memory->fill_arg, m->bytes, first * page, len);
    if (got < 0)
        return fail(m, first * page, (int)got);
    if ((size_t)got < len)
        return fail(m, first * page + (uint64_t)got, -ENODATA);
    classify(&m->table, m->bytes, end - first, map->page_size, classes);
    for (uint64_t k = first; k < end;) {
        if (classes[k - first] == QM_CLASS_ZERO) {
            int64_t data = data_start(m, k, end);
            if (data < 0)
                return (int)data;
            if ((uint64_t)data > k) {
                count_holes(m, k, (uint64_t)data);
                k = (uint64_t)data;
                continue;
            }
        }
        count_page(m, k, classes[k - first]);
        qm_job_count_pages(map->job, page, 1, 0);
        k++;
    }
    qm_job_count_io(map->job, len, 1);
    return 0;
}

static int map_range(struct mapper *m, uint64_t first, uint64_t end)
{
    uint64_t most = STEP / m->map->page_size;
    while (first < end) {
        if (qm_job_cancelled(m->map->job))
            return -ECANCELED;
        int64_t data = data_start(m, first, end);
        if (data < 0)
            return (int)data;
        count_holes(m, first, (uint64_t)data);
        first = (uint64_t)data;
        if (first == end)
            break;
        uint64_t to = end - first < most ? end : first + most;
        int rc = map_step(m, first, to);
        if (rc)
            return rc;
        first = to;
    }
    return 0;
}

/* Whether every page has a cell, and no cell more pages than can be counted. */
static int valid(const struct qm_page_map *map, uint64_t first, uint64_t npages)
{
    uint32_t page = map->page_size;
    return page >= QM_MIN_PAGE && page <= QM_MAX_PAGE && !(page & (page - 1)) &&
           map->memory->fill && first <= map->npages && npages <= map->npages - first &&
           map->cell_pages && map->cell_pages <= UINT32_MAX && map->lead < map->cell_pages &&
           map->npages <= UINT64_MAX - map->lead - map->cell_pages &&
           (map->lead + map->npages + map->cell_pages - 1) / map->cell_pages <= map->ncells;
}

int qm_map_pages(struct qm_page_map *map, qm_channel *channel, uint64_t first, uint64_t npages,
                 struct qm_fault *fault)
{
    if (!valid(map, first, npages))
        return -EINVAL;
    if (npages == 0)
        return 0;
    struct mapper m = {.map = map, .fault = fault, .bytes = qm_channel_buffer(channel, 0)};
    if (!m.bytes)
        return -ENOMEM;
    entropy_init(&m.table);
    m.cell = (map->lead + first) / map->cell_pages;
    int rc = map_range(&m, first, first + npages);
    flush(&m);
    for (unsigned k = 0; k < QM_LEVELS; k++)
        __atomic_fetch_add(&map->levels[k], m.levels[k], __ATOMIC_RELAXED);
    return rc;
}

static uint64_t count_bits(const uint64_t *bits, uint64_t first, uint64_t end)
{
    uint64_t count = 0;
    while (first < end) {
        uint64_t w = first / 64, stop = (w + 1) * 64 < end ? (w + 1) * 64 : end;
        uint64_t word = bits[w] >> first % 64;
        if (stop - first < 64)
            word &= ((uint64_t)1 << (stop - first)) - 1;
        count += (uint64_t)__builtin_popcountll(word);
        first = stop;
    }
    return count;
}

int qm_map_bits(struct qm_page_map *map, const uint64_t *bits, uint64_t from, int field)
{
    if (!valid(map, 0, map->npages) || (field != QM_CHANGED && field != QM_TOUCHED))
        return -EINVAL;
    uint64_t end = from + map->npages;
    for (uint64_t k = from; k < end;) {
        k = next_set(bits, k, end);
        if (k == end)
            break;
        uint64_t cell = (map->lead + k - from) / map->cell_pages;
        uint64_t stop = (cell + 1) * map->cell_pages - map->lead + from;
        stop = stop < end ? stop : end;
        uint32_t count = (uint32_t)count_bits(bits, k, stop);
        if (field == QM_CHANGED)
            map->cells[cell].changed += count;
        else
            map->cells[cell].touched += count;
        k = stop;
    }
    return 0;
}

/* `part` of `all` as 0 to 255: 0 only for nothing, 255 only for everything. */
static unsigned char share(uint64_t part, uint64_t all)
{
    if (part == 0 || part >= all)
        return part ? 255 : 0;
    uint64_t scaled = part * 255 / all;
    return (unsigned char)(scaled == 0 ? 1 : scaled);
}

void qm_summarize_cells(const struct qm_cell *cells, size_t ncells, unsigned char *summaries)
{
    for (size_t k = 0; k < ncells; k++, summaries += QM_SUMMARY) {
        const struct qm_cell *c = &cells[k];
        uint64_t pages = (uint64_t)c->data + c->filled + c->zero + c->hole;
        uint64_t entropy = c->data ? (c->entropy + c->data * (uint64_t)4) / c->data / 8 : 0;
        summaries[0] = pages != 0;
        summaries[1] = share(c->data, pages);
        summaries[2] = share(c->filled, pages);
        summaries[3] = share(c->zero, pages);
        summaries[4] = (unsigned char)(entropy > 255 ? 255 : entropy);
        summaries[5] = share(c->changed, pages);
        summaries[6] = share(c->touched, pages);
        summaries[7] = 0;
    }
}
