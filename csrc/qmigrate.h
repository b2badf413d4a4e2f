/*
 * qmigrate: move pages between guest memory and a mapped-ram file.
 *
 * Notions
 *   block     a contiguous piece of guest memory, `len` bytes, divided into pages of `page_size`
 *             bytes (a power of two, 1 KiB to 64 KiB). Page k is always at file position
 *             `pages_offset + k * page_size`.
 *   bitmap    one bit per page in native 64-bit words; bit k is bit k%64 of word k/64.
 *   chunk     QM_CHUNK bytes of a block: the unit of scanning, planning and moving. At least 64
 *             pages, so that two chunks never share a bitmap word.
 *   run       consecutive pages of one chunk that one system call moves.
 *   unit      the file alignment that direct I/O requires (`off_align`).
 *   piece     QM_PIECE bytes of a block, starting at a multiple of QM_PIECE: one digest each.
 *   job       the atomics that all channels of one save or load share.
 *   channel   the private state of one thread: bounce buffers, and a queue of direct transfers
 *             that run while the next ones are prepared. The queue is empty when a function
 *             returns.
 *   transfer  what stays the same for all calls of one pass over one block.
 *
 * Conventions
 *   Every function returns 0 or a count, or -errno; errno itself is not part of the contract.
 *   Sizes named `len` are bytes, sizes named `npages` are pages, file positions are off_t.
 *   No allocation has a size that comes from a file. There is no global state.
 *   EINTR and EAGAIN are retried; short reads and writes are continued.
 *   Functions that move pages poll the job before every chunk and every system call, at least
 *   every QM_CHUNK bytes, and return -ECANCELED once it is cancelled.
 *   Ranges are [first, first + npages). Unless stated otherwise, `first` is a multiple of 64 and
 *   of QM_CHUNK / page_size, and bitmaps cover the whole block.
 */
#ifndef QMIGRATE_H
#define QMIGRATE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define QM_CHUNK ((size_t)4 << 20)
#define QM_PIECE ((size_t)1 << 20)
#define QM_MIN_PAGE 1024u
#define QM_MAX_PAGE 65536u
/* Limits of one readv/writev call on Linux. */
#define QM_MAX_IOV 1024

/* ---- job ------------------------------------------------------------------------------------ */

typedef struct qm_job qm_job;

/* Running totals of a job.
 *   bytes_done   guest bytes processed, moved or not (progress)
 *   data_pages, zero_pages   pages processed, by kind
 *   bytes_moved  bytes that system calls moved to or from the file, gaps included
 *   calls        the number of those system calls */
struct qm_totals {
    uint64_t bytes_done;
    uint64_t data_pages;
    uint64_t zero_pages;
    uint64_t bytes_moved;
    uint64_t calls;
};

/* Return NULL when out of memory. Destroy a job only after the last call that uses it returned. */
qm_job *qm_job_create(void);
void qm_job_destroy(qm_job *job);
/* Can be called from any thread, and more than once. */
void qm_job_cancel(qm_job *job);
int qm_job_cancelled(const qm_job *job);
/* Limit the bytes moved per second over all channels; 0 is unlimited. Can change while the job
 * runs: waiters are re-evaluated at the new rate. */
void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second);
void qm_job_totals(const qm_job *job, struct qm_totals *out);
/* Count `len` bytes moved by `calls` system calls; 0 calls for writes made elsewhere (head,
 * bitmaps). */
void qm_job_count_io(qm_job *job, uint64_t len, uint64_t calls);
/* Count guest bytes, and pages of both kinds, that were processed elsewhere. */
void qm_job_count_pages(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages);

/* ---- channel -------------------------------------------------------------------------------- */

typedef struct qm_channel qm_channel;

/* Bounce buffers (QM_CHUNK plus room for rounding, aligned for any device, not inherited by fork)
 * are allocated on first use. A channel serves one thread at a time. Returns NULL when out of
 * memory. */
qm_channel *qm_channel_create(void);
void qm_channel_destroy(qm_channel *channel);

/* ---- memory --------------------------------------------------------------------------------- */

/* Copy `len` bytes of guest memory, from byte `off` of the block, to `buf`. Returns `len`, fewer
 * when the memory ends early, or -errno. Called from the channel's thread. */
typedef ssize_t (*qm_fill_fn)(void *arg, void *buf, uint64_t off, size_t len);
/* Return the next byte of the block, from `off` on and at most `end`, that may not be zero. */
typedef int64_t (*qm_next_fn)(void *arg, uint64_t off, uint64_t end);

/* Where the bytes of a block live. One of:
 *   base, fd < 0     plain memory that stays mapped during the call.
 *   base and fd      a mapping of `fd`. On a save, fd cannot shrink; its holes are neither read nor
 *                    made resident (a page that may contain part of a hole is read with pread). On
 *                    a load, fd may shrink: only the kernel touches the mapping, or the file is
 *                    written with pwrite, and holes are punched.
 *   fd, no base      a file that may shrink: read with pread, written with pwrite.
 *   fill             memory without an address in this process (saves only). `next` is optional
 *                    and skips what need not be read; both are called with `fill_arg`.
 * Byte 0 of the block is base[0] and file position fd_offset. `fd` must have its own open file
 * description, since SEEK_DATA moves the position. */
struct qm_memory {
    unsigned char *base;
    int fd;
    off_t fd_offset;
    qm_fill_fn fill;
    void *fill_arg;
    qm_next_fn next;
};

/* Memory of another process: the argument of qm_process_fill and qm_process_next.
 *   pid, pidfd   the process. The pidfd shows when it has exited, after which its number may
 *                belong to another process.
 *   pagemap      /proc/PID/pagemap. Only qm_process_next needs it; the memory must be a private
 *                anonymous mapping, in which an absent page is zero.
 *   has_scan     whether the kernel supports PAGEMAP_SCAN (Linux 6.7).
 *   address      the address of byte 0 of the block in that process. */
struct qm_process {
    int pid;
    int pidfd;
    int pagemap;
    int has_scan;
    uint64_t address;
};

/* A qm_fill_fn based on process_vm_readv. -ESRCH: the process has exited; -EPERM: reading it is not
 * permitted. */
ssize_t qm_process_fill(void *process, void *buf, uint64_t off, size_t len);
/* A qm_next_fn that skips pages that were never touched or map the zero page. Returns `off` when
 * that cannot be determined. */
