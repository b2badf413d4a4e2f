/* Send the pages of a post-copy migration, and answer the destination's requests for them. */
#define _GNU_SOURCE
#include "bits.h"
#include "core_internal.h"
#include "records.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PART_RECORDS 16u /* QEMU holds a lock while it reads a PART */
#define BATCH 256u       /* records of one sendmsg, at most */
#define RECEIVED ((size_t)1 << 14)
#define READ_MAX ((size_t)64 << 10) /* bytes that are read here for an answer */
#define UNIT 4096u
#define HEADER 4u /* u16 type, u16 length */
#define REQUEST_NAMED 3u
#define REQUEST_SAME 4u
#define RANGE 12u /* u64 offset, u32 length */
#define PART_HEADER 5u
#define PART_END 13u

/* Pages that are being sent. `next` is the next to look at; `group_end` is where the page of the
 * destination ends that is being sent. */
struct sending {
    int busy, zeros;
    struct qm_served_block *block;
    uint64_t first, next, end, group_end;
    const unsigned char *pages;
    int64_t since;
};

struct qm_postcopy {
    struct qm_served_block *blocks;
    size_t nblocks;
    unsigned char part_header[PART_HEADER], part_end[PART_END];
    int socket;
    const struct qm_served_block *named;
    /* What the last sendmsg left. */
    struct iovec iov[2 * BATCH + 3];
    size_t at, n;
    struct sending *owner; /* whose pages the batch has */
    struct sending *part;  /* whose PART is not ended yet */
    unsigned part_records;
    int emptied; /* the last pending page of a block is in the batch */
    uint64_t words[BATCH];
    unsigned char name[256];
    struct sending answer, push;
    int answer_is_own;
    unsigned char *own;
    int64_t last_request;
    struct qm_served_block *asked;
    size_t received;
    unsigned char in[RECEIVED];
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- encoding ------------------------------------------------------------------------------- */

static void add(struct qm_postcopy *p, const void *bytes, size_t len)
{
    p->iov[p->n++] = (struct iovec){.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
}

static void mark(struct qm_postcopy *p, struct qm_served_block *b, uint64_t page)
{
    if (bit_get(b->pending, page)) {
        bit_clear(b->pending, page);
        if (--b->left == 0)
            p->emptied = 1;
    }
    bit_set(b->sent, page);
    b->total++;
}

/* Find the next page of the destination that has to be sent; 0 when there is none. */
static int next_group(struct sending *s)
{
    const struct qm_served_block *b = s->block;
    uint64_t together = b->together;
    while (s->next < s->end) {
        uint64_t k =
            s->zeros ? next_clear(b->sent, s->next, s->end) : next_set(b->pending, s->next, s->end);
        k -= k % together;
        if (k < s->next)
            k = s->next; /* it was sent already */
        s->next = k;
        if (k >= s->end)
            return 0;
        if (together == 1 || !bit_get(b->sent, k)) {
            s->group_end = k + together;
            return 1;
        }
        s->next += together;
    }
    return 0;
}

/* Put the next records of a sending into the batch: those of one PART, or fewer if they are too
 * many. */
static void encode(struct qm_postcopy *p, struct sending *s)
{
    static const unsigned char zero;
    struct qm_served_block *b = s->block;
    size_t records = 0;
    p->at = p->n = 0;
    p->owner = s;
    for (;;) {
        if (s->next == s->group_end && (p->part_records >= PART_RECORDS || !next_group(s)))
            break;
        if (records == BATCH)
            return;
        if (!p->part) {
            add(p, p->part_header, PART_HEADER);
            p->part = s;
        }
        uint64_t page = s->next++;
        int data = bit_get(b->data, page);
        uint64_t word = page * b->page_size | (data ? RECORD_PAGE : RECORD_ZERO);
        if (p->named == b)
            word |= RECORD_CONTINUE;
        p->words[records] = htobe64(word);
        add(p, &p->words[records], WORD_LEN);
        if (p->named != b) {
            p->name[0] = b->name_len;
            memcpy(p->name + 1, b->name, b->name_len);
            add(p, p->name, (size_t)b->name_len + 1);
            p->named = b;
        }
        if (data)
            add(p, s->pages + (page - s->first) * b->page_size, b->page_size);
        else
            add(p, &zero, 1);
        mark(p, b, page);
        records++;
        p->part_records++;
    }
    if (p->part)
        add(p, p->part_end, PART_END);
    p->part = NULL;
    p->part_records = 0;
}

/* Send what the batch has. Returns 0 when all is sent, -EAGAIN, or another -errno. */
static int flush(struct qm_postcopy *p)
{
    while (p->at < p->n) {
        struct msghdr message = {.msg_iov = p->iov + p->at, .msg_iovlen = p->n - p->at};
        ssize_t sent = sendmsg(p->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EWOULDBLOCK ? -EAGAIN : -errno;
        size_t left = (size_t)sent;
        while (p->at < p->n && left >= p->iov[p->at].iov_len)
            left -= p->iov[p->at++].iov_len;
        if (left) {
            p->iov[p->at].iov_base = (unsigned char *)p->iov[p->at].iov_base + left;
            p->iov[p->at].iov_len -= left;
        }
    }
    return 0;
}

/* Whether all of a sending is in the batch. */
static int encoded(const struct sending *s)
{
    return s->next >= s->end;
}

/* ---- requests ------------------------------------------------------------------------------- */

static struct qm_served_block *find_block(struct qm_postcopy *p, const unsigned char *name,
                                          size_t len)
{
    for (size_t k = 0; k < p->nblocks; k++)
        if (p->blocks[k].name_len == len && memcmp(p->blocks[k].name, name, len) == 0)
            return &p->blocks[k];
    return NULL;
}

/* Parse the request at `in`. Returns its length, 0 if it is not complete, -EPROTO if it is something
 * else. */
static int parse_request(struct qm_postcopy *p, const unsigned char *in, size_t len,
                         struct qm_served_block **block, uint64_t *first, uint64_t *npages)
{
    uint16_t type, length;
    uint64_t offset;
    uint32_t bytes;
    if (len < HEADER)
        return 0;
    memcpy(&type, in, sizeof(type));
    memcpy(&length, in + 2, sizeof(length));
    type = be16toh(type);
    length = be16toh(length);
    if (type == REQUEST_SAME ? length != RANGE
                             : type != REQUEST_NAMED || length < RANGE + 1 || length > RANGE + 256)
        return -EPROTO;
    if (len < HEADER + (size_t)length)
        return 0;
    in += HEADER;
    memcpy(&offset, in, sizeof(offset));
    memcpy(&bytes, in + 8, sizeof(bytes));
    offset = be64toh(offset);
    bytes = be32toh(bytes);
    struct qm_served_block *b = p->asked;
    if (type == REQUEST_NAMED) {
        if (in[RANGE] != length - RANGE - 1)
            return -EPROTO;
        b = find_block(p, in + RANGE + 1, in[RANGE]);
    }
    if (!b)
        return -EPROTO;
    uint64_t size = (uint64_t)b->page_size * b->together, total = b->npages * b->page_size;
    if (bytes == 0 || bytes % size || offset % size || offset > total || bytes > total - offset)
        return -EPROTO;
    p->asked = b;
    *block = b;
    *first = offset / b->page_size;
    *npages = bytes / b->page_size;
    return (int)(HEADER + length);
}

static int any_unsent(const struct qm_served_block *b, uint64_t first, uint64_t npages)
{
    return next_clear(b->sent, first, first + npages) < first + npages;
}

static void begin(struct sending *s, struct qm_served_block *b, uint64_t first, uint64_t npages,
                  const void *pages, int zeros, int64_t since)
{
    *s = (struct sending){
        .busy = 1,
        .zeros = zeros,
        .block = b,
        .first = first,
        .next = first,
        .end = first + npages,
        .group_end = first,
        .pages = pages,
        .since = since,
    };
}

/* Read pages of a file; -EBADMSG for what cannot be compared, or differs. */
static int read_pages(const struct qm_served_block *b, uint64_t first, size_t len,
                      unsigned char *bytes)
{
    uint64_t at = (uint64_t)b->pages_offset + first * b->page_size;
    unsigned char found[READ_MAX / UNIT * QM_DIGEST];
    if (b->checked &&
        next_clear(b->checked, at / QM_PIECE, (at + len - 1) / QM_PIECE + 1) * QM_PIECE < at + len)
        return -EBADMSG;
    int rc = qm_read_all(b->fd, bytes, len, at);
    if (rc || !b->checked)
        return rc;
    rc = qm_digest_bytes(bytes, len / UNIT, UNIT, found);
    if (rc)
        return rc;
    size_t size = len / UNIT * QM_DIGEST;
    return memcmp(found, b->digests + at / UNIT * QM_DIGEST, size) ? -EBADMSG : 0;
}

/* Answer a request with pages that can be read here. Returns 0 if they cannot. */
static int answer(struct qm_postcopy *p, struct qm_served_block *b, uint64_t first, uint64_t npages,
                  int64_t since)
{
    size_t len = (size_t)(npages * b->page_size);
    if (npages * b->page_size > READ_MAX)
        return 0;
    if (next_set(b->data, first, first + npages) < first + npages) {
        if (b->fd < 0)
            return 0;
        if (!p->own && !(p->own = malloc(READ_MAX)))
            return 0;
        if (read_pages(b, first, len, p->own))
            return 0;
    }
    begin(&p->answer, b, first, npages, p->own, 1, since);
    p->answer_is_own = 1;
    return 1;
}

/* Take the requests that have been received, until one of them has to wait. Returns whether there were
 * any. */
static int take_requests(struct qm_postcopy *p, struct qm_serving *s)
{
    size_t at = 0;
    while (!p->answer.busy && !s->events) {
        struct qm_served_block *b;
        uint64_t first, npages;
        int n = parse_request(p, p->in + at, p->received - at, &b, &first, &npages);
        if (n == 0)
            break;
        if (n < 0) {
            s->events |= QM_MESSAGE;
            break;
        }
        at += (size_t)n;
        s->requests++;
        p->last_request = now_ns();
        if (!any_unsent(b, first, npages) ||
            (!s->all && answer(p, b, first, npages, p->last_request)))
            continue;
        s->block = (uint64_t)(b - p->blocks);
        s->first = first;
        s->npages = npages;
        s->since = p->last_request;
        s->events |= QM_REQUEST;
    }
    memmove(p->in, p->in + at, p->received - at);
    p->received -= at;
    return at > 0;
}

static int receive(struct qm_postcopy *p, struct qm_serving *s)
{
    ssize_t got;
    do
        got = recv(p->socket, p->in + p->received, RECEIVED - p->received, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EWOULDBLOCK ? 0 : -errno;
    if (got == 0)
        return -ECONNRESET;
    p->received += (size_t)got;
    if (s->raw)
        s->events |= QM_MESSAGE;
    return 0;
}

/* ---- the loop ------------------------------------------------------------------------------- */

/* When the pushed pages may go out. */
static int64_t quiet_until(const struct qm_postcopy *p, const struct qm_serving *s)
{
    return s->quiet > 0 ? p->last_request + s->quiet : 0;
}

static void finish(struct qm_postcopy *p, struct qm_serving *s)
{
    struct sending *done = p->owner;
    p->owner = NULL;
    if (!done || !encoded(done))
        return;
    done->busy = 0;
    if (p->emptied)
        s->events |= QM_EMPTY;
    p->emptied = 0;
    if (done == &p->push) {
        s->events |= QM_PUSHED;
        return;
    }
    int64_t took = now_ns() - done->since;
    s->answers++;
    s->answer_ns += took;
    if (took > s->longest_ns)
        s->longest_ns = took;
    if (!p->answer_is_own || s->waits)
        s->events |= QM_ANSWERED;
    p->answer_is_own = 0;
}

/* Send what can be sent now. Returns 0 when the socket is full or there is nothing, else -errno. */
static int send_some(struct qm_postcopy *p, struct qm_serving *s)
{
    for (;;) {
        int rc = flush(p);
        if (rc)
            return rc == -EAGAIN ? 0 : rc;
        finish(p, s);
        if (p->part) {
            encode(p, p->part);
        } else if (p->answer.busy) {
            encode(p, &p->answer);
        } else if (p->push.busy && now_ns() >= quiet_until(p, s)) {
            struct pollfd ready = {.fd = p->socket, .events = POLLIN};
            if (s->events || poll(&ready, 1, 0) > 0)
                return 0;
            encode(p, &p->push);
        } else {
            return 0;
        }
        if (p->n == 0) { /* everything had been sent */
            p->owner->next = p->owner->end;
            finish(p, s);
        }
    }
}

/* Wait for what can be done next, or for `until`. */
static int wait_for(struct qm_postcopy *p, struct qm_serving *s, int64_t until)
{
    struct pollfd fds[3] = {
        {.fd = p->socket, .events = (short)(p->at < p->n ? POLLOUT : 0)},
        {.fd = s->wake[0], .events = POLLIN},
        {.fd = s->wake[1], .events = POLLIN},
    };
    if (p->received < RECEIVED && !p->answer.busy)
        fds[0].events |= POLLIN;
    int64_t left = until - now_ns();
    struct timespec t = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
    if (left <= 0)
        t = (struct timespec){0};
    int rc = ppoll(fds, 3, until == INT64_MAX ? NULL : &t, NULL);
    if (rc < 0)
        return errno == EINTR ? 0 : -errno;
    for (int k = 0; k < 2; k++)
        if (fds[1 + k].revents)
            s->events |= k ? QM_WOKEN_1 : QM_WOKEN_0;
    if (fds[0].revents & (POLLIN | POLLHUP | POLLERR) && p->received < RECEIVED)
        return receive(p, s);
    return 0;
}

int qm_postcopy_serve(qm_postcopy *p, struct qm_serving *s)
{
    int64_t deadline = s->timeout < 0 ? INT64_MAX : now_ns() + s->timeout;
    int polled = 0;
    s->events = 0;
    for (;;) {
        if (!s->raw)
            take_requests(p, s);
        int rc = send_some(p, s);
        if (rc) {
            /* What the destination said before it closed the connection may be that it has all. */
            (void)receive(p, s);
            if (p->received == 0)
                return rc;
            s->events |= QM_MESSAGE;
            return 0;
        }
        /* An answer that has gone makes room for the next one. */
        if (s->raw && p->received)
            s->events |= QM_MESSAGE;
        else if (!s->raw && take_requests(p, s) && !s->events)
            continue;
        int64_t now = now_ns(), until = deadline;
        if (s->push && !p->push.busy && !p->answer.busy) {
            if (now >= quiet_until(p, s))
                s->events |= QM_DUE;
            until = quiet_until(p, s);
        } else if (p->push.busy && !p->answer.busy && p->at == p->n) {
            until = quiet_until(p, s);
        }
        if (polled && now >= deadline)
            s->events |= QM_TIMEOUT;
        if (s->events)
            return 0;
        polled = 1;
        rc = wait_for(p, s, until < deadline ? until : deadline);
        if (rc)
            return rc;
    }
}

int qm_postcopy_send(qm_postcopy *p, const struct qm_sent_pages *pages)
{
    struct sending *s = pages->since ? &p->answer : &p->push;
    if (s->busy)
        return -EBUSY;
    if (pages->block >= p->nblocks)
        return -EINVAL;
    struct qm_served_block *b = &p->blocks[pages->block];
    if (pages->first % b->together || pages->npages % b->together || pages->first > b->npages ||
        pages->npages > b->npages - pages->first || pages->npages == 0)
        return -EINVAL;
    uint64_t end = pages->first + pages->npages;
    if (!pages->bytes && next_set(b->data, pages->first, end) < end)
        return -EINVAL;
    begin(s, b, pages->first, pages->npages, pages->bytes, pages->since != 0, pages->since);
    return 0;
}

size_t qm_postcopy_received(qm_postcopy *p, unsigned char *out, size_t len)
{
    if (len > p->received)
        len = p->received;
    memcpy(out, p->in, len);
    memmove(p->in, p->in + len, p->received - len);
    p->received -= len;
    return len;
}

int qm_postcopy_idle(const qm_postcopy *p)
{
    return !p->answer.busy && !p->push.busy && p->at == p->n && !p->part;
}

int qm_postcopy_answering(const qm_postcopy *p)
{
    return p->answer.busy;
}

void qm_postcopy_asked(qm_postcopy *p, uint64_t block)
{
    p->asked = block < p->nblocks ? &p->blocks[block] : NULL;
    p->last_request = now_ns();
}

int64_t qm_postcopy_last_asked(const qm_postcopy *p)
{
    return p->asked ? p->asked - p->blocks : -1;
}

void qm_postcopy_connect(qm_postcopy *p, int socket)
{
    p->socket = socket;
    p->named = p->asked = NULL;
    p->owner = p->part = NULL;
    p->at = p->n = p->received = 0;
    p->part_records = 0;
    p->emptied = 0;
    p->answer.busy = p->push.busy = p->answer_is_own = 0;
    p->last_request = 0;
}

qm_postcopy *qm_postcopy_create(struct qm_served_block *blocks, size_t nblocks,
                                const unsigned char *part_header, const unsigned char *part_end)
{
    qm_postcopy *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->blocks = blocks;
    p->nblocks = nblocks;
    memcpy(p->part_header, part_header, PART_HEADER);
    memcpy(p->part_end, part_end, PART_END);
    p->socket = -1;
    return p;
}

void qm_postcopy_destroy(qm_postcopy *p)
{
    if (!p)
        return;
    free(p->own);
    free(p);
}