int64_t qm_process_next(void *process, uint64_t off, uint64_t end);
/* Return 1 when the pagemap supports PAGEMAP_SCAN, 0 when it has to be read word by word. */
int qm_process_can_scan(int pagemap);

/* Return 1 when the pages that contain `bytes`, memory of this process, are in short pieces of the
 * machine's memory (on average under 32 KiB), also if that is unknown, else 0. `pagemap` is a descriptor of
 * /proc/self/pagemap or -1. Without CAP_SYS_ADMIN only huge pages (Linux 6.7) are known not to be. */
int qm_is_scattered(int pagemap, const unsigned char *bytes, size_t len);

/* Find the first touched page of private anonymous memory of this process. Returns its first byte
 * at or after `from`, an offset into `memory`; `end` when there is none; `from` when it cannot be
 * determined. Touches no memory. `pagemap` is /proc/self/pagemap, opened since the last fork;
 * `has_scan` is as in struct qm_process. */
uint64_t qm_next_touched(int pagemap, int has_scan, const void *memory, uint64_t from,
                         uint64_t end);

struct qm_block {
    uint64_t len;
    off_t pages_offset;
    uint32_t page_size;
};

/* Called by qm_write before it writes pages of a piece: `len` bytes from file position `at` (the
 * last piece of a block may be shorter); by qm_write_tail for each page that it looks at. `bytes` is
 * what the file will contain there if it was a hole before; it is valid until the hook returns.
 * `bytes` is NULL when only selected pages are written, since the rest of the piece is then unknown.
 * Called from the channel's thread. Returns 0, or -errno to stop the write. */
typedef int (*qm_write_hook)(void *arg, int64_t at, const void *bytes, size_t len);

/* The file.
 *   fd                    buffered; -1: nothing is written, pages are only counted.
 *   fd_direct             opened with O_DIRECT; -1 when direct I/O is off.
 *   mem_align, off_align  what the direct descriptor requires of memory addresses, and of file
 *                         positions and lengths: powers of two, at most QM_MAX_PAGE.
 *   hook, hook_arg        optional. A write without a selection then copies every page to a bounce
 *                         buffer first, zero pages as zeros, so that the hook sees exactly the bytes
 *                         that the kernel gets, even if guest memory changes. qm_write_tail calls
 *                         the hook for single pages. */
struct qm_file {
    int fd;
    int fd_direct;
    uint32_t mem_align;
    uint32_t off_align;
    qm_write_hook hook;
    void *hook_arg;
};

/* Where a call failed: `at` is a byte of the block if `in_memory`, else a file position. `block` is
 * the number of the block, for calls that work on several. */
struct qm_fault {
    int in_memory;
    int64_t at;
    int64_t block;
};

/* ---- transfer ------------------------------------------------------------------------------- */

/* How pages whose bit is clear, and the gaps that they make between data pages, are treated.
 *   max_gap     bytes: gaps up to this length are moved along with the data around them, to have
 *               fewer and larger calls (0: none).
 * For writes:
 *   gap_share   percent: the gaps written in a chunk add up to at most this share of its data.
 *   everything  write every page, zero or not.
 *   mark_zero   with `everything`: a zero page counts as data and its bit is set. Otherwise the bit
 *               of a zero page is clear, even if the page is written.
 * For reads:
 *   zero_clear  clear pages are zeroed in guest memory (punched, if that is a file); otherwise they
 *               are left alone. */
struct qm_policy {
    uint64_t max_gap;
    uint32_t gap_share;
    int everything;
    int mark_zero;
    int zero_clear;
};

/* What stays the same for all calls of one pass over one block. Several channels can use it at
 * once. Fields that a function does not mention can be NULL.
 *   selection   the pages that belong to this pass; NULL: all.
 *   data        the pages that are in the file. */
struct qm_transfer {
    qm_job *job;
    const struct qm_file *file;
    const struct qm_block *block;
    const struct qm_memory *memory;
    const struct qm_policy *policy;
    const uint64_t *selection;
    uint64_t *data;
};

/* ---- scan ----------------------------------------------------------------------------------- */

/* Return 1 when all `len` bytes are zero. */
int qm_is_zero(const void *bytes, size_t len);

/* Set bit k of `bits` if page k of `bytes` contains a non-zero byte, else clear it; the unused bits
 * of the last word are cleared. Returns the number of bits set, or -EINVAL for an invalid page
 * size. */
int64_t qm_scan(const void *bytes, uint64_t npages, uint32_t page_size, uint64_t *bits);

/* Return the sum of all 64-bit words: the speed of plain reading, to compare the scan with. */
uint64_t qm_sum(const void *bytes, size_t len);

/* ---- find ----------------------------------------------------------------------------------- */

/* Find occurrences of a pattern that start in [from, to) and end within the `len` bytes, less than
 * 4 GiB. An occurrence that overlaps the one found before it does not count. Write the positions of
 * at most `most` to `found`, and to *next where to go on: `to` if there are no more. Returns how many
 * were found. */
int64_t qm_find(const void *bytes, size_t len, size_t from, size_t to, const void *pattern,
                size_t pattern_len, uint32_t *found, size_t most, size_t *next);

/* Find runs of printable characters (ASCII and tab) that start in [from, to): of at least `min`
 * characters, or of any number that touches the edges, less than `width` bytes from `from`, or `to`.
 * `width` is 1, or 2 for UTF-16, little-endian. A run ends at the first character that starts at `to`
 * or later. Write the start and the end of at most `most` to `found`, and to *next where to go on. A
 * run that is continued there has not ended. Returns how many were found. */
int64_t qm_strings(const void *bytes, size_t len, size_t from, size_t to, size_t min, size_t width,
                   uint32_t *found, size_t most, size_t *next);

/* ---- write ---------------------------------------------------------------------------------- */

/* Write those of the pages [first, first + npages) that are selected and not zero. In `data` their
 * bits are set, and the bits of selected zero pages are cleared. Bits outside the selection do not
 * change, even if their page is written to bridge a gap.
 *
 * With direct I/O the pages in the last, partial unit of the block are left to qm_write_tail, so
 * that no file block is ever written through both descriptors at once.
 *
 * Guest memory is written without a copy if address, position and length satisfy the descriptor,
 * else through a bounce buffer. */
int qm_write(const struct qm_transfer *transfer, qm_channel *channel, uint64_t first,
             uint64_t npages, struct qm_fault *fault);

/* Write, through the buffered descriptor, the pages that qm_write left out. Call it when every
 * qm_write of the block has returned. */
int qm_write_tail(const struct qm_transfer *transfer, qm_channel *channel, struct qm_fault *fault);

/* ---- read ----------------------------------------------------------------------------------- */

/* Read those of the pages [first, first + npages) whose bits in `data` are set into memory. A gap of
 * up to max_gap bytes is read along; its file bytes never reach guest memory. pages_offset need not
 * be aligned, and the file may end early. -ENODATA: a set page is beyond the end of the file.
 *
 * A direct read goes straight to memory in long pieces (huge pages, hugetlbfs), and through a bounce
 * buffer to scattered pages and to other files, which are written with pwrite. */
int qm_read(const struct qm_transfer *transfer, qm_channel *channel, uint64_t first,
            uint64_t npages, struct qm_fault *fault);

/* Make those of the pages [first, first + npages) whose bits in `data` are clear read as zeros in
 * the file, by punching holes where the file system supports it. Only extents of the file are read.
 * file->fd must be readable and have its own open file description; memory and policy are not used.
 * Returns how many pages were not zero, or -errno. */
int64_t qm_stale_punch(const struct qm_transfer *transfer, qm_channel *channel, uint64_t first,
                       uint64_t npages, struct qm_fault *fault);

/* Like qm_stale_punch, but do not change the file: set the bits of the pages found in `stale`. */
int64_t qm_find_stale(const struct qm_transfer *transfer, qm_channel *channel, uint64_t *stale,
                      uint64_t first, uint64_t npages, struct qm_fault *fault);

/* Zero every page of the block whose bit in `data` is clear, as qm_read does, and count these pages.
 * Uses neither file nor policy. */
int qm_zero_clear(const struct qm_transfer *transfer, struct qm_fault *fault);

/* Return the number of bits set among the first `npages`; *last is the highest of them, or -1. */
uint64_t qm_count(const uint64_t *bits, uint64_t npages, int64_t *last);

/* Return the end, at most `end`, of the run of equal bits that starts at `first`. */
uint64_t qm_run(const uint64_t *bits, uint64_t first, uint64_t end);

/* ---- page records --------------------------------------------------------------------------- */

/*
 * A section of the sequential stream is a sequence of records, one per page, each of which starts
 * with a word:
 *
 *   u64 offset | flags     big-endian: the offset of the page in its block, a multiple of page_size,
 *                          with flags in the low bits
 *   u8 length, name        of the block; absent with CONTINUE: the block of the previous record
 *   ZERO                   u8: the page is filled with this byte
 *   PAGE                   page_size bytes
 *   XBZRLE                 u8 1, u16 n, n bytes: a delta to the current content of the page
 *   EOS                    ends the section; no name, no offset
 */

/* The name of a block, not zero-terminated. */
struct qm_name {
    const unsigned char *bytes;
    uint8_t len;
};

/* Pages to be encoded, and how far that is.
 *   name, named   the block; the first record names it unless `named` is set, which is 1 from then
 *                 on.
 *   pages         the bytes of page 0, which is page `first` of the block; npages follow.
 *   want          the pages that get a record.
 *   data          of these, the pages that are not zero; a zero page is not read.
 *   next          the next page to look at; npages at the end. */
struct qm_encoding {
    const struct qm_name *name;
    int named;
    uint32_t page_size;
    const unsigned char *pages;
    uint64_t first;
    size_t npages;
    const uint64_t *want;
    const uint64_t *data;
    size_t next;
};

/* Encode records, as many as fit into the `len` bytes at `out`. Returns the number of bytes
 * written. */
size_t qm_encode(struct qm_encoding *encoding, unsigned char *out, size_t len);

/* A stream that is written front to back, through a buffer that is written out when it is full, in
 * writes of at least 1 MiB unless a rate limit requires smaller ones. */
typedef struct qm_encoder qm_encoder;

/* The first byte goes to position `at` of `fd`, which is borrowed; with fd < 0 bytes are only
 * counted. Returns NULL when out of memory. */
qm_encoder *qm_encoder_create(int fd, off_t at);
void qm_encoder_destroy(qm_encoder *encoder);
/* Treat `fd` as a pipe or socket from now on: it is written without positions, which only count
 * bytes. */
void qm_encoder_go_forward(qm_encoder *encoder);
/* Return the position of the next byte, behind everything appended, written out or not. */
off_t qm_encoder_position(const qm_encoder *encoder);
/* Make the next record name its block in any case. */
void qm_encoder_forget_block(qm_encoder *encoder);
/* Append bytes verbatim. */
int qm_encoder_put(qm_job *job, qm_encoder *encoder, const unsigned char *bytes, size_t len,
                   struct qm_fault *fault);
/* Write out what is buffered. */
int qm_encoder_flush(qm_job *job, qm_encoder *encoder, struct qm_fault *fault);

/* Append a record for each selected page of [first, first + npages), ZERO if the page is zero now.
 * Holes of memory that is a file are not read. `name` must stay at its address as long as the
 * encoder is used, since the encoder recognises the block by it. Uses neither file, data, policy
 * nor the block's pages_offset. */
int qm_encode_pages(const struct qm_transfer *transfer, qm_channel *channel, qm_encoder *encoder,
                    const struct qm_name *name, uint64_t first, uint64_t npages,
                    struct qm_fault *fault);

/* What a decoder does with the pages of a block.
 *   QM_SINK_NONE      check the records and drop them; `seen` is not used.
 *   QM_SINK_MEMORY    write the pages to `memory`.
 *   QM_SINK_INDEX     record in `index` where the pages are in the stream; `seen` is not used.
 *   QM_SINK_STAGING   put the pages into the current staging buffer, a part of the block at a time.
 *   QM_SINK_CONTENT   record in the bitmap `content` which pages are not zero. */
enum qm_sink {
    QM_SINK_NONE,
    QM_SINK_MEMORY,
    QM_SINK_INDEX,
    QM_SINK_STAGING,
    QM_SINK_CONTENT,
};

/* A block as a decoder sees it. `seen` gets the bit of every page that a record mentions. The field
 * that belongs to `sink` is set. */
struct qm_record_block {
    struct qm_name name;
    uint64_t len;
    uint64_t *seen;
    enum qm_sink sink;
    union {
        const struct qm_memory *memory;
        struct qm_index *index;
        uint64_t *content;
    };
};

/* A part of a block that is assembled in memory before it is written to the file: the bytes
 * [off, off + len) of the block, `off` a multiple of QM_CHUNK, `len` at most QM_STAGING_MAX.
 *   base      the bytes of the part.
 *   filled    the pages that records gave content.
 *   zeroed    the pages that records made zero, whatever is at `base`; disjoint from `filled`.
 *   data      the pages of the part that the file contains; before this part was staged, other
 *             pages were zero.
 *   fd, at    the file, and the position of the part in it. */
#define QM_STAGING_MAX ((size_t)16 << 20)
struct qm_staging {
    unsigned char *base;
    uint64_t *filled;
    uint64_t *zeroed;
    const uint64_t *data;
    uint64_t off;
    uint64_t len;
    int fd;
    off_t at;
};

/* What is wrong with a record. */
enum qm_record_fault {
    QM_RECORD_FLAGS = 1,  /* invalid flags in its word */
    QM_RECORD_COMPRESSED, /* a compressed page, written by QEMU up to 9.0 */
    QM_RECORD_NO_BLOCK,   /* CONTINUE, but no block was named before */
    QM_RECORD_UNKNOWN,    /* an unlisted block: `name` */
    QM_RECORD_OUTSIDE,    /* the page is outside its block */
    QM_RECORD_DELTA,      /* a malformed XBZRLE body, or one that does not fit the page */
    QM_RECORD_MULTIFD,    /* the flush marker of multifd, whose pages are in other streams */
    QM_RECORD_SCATTERED, /* pages too sparse for a real guest: the index would outgrow the stream */
    QM_RECORD_CHANGES,   /* more than QM_CHANGES_MAX changes to one page */
};

/* The record that made the decoder fail: `at` is the position of its word (in the file, or among
 * all bytes given to qm_decode), `block` the index of its block or -1. */
struct qm_record_error {
    int what;
    int64_t block;
    uint64_t word;
    uint64_t at;
    uint32_t name_len;
    unsigned char name[256];
};

/* A decoder of sections of records. It accepts bytes in slices of any size, and keeps one page and
 * the last block named between slices and sections. */
typedef struct qm_decoder qm_decoder;

/* The `nblocks` blocks are borrowed and must not move; their names differ and their lengths are
 * multiples of `page_size`. `fresh`: a delta to a page that no record mentioned before applies to
 * zeros, whatever the memory contains. Returns NULL when out of memory, or for an invalid page
 * size. */
qm_decoder *qm_decoder_create(const struct qm_record_block *blocks, size_t nblocks,
                              uint32_t page_size, int fresh);
void qm_decoder_destroy(qm_decoder *decoder);
/* Decode `len` bytes. Returns 1 at the end of a section, 0 when the section continues behind them,
 * 2 when the next page belongs to a part of a block that is not staged. *used is the number of
 * bytes consumed, less than `len` only at an end, a 2 or a failure. -EBADMSG: see
 * qm_decoder_error. Memory that is a file is written with pwrite and punched, never touched through
 * a mapping. Do not use the decoder after a failure. Counts records as pages, and bytes_done once
 * for each page. */
int qm_decode(qm_job *job, qm_decoder *decoder, const unsigned char *bytes, size_t len,
              size_t *used, struct qm_fault *fault);
/* Decode the file from *at to the end of the section and return 1; *at is then that end. Reads a
 * window of 1 MiB at a time, kept from call to call. -ENODATA: the file ends, or `end` comes,
 * before the section does. Returns 2 as qm_decode does. */
int qm_decode_file(qm_job *job, qm_decoder *decoder, int fd, off_t *at, off_t end,
                   struct qm_fault *fault);
void qm_decoder_error(const qm_decoder *decoder, struct qm_record_error *out);
/* Set the stream position of the next bytes given to qm_decode. */
void qm_decoder_seek(qm_decoder *decoder, uint64_t position);
/* After a 2: return the number of the block, and in *off the offset, of the next page. */
size_t qm_decoder_wants(const qm_decoder *decoder, uint64_t *off);
/* Stage a part of a block in place of the previous one; `filled` and `zeroed` are cleared. `staging`
 * is borrowed until the next one is set or the decoder is destroyed. */
void qm_decoder_set_staging(qm_decoder *decoder, size_t block, struct qm_staging *staging);

/* Write a staged part to its place in the file, as qm_write does; the transfer is that of the block,
 * its memory and selection are not used. The first time a part gets any data it is written by the
 * policy; later exactly the filled pages are written. Returns how many pages stopped being data,
 * whose old bytes are still in the file, or -errno. The bytes of other pages at `base` may
 * change. */
int64_t qm_write_staging(const struct qm_transfer *transfer, qm_channel *channel,
                         const struct qm_staging *staging, struct qm_fault *fault);

/* Apply the body of an XBZRLE record to a page. -EBADMSG: it is malformed, and the page may have
 * changed in part. */
int qm_apply_delta(const unsigned char *delta, size_t len, unsigned char *page, size_t page_size);

/* ---- pages of a snapshot as memory ---------------------------------------------------------- */

/*
 * The index of a block records where a sequential stream has each page: one word per page, 0 for a
 * page that no record mentions, else a kind from bit 62 up and a value below:
 *
 *   QM_PLACE_FILL     the page is filled with this byte
 *   QM_PLACE_PAGE     the file position of its page_size bytes
 *   QM_PLACE_CHANGED  the number of the last of the changes (XBZRLE) that, in order, make the page
 *                     from the content that `before` describes, which is a word as well
 *
 * It uses memory for mentioned pages only: 8 bytes a page, in nodes of 512 pages, and 24 bytes a
 * change. One thread makes it; then any number of threads can read it.
 */
enum qm_place { QM_PLACE_FILL = 1, QM_PLACE_PAGE = 2, QM_PLACE_CHANGED = 3 };
#define QM_CHANGES_MAX 1024 /* to one page since its last whole record */

struct qm_change {
    uint64_t before;
    uint64_t at; /* file position of the `len` bytes of an XBZRLE record */
    uint16_t len;
    uint32_t depth; /* length of the chain from here; never read from a file */
};

typedef struct qm_index qm_index;

/* Return NULL when out of memory, or for an invalid page size. */
qm_index *qm_index_create(uint64_t npages, uint32_t page_size);
void qm_index_destroy(qm_index *index);
/* Return the bytes of memory in use. */
uint64_t qm_index_bytes(const qm_index *index);

/* Record the place of a page. Returns 1 when the page was not mentioned before, 0 when it was;
 * -EINVAL outside the block, -ENOMEM, -EFBIG, -EMLINK after QM_CHANGES_MAX changes. */
int qm_index_fill_is(qm_index *index, uint64_t page, unsigned char fill);
int qm_index_page_at(qm_index *index, uint64_t page, uint64_t at);
int qm_index_changed(qm_index *index, uint64_t page, uint64_t at, uint16_t len);

/* Return the first mentioned page from `page` on, or the number of pages when there is none. */
uint64_t qm_index_next(const qm_index *index, uint64_t page);
/* Export and import the words of `npages` pages from `first` on (any page), and all changes.
 * Imported values are untrusted: -EBADMSG when one points outside a file of `end` bytes, or to a
 * change that does not exist. Import the changes first. */
int qm_index_get(const qm_index *index, uint64_t first, uint64_t npages, uint64_t *words);
int qm_index_put(qm_index *index, uint64_t first, uint64_t npages, const uint64_t *words,
                 uint64_t end);
uint64_t qm_index_changes(const qm_index *index, const struct qm_change **changes);
int qm_index_put_changes(qm_index *index, const struct qm_change *changes, uint64_t n,
                         uint64_t end);
/* Return the number of data pages: mentioned, and not filled with zeros. */
uint64_t qm_index_count(const qm_index *index);
/* Return the end, at most `end`, of the run of pages from `first` that are all data or all not;
 * *data is which. */
uint64_t qm_index_run(const qm_index *index, uint64_t first, uint64_t end, int *data);
/* Return the first page from `page` on whose content depends on bytes at file positions
 * [start, end), or the number of pages when there is none. */
uint64_t qm_index_from(const qm_index *index, uint64_t page, uint64_t start, uint64_t end);

/* A block of a sequential stream as memory: the argument of qm_indexed_fill, a qm_fill_fn for whole
 * pages, and of qm_indexed_next, a qm_next_fn. -ENODATA: the file ends; -EBADMSG: a malformed
 * change. */
struct qm_indexed {
    const qm_index *index;
    int fd;
};

ssize_t qm_indexed_fill(void *indexed, void *buf, uint64_t off, size_t len);
int64_t qm_indexed_next(void *indexed, uint64_t off, uint64_t end);

/* A block of a mapped-ram file as memory: pages whose bit in `data` is clear are zeros, whatever the
 * file contains there. */
struct qm_mapped {
    const uint64_t *data;
    uint64_t npages;
    off_t pages_offset;
    uint32_t page_size;
    int fd;
};

ssize_t qm_mapped_fill(void *mapped, void *buf, uint64_t off, size_t len);
int64_t qm_mapped_next(void *mapped, uint64_t off, uint64_t end);

/* A slice of other memory, whole pages from its byte `offset` on. */
struct qm_slice {
    qm_fill_fn fill;
    qm_next_fn next;
    void *arg;
    uint64_t offset;
};

ssize_t qm_slice_fill(void *slice, void *buf, uint64_t off, size_t len);
int64_t qm_slice_next(void *slice, uint64_t off, uint64_t end);

/* Memory in a buffer: `base` is its address. */
ssize_t qm_buffer_fill(void *base, void *buf, uint64_t off, size_t len);
int64_t qm_buffer_next(void *base, uint64_t off, uint64_t end);

/* Memory made of two: pages whose bit in `upper` is set come from the upper one, the others from
 * the lower one. Each is read at the same offsets, in whole pages. -ENODATA: one of them is too
 * short. */
struct qm_layered {
    const uint64_t *upper;
    uint64_t npages;
    uint32_t page_size;
    qm_fill_fn upper_fill;
    qm_next_fn upper_next;
    void *upper_arg;
    qm_fill_fn lower_fill;
    qm_next_fn lower_next;
    void *lower_arg;
};

ssize_t qm_layered_fill(void *layered, void *buf, uint64_t off, size_t len);
int64_t qm_layered_next(void *layered, uint64_t off, uint64_t end);

/* A memory source that searches what is read through it for a pattern: at multiples of `step`
 * bytes, `len` bytes that equal `head` where `mask` has bits set. `found` is the lowest offset found
 * so far; initialise it to UINT64_MAX. Several channels can read at once. A pattern is found only
 * if one read contains all of it: `len` is at most a page, `step` at least a page. */
struct qm_search {
    qm_fill_fn fill;
    qm_next_fn next;
    void *arg;
    const unsigned char *head;
    const unsigned char *mask;
    size_t len;
    uint64_t step;
    uint64_t found;
};

ssize_t qm_search_fill(void *search, void *buf, uint64_t off, size_t len);
int64_t qm_search_next(void *search, uint64_t off, uint64_t end);

/* ---- page digests --------------------------------------------------------------------------- */

/*
 * A table has QM_DIGEST bytes for each page of a block: the xxh3-128 of the page, big-endian, as the
 * xxHash library writes it. Two pages with one digest are taken for equal.
 */
#define QM_DIGEST ((size_t)16)

/* Enters into `table` the digests of the pages among [first, first + npages) that `selection` has
 * (NULL: all). `first` is a multiple of 64. Plain memory is digested where it is. Holes, and what
 * `next` passes over, are zero pages: they are not read, and mapped ones do not become resident. */
int qm_digest_pages(qm_job *job, qm_channel *channel, const struct qm_block *block,
                    const struct qm_memory *memory, const uint64_t *selection, unsigned char *table,
                    uint64_t first, uint64_t npages, struct qm_fault *fault);

/* Sets the bits in `changed` of those pages whose digest is not that of the table; leaves the other
 * bits alone. `update`: the table gets the new digests.
 *
 * While the memory changes, an update may enter the digest of content that was never copied. To copy
 * from a running guest, do not update: enter the digests of the copies (qm_digest_bytes). */
int qm_compare_pages(qm_job *job, qm_channel *channel, const struct qm_block *block,
                     const struct qm_memory *memory, const uint64_t *selection,
                     unsigned char *table, int update, uint64_t *changed, uint64_t first,
                     uint64_t npages, struct qm_fault *fault);

/* Puts the digests of `npages` pages at `bytes` at the start of `table`. -EINVAL for a bad page
 * size. */
int qm_digest_bytes(const void *bytes, uint64_t npages, uint32_t page_size, unsigned char *table);

/* Puts the digest of a zero page into all `npages` entries of `table`. -EINVAL for a bad page size. */
int qm_digest_zeros(uint64_t npages, uint32_t page_size, unsigned char *table);

/* The table of a block whose pages are written to a file. */
struct qm_digested_block {
    int64_t pages_offset;
    uint64_t len;
    uint32_t page_size;
    unsigned char *table;
};

/* The argument of qm_digest_written. Byte ranges of different blocks do not overlap in the file.
 *   next, next_arg   optional: another hook, which is called afterwards. */
struct qm_written_digests {
    const struct qm_digested_block *blocks;
    size_t nblocks;
    qm_write_hook next;
    void *next_arg;
};

/* A qm_write_hook that enters the digests of the pages as they are written; the entries of pages whose
 * bytes it does not get are cleared. It does not get pieces without data: their entries must be those
 * of zero pages before (qm_digest_zeros). */
int qm_digest_written(void *arg, int64_t at, const void *bytes, size_t len);

/* Copies of the pages of a block that differ from their digests.
 *   table    the digests; each entry becomes the digest of the copy.
 *   base     memory as long as the block, private to the caller: page k is copied to its offset.
 *   copied   the bits of copied pages are set.
 *   room     how many bytes may be copied, at most; shared by blocks and channels. When it is
 *            negative, pages that differ were left alone: neither their digest nor their bit is that
 *            of a copy. */
struct qm_copies {
    unsigned char *table;
    unsigned char *base;
    uint64_t *copied;
    int64_t *room;
};

/* Compares the pages as qm_compare_pages does, and copies those that differ. What is entered is the
 * digest of the copy, so the memory may change during it. Of the transfer it uses job, block, memory
 * and selection. */
int qm_copy_changed(const struct qm_transfer *transfer, qm_channel *channel,
                    const struct qm_copies *copies, uint64_t first, uint64_t npages,
                    struct qm_fault *fault);

/* The digest of `len` bytes, more than 240. `portable`: without vector instructions. */
int qm_xxh3_128(const void *bytes, size_t len, int portable, unsigned char *digest);

/* ---- comparison ----------------------------------------------------------------------------- */

/* Two memories that are compared page by page. Several channels can use it at once.
 *   memory     both have `fill`, and at least npages * page_size bytes.
 *   selection  the pages that are compared; NULL: all.
 *   differing  the bits of pages that differ are set; other bits do not change.
 *   zero       the differing pages that are zero in each memory are added to these. */
struct qm_comparison {
    qm_job *job;
    const struct qm_memory *memory[2];
    uint64_t npages;
    uint32_t page_size;
    const uint64_t *selection;
    uint64_t *differing;
    uint64_t zero[2];
};

/* Compare those of the pages [first, first + npages) that are selected; `first` is a multiple of 64.
 * Pages without data in both memories are equal, and not read. The job's bytes_moved are those read
 * of each memory. In `fault`, `block` is the number of the memory that cannot be read. */
int qm_compare_memories(struct qm_comparison *comparison, qm_channel *channel, uint64_t first,
                        uint64_t npages, struct qm_fault *fault);

/* ---- a map of pages ------------------------------------------------------------------------- */

/* The class of a page: QM_CLASS_ZERO, QM_CLASS_FILLED (one 64-bit word, not 0, again and again), or of
 * any other page its entropy in 1/256 bit a byte, 0 to 2048.
 *
 * The entropy is that of the frequencies of its bytes, estimated: QM_ENTROPY_SAMPLE bytes are counted,
 * of a page of 4 KiB one line of each eight, which rotates, so that every part of a structure is seen
 * that repeats every 512 bytes or less. That of a longer page is the mean over its pieces of 4 KiB. */
#define QM_ENTROPY_SAMPLE 512u
#define QM_CLASS_ZERO 0xffffu
#define QM_CLASS_FILLED 0xfffeu

/* Put the classes of `npages` pages at `bytes` into `classes`. -EINVAL for a bad page size. */
int qm_classify(const void *bytes, uint64_t npages, uint32_t page_size, uint16_t *classes);

/* What is in a cell of a map: numbers of pages, and the sum of the entropies of its data pages. A hole
 * is a page that is not stored, zero a stored page of zeros. */
struct qm_cell {
    uint64_t entropy;
    uint32_t data;
    uint32_t filled;
    uint32_t zero;
    uint32_t hole;
    uint32_t changed;
    uint32_t touched;
};

/* Entropies are counted in QM_LEVELS levels of QM_LEVEL / 256 bit. */
#define QM_LEVELS 16
#define QM_LEVEL 128

/* A part of a block on a map. Several channels can use it at once, and several parts can have cells in
 * common, one after the other.
 *   memory      has `fill`, and npages * page_size bytes. What `next` passes over is holes.
 *   lead        how many pages of the first cell are before the part, less than cell_pages.
 *   cell_pages  pages of a cell, at most UINT32_MAX.
 *   cells       `ncells`, enough for all pages; counts are added to them.
 *   levels      data pages by their entropy are added to these. */
struct qm_page_map {
    qm_job *job;
    const struct qm_memory *memory;
    uint64_t npages;
    uint32_t page_size;
    uint64_t lead;
    uint64_t cell_pages;
    struct qm_cell *cells;
    size_t ncells;
    uint64_t levels[16]; /* QM_LEVELS */
};

/* Count the pages [first, first + npages) in their cells. Holes are not read. */
int qm_map_pages(struct qm_page_map *map, qm_channel *channel, uint64_t first, uint64_t npages,
                 struct qm_fault *fault);

#define QM_CHANGED 1
#define QM_TOUCHED 2

/* Add those of the bits [from, from + map->npages) that are set to a field of the cells. One thread. */
int qm_map_bits(struct qm_page_map *map, const uint64_t *bits, uint64_t from, int field);

/* Put QM_SUMMARY bytes for each cell at `summaries`: whether it has pages; the shares of its pages
 * with data, filled and zero; the mean entropy of data in 1/32 bit; the shares of changed and of
 * touched pages; 0. A share is 0 to 255: 0 only if there are none, 255 only if all are. */
#define QM_SUMMARY 8
void qm_summarize_cells(const struct qm_cell *cells, size_t ncells, unsigned char *summaries);

/* ---- states of pages ------------------------------------------------------------------------ */

/* A block that a process has mapped, at `address`. `pagemap` is /proc/PID/pagemap of it; `has_scan`
 * as in struct qm_process. */
struct qm_mapped_block {
    int pagemap;
    int has_scan;
    uint64_t address;
    uint64_t len;
    uint32_t page_size;
};

/* For a private mapping of a file: sets the bits of the pages among [first, first + npages) of which
 * the process has a copy of its own, in memory or in swap; other bits are left alone. `first` is a
 * multiple of 64. Where pages of the machine are larger than those of the block, all that a copy
 * covers are set. Channels may share one bitmap. -ESRCH: the process is gone. */
int qm_find_changed(qm_job *job, const struct qm_mapped_block *block, uint64_t *bits,
                    uint64_t first, uint64_t npages);

/* The same for the pages that are in the page table of the process, its own or the file's. */
int qm_find_present(qm_job *job, const struct qm_mapped_block *block, uint64_t *bits,
                    uint64_t first, uint64_t npages);

/* Adds to `seen` the bits that it lacks and `now` has, and returns how many they are. `fresh` has
 * these and no others afterwards; it may be NULL. */
uint64_t qm_add_bits(uint64_t *seen, const uint64_t *now, uint64_t *fresh, uint64_t npages);

/* Puts the stretches of set bits among [first, end) into `runs`, two numbers each: first page, pages.
 * Stops after `max_runs`. Returns how many; *next is where to go on, `end` when all are there. */
uint64_t qm_list_runs(const uint64_t *bits, uint64_t first, uint64_t end, uint64_t *runs,
                      uint64_t max_runs, uint64_t *next);

/* ---- stash ---------------------------------------------------------------------------------- */

/* Pages of a block at one instant, at their offsets in the mapping `base` of this process, which is
 * as long as the block, private, anonymous and zero at first.
 *   memory    the block.
 *   process   the argument of qm_process_fill if the memory is that of another process, else NULL.
 *   changed   the same block as a private mapping of a file: qm_stash_copy finds its changed pages
 *             first, and adds them to `bits`. NULL: the pages of `bits` are copied.
 *   bits      the pages of the stash.
 *   next      the page up to which channels have taken the block: 0 before each pass. */
struct qm_stash {
    const struct qm_memory *memory;
    const struct qm_process *process;
    const struct qm_mapped_block *changed;
    unsigned char *base;
    uint64_t *bits;
    uint64_t npages;
    uint32_t page_size;
    uint64_t next;
};

/* Copy the pages. Each channel calls this once; it returns when the whole block is taken. What is a
 * hole, or what `memory->next` passes over, is left as zeros. -ESRCH: the process is gone. */
int qm_stash_copy(qm_job *job, struct qm_stash *stash, struct qm_fault *fault);

/* Make the pages of `bits` resident in the mapping, so that a later copy has no page faults. Before
 * the first copy only. Each channel calls this once. -ENOMEM. */
int qm_stash_populate(qm_job *job, struct qm_stash *stash);

/* ---- pages of a store ----------------------------------------------------------------------- */

/*
 * A store (docs/internals/store-format.md) keeps each page of QM_STORE_PAGE bytes once, whatever the
 * page size of the block. Its digest is keyed BLAKE3, of which QM_DIGEST bytes are kept. Known pages
 * have numbers: those of the packs, one pack after another, then those that are found to be new.
 */
#define QM_STORE_PAGE ((size_t)4096)
#define QM_STORE_KEY ((size_t)32)

#define QM_PAGE_ZERO 0
#define QM_PAGE_FILLED 1 /* repeats one 8-byte word */
#define QM_PAGE_DATA 2

/* Puts the digests of `npages` pages into `digests`. `portable`: without vector instructions that
 * not every processor of this architecture has. */
int qm_blake3_pages(const unsigned char *key, const void *bytes, uint64_t npages, int portable,
                    unsigned char *digests);

/* Finds the kinds of the `npages` pages at `bytes`, which are those at byte `off` of the block, and
 * the digests of data pages; a filled page has its word at the start of its digest. Pages of the block
 * whose bits are clear become zero in `bytes`; `bits` may be NULL. `off` is a multiple of
 * QM_STORE_PAGE. -EINVAL for a bad page size, and outside of the block. */
int qm_examine_pages(const unsigned char *key, const struct qm_block *block, const uint64_t *bits,
                     uint64_t off, unsigned char *bytes, uint64_t npages, unsigned char *kinds,
                     unsigned char *digests);

/* The known pages.
 *   digests   QM_DIGEST bytes for each number below `npages`; there is room for `room`.
 *   slots     a table of numbers + 1, zero where nothing is; `nslots` is a power of two, and twice
 *             as large as `npages` will be, or larger. */
struct qm_known {
    unsigned char *digests;
    uint64_t npages;
    uint64_t room;
    uint32_t *slots;
    uint64_t nslots;
};

/* Enters the pages [first, npages) into the slots: their digests are in place. Of equal digests the
 * first is found later. -ENOSPC: there are too few slots. */
int qm_known_index(struct qm_known *known, uint64_t first, uint64_t npages);

/* `npages` pages from page `first` of a file on, that are `number` and the following ones of the known
 * pages; or that all repeat the word `number`. */
struct qm_page_run {
    uint64_t first;
    uint64_t npages;
    uint64_t number;
};

/* What qm_find_pages found. All arrays have room for `room` elements, `fresh` for as many pages.
 *   runs      of known pages, in the order of the file
 *   fills     of filled pages
 *   fresh     the new pages, in order, which have the last numbers
 *   places    the file page of each new page */
struct qm_found {
    uint64_t room;
    struct qm_page_run *runs;
    uint64_t nruns;
    struct qm_page_run *fills;
    uint64_t nfills;
    unsigned char *fresh;
    uint64_t *places;
    uint64_t nfresh;
};

/* Looks up `npages` pages that qm_examine_pages has examined, from file page `page` on; those that
 * are not known yet become so. -ENOSPC: there are too few slots for so many new pages; -EINVAL: there
 * is too little room. Nothing is changed then. */
int qm_find_pages(struct qm_known *known, struct qm_found *found, const unsigned char *bytes,
                  uint64_t page, uint64_t npages, const unsigned char *kinds,
                  const unsigned char *digests);

/* Splits runs where their numbers pass from one group to the next: group g has the numbers
 * [starts[g], starts[g + 1]), and there are `nstarts` - 1 groups. The numbers of `parts` count from the
 * start of their group, which is in `groups`. Both may be NULL. Returns how many parts there are;
 * -EINVAL for a number of no group. */
int64_t qm_split_runs(const struct qm_page_run *runs, uint64_t nruns, const uint64_t *starts,
                      uint64_t nstarts, struct qm_page_run *parts, uint32_t *groups);

/* XORs `len` bytes with `other`. */
void qm_xor(void *bytes, const void *other, size_t len);

/* ---- post-copy ------------------------------------------------------------------------------ */

/*
 * The destination of a post-copy migration runs before its memory is there. It asks for pages over the
 * return path of its connection, and gets page records in short PARTs, each page once: QEMU fails on a
 * page that comes twice.
 */

/* A block whose pages are sent.
 *   name, name_len   not zero-terminated
 *   together         so many pages are one of the destination's memory, which is sent as a whole
 *   data             pages with data; the others are zeros
 *   pending          pages with data that have to be sent, `left` in number
 *   sent             pages that were sent. A page is marked before it is sent.
 *   total            is added to: pages that were sent, zero pages included
 *   fd, pages_offset a file with the pages, page 0 at pages_offset; -1: the caller reads them
 *   digests, checked NULL, or what pages of the file are compared with: the xxh3-128 of each unit of
 *                    4096 bytes of the file, and which MiB of it have theirs. pages_offset and
 *                    page_size are multiples of 4096 then, and the file is not shorter than the
 *                    block. */
struct qm_served_block {
    const unsigned char *name;
    uint8_t name_len;
    uint32_t page_size;
    uint32_t together;
    uint64_t npages;
    const uint64_t *data;
    uint64_t *pending;
    uint64_t *sent;
    uint64_t left;
    uint64_t total;
    int fd;
    int64_t pages_offset;
    const unsigned char *digests;
    const uint64_t *checked;
};

/* The source's side of one connection after another. One thread at a time uses it. */
typedef struct qm_postcopy qm_postcopy;

/* `blocks` are borrowed. `part_header` (5 bytes) and `part_end` (13 bytes) are around the records of a
 * PART. Returns NULL when out of memory. */
qm_postcopy *qm_postcopy_create(struct qm_served_block *blocks, size_t nblocks,
                                const unsigned char *part_header, const unsigned char *part_end);
void qm_postcopy_destroy(qm_postcopy *postcopy);

/* Forget the former connection, and what was to be sent over it. The socket is borrowed. */
void qm_postcopy_connect(qm_postcopy *postcopy, int socket);

/* Pages [first, first + npages) of block number `block`, whole pages of the destination, at `bytes`,
 * which stay valid until they are sent; NULL if none of them has data.
 *   since   0: nobody has asked for them; of these, pending pages are sent. Otherwise the time of the
 *           request (nanoseconds of CLOCK_MONOTONIC); all are sent that were not. */
struct qm_sent_pages {
    uint64_t block;
    uint64_t first;
    uint64_t npages;
    const void *bytes;
    int64_t since;
};

/* Have qm_postcopy_serve send pages. -EBUSY: pages of the same kind, requested or not, are being sent;
 * -EINVAL: no such pages. */
int qm_postcopy_send(qm_postcopy *postcopy, const struct qm_sent_pages *pages);

#define QM_REQUEST 1  /* a request that the caller has to answer */
#define QM_MESSAGE 2  /* bytes that the caller has to parse: qm_postcopy_received */
#define QM_ANSWERED 4 /* requested pages were sent: there is room for the next */
#define QM_PUSHED 8   /* other pages were sent */
#define QM_DUE 16     /* other pages should be sent now, and there are none */
#define QM_WOKEN_0 32 /* wake[0] is readable */
#define QM_WOKEN_1 64 /* wake[1] is readable */
#define QM_TIMEOUT 128
#define QM_EMPTY 256 /* a block has no more pending pages */

/* What qm_postcopy_serve has to do, and what it reports. Times are in nanoseconds.
 *   push      whether to return with QM_DUE
 *   raw       whether all that is received is for the caller: the start of it is incomplete
 *   all       whether all requests are for the caller, unless everything was sent
 *   waits     whether the caller has an answer for which there was no room: it also returns with
 *             QM_ANSWERED when an answer from here was sent
 *   quiet     how long no request must have come before pages are sent that nobody has asked for;
 *             0: always
 *   timeout   after this it returns; negative: never
 *   wake      descriptors, or -1
 *   events    why it returned: a set of QM_*
 *   block, first, npages, since   the request of QM_REQUEST
 *   requests, answers, answer_ns, longest_ns   are added to: requests, those that were answered here
 *             or by QM_ANSWERED, and how long these took, in total and at most */
struct qm_serving {
    int push;
    int raw;
    int all;
    int waits;
    int64_t quiet;
    int64_t timeout;
    int wake[2];
    int events;
    uint64_t block;
    uint64_t first;
    uint64_t npages;
    int64_t since;
    uint64_t requests;
    uint64_t answers;
    int64_t answer_ns;
    int64_t longest_ns;
};

/* Answer requests, and send pages in between, until something happens that the caller has to know.
 * Requests for pages that were sent need no answer; those for zero pages, and for pages of a file that
 * can be read and fit their digests, are answered here. Returns 0, or -errno when the connection has ended. */
int qm_postcopy_serve(qm_postcopy *postcopy, struct qm_serving *serving);

/* Return whether nothing is being sent: no record is cut off then. */
int qm_postcopy_idle(const qm_postcopy *postcopy);

/* Return whether a request is being answered, with the pages of the caller or from here: there is no
 * room for another answer then. */
int qm_postcopy_answering(const qm_postcopy *postcopy);

/* Take the bytes of QM_MESSAGE: at most `len`. Returns how many. */
size_t qm_postcopy_received(qm_postcopy *postcopy, unsigned char *out, size_t len);

/* Note that the caller has parsed a request for pages of a block, to which a later one may refer. */
void qm_postcopy_asked(qm_postcopy *postcopy, uint64_t block);

/* The number of the block that the latest request was for, here or by the caller; -1 before any. */
int64_t qm_postcopy_last_asked(const qm_postcopy *postcopy);

/* ---- direct I/O ----------------------------------------------------------------------------- */

/* Get from the kernel what direct I/O on the file requires of addresses and of positions.
 * -EOPNOTSUPP: the file system does not support it; -ENOSYS: the kernel does not report it. */
int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align);

/* Return whether direct writes to the file gain nothing: btrfs computes checksums, and by its version the
 * kernel makes them buffered, or stores a wrong checksum if the memory changes during the write. Files
 * with the attribute NOCOW have no checksums. */
int qm_buffers_direct_writes(int fd);

#endif
