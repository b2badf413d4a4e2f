/*
 * qmigrate: moves pages between guest memory and a mapped-ram file.
 *
 * Notions
 *   block    a contiguous piece of guest memory, `len` bytes, cut into pages of `page_size` bytes
 *            (a power of two, 1 KiB to 64 KiB). Page k stands at file position
 *            `pages_offset + k * page_size`, always.
 *   bitmap   one bit a page in native 64-bit words, bit k is word k/64, bit k%64.
 *   chunk    QM_CHUNK bytes of a block: the piece that is scanned, planned and moved at a time.
 *            Never less than 64 pages, so that two chunks share no bitmap word.
 *   run      consecutive pages of one chunk that one system call moves.
 *   unit     the file alignment that direct I/O demands (`off_align`).
 *   piece    QM_PIECE bytes of a block, from a multiple of QM_PIECE on: what has a digest.
 *   job      the atomics that all channels of one save or load share.
 *   channel  what one thread needs for itself: bounce buffers, and a queue of direct transfers that
 *            are under way while the next ones are prepared. None is when a function returns.
 *
 * Conventions
 *   Every function returns 0 or a count, or -errno; errno itself is never part of the contract.
 *   Sizes named `len` are bytes, those named `npages` are pages, file positions are off_t.
 *   Nothing here allocates by a number that comes from a file. No global state.
 *   EINTR and EAGAIN are retried; short reads and writes are continued.
 *   All functions that move pages poll the job before every chunk and every system call, that is
 *   at least every QM_CHUNK bytes, and return -ECANCELED once it is cancelled.
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

/* Running totals of a job. `bytes_done` counts guest bytes dealt with, moved or not (progress);
 * `data_pages` and `zero_pages` the pages dealt with, by kind; `bytes_moved` the bytes that
 * system calls moved to or from the file, gaps included; `calls` those system calls. */
struct qm_totals {
    uint64_t bytes_done;
    uint64_t data_pages;
    uint64_t zero_pages;
    uint64_t bytes_moved;
    uint64_t calls;
};

/* NULL when there is no memory. Destroy it only after the last call that uses it returned. */
qm_job *qm_job_create(void);
void qm_job_destroy(qm_job *job);
/* From any thread, any number of times. */
void qm_job_cancel(qm_job *job);
int qm_job_cancelled(const qm_job *job);
/* Limit bytes moved a second over all channels; 0 is no limit. May change while the job runs:
 * waiters are re-evaluated at the new rate. */
void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second);
void qm_job_totals(const qm_job *job, struct qm_totals *out);
/* Count bytes that system calls moved, and these calls; 0 calls for what is written elsewhere
 * (head,
 * bitmaps). */
void qm_job_count_io(qm_job *job, uint64_t len, uint64_t calls);
/* Count guest bytes, and pages of both kinds, that were dealt with elsewhere. */
void qm_job_count_pages(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages);

/* ---- channel -------------------------------------------------------------------------------- */

typedef struct qm_channel qm_channel;

/* Bounce buffers (QM_CHUNK plus room for rounding, aligned for any device, not inherited by fork)
 * are allocated when first needed. A channel serves one thread at a time. */
qm_channel *qm_channel_create(void);
void qm_channel_destroy(qm_channel *channel);

/* ---- memory --------------------------------------------------------------------------------- */

/* Fills `len` bytes at `buf` with guest memory from byte `off` of the block. Returns `len`, fewer
 * when the memory ends early, or -errno. Called from the channel's thread. */
typedef ssize_t (*qm_fill_fn)(void *arg, void *buf, uint64_t off, size_t len);
/* Next byte of the block at or after `off` that may be other than zero, at most `end`. */
typedef int64_t (*qm_next_fn)(void *arg, uint64_t off, uint64_t end);

/* Where the bytes of a block live. One of three:
 *   base, fd < 0     plain memory that stays mapped while we work.
 *   base and fd      a mapping of `fd`. On a save, fd cannot shrink; its holes are neither read nor
 *                    made resident (where a page may hold part of one, it is read with pread). On
 *                    a load, fd may shrink: only the kernel touches the mapping, and holes are made
 *                    by punching.
 *   fd, no base      a file that may shrink: read with pread, written with pwrite.
 * or a `fill` callback, for memory that has no address here (saves only), and with it perhaps
 * `next`, which knows where there is nothing to read; both get `fill_arg`.
 * Byte 0 of the block is base[0] and file position fd_offset. `fd` must be a description of our
 * own, since SEEK_DATA moves its position. */
struct qm_memory {
    unsigned char *base;
    int fd;
    off_t fd_offset;
    qm_fill_fn fill;
    void *fill_arg;
    qm_next_fn next;
};

/* Memory of another process: the argument of qm_process_fill and qm_process_next.
 *   pid, pidfd   the process, and a descriptor that tells when it is gone: its number may be
 *                somebody else's from then on.
 *   pagemap      /proc/PID/pagemap; only qm_process_next needs it, and only for a private,
 *                anonymous mapping, where a page that is not there is zero.
 *   has_scan     whether the kernel has PAGEMAP_SCAN (Linux 6.7).
 *   address      of byte 0 of the block, in that process. */
struct qm_process {
    int pid;
    int pidfd;
    int pagemap;
    int has_scan;
    uint64_t address;
};

/* A qm_fill_fn by process_vm_readv. -ESRCH: the process is gone; -EPERM: it may not be read. */
ssize_t qm_process_fill(void *process, void *buf, uint64_t off, size_t len);
/* A qm_next_fn that passes over pages never touched, and those known as the zero page; `off` where
 * that cannot be found out. */
int64_t qm_process_next(void *process, uint64_t off, uint64_t end);
/* 1 when the pagemap can be asked for ranges, 0 when it has to be read. */
int qm_process_can_scan(int pagemap);

/* For private, anonymous memory of this process: the first byte at or after `from`, below `end`,
 * both offsets in `memory`, of a page that was touched, or `end`; `from` where that cannot be found
 * out. Costs nothing for what was not touched, and touches nothing. `pagemap` is
 * /proc/self/pagemap, opened since the last fork; `has_scan` as in struct qm_process. */
uint64_t qm_next_touched(int pagemap, int has_scan, const void *memory, uint64_t from,
                         uint64_t end);

struct qm_block {
    uint64_t len;
    off_t pages_offset;
    uint32_t page_size;
};

/* Called by qm_write before each write: the `len` bytes from file position `at` on are a piece (the
 * last of a block may be shorter) that has pages to be written. Where there were only holes before,
 * they will be those at `bytes`, which stay until the hook returns; NULL if that is not known,
 * because
 * only selected pages are written. Called from the channel's thread. Returns 0, or -errno to end
 * the
 * work. */
typedef int (*qm_write_hook)(void *arg, int64_t at, const void *bytes, size_t len);

/* The file. `fd` is buffered; `fd_direct` has O_DIRECT and is -1 where direct I/O is off.
 * mem_align and off_align are what the direct descriptor demands of memory addresses, and of file
 * positions and lengths: powers of two, at most QM_MAX_PAGE.
 * `hook`, where there is one, gets hook_arg. A write without a selection then copies every page
 * first,
 * zero pages as zeros, so that the hook sees what the kernel gets, whatever becomes of guest
 * memory. It
 * is not called for what qm_write_tail writes. */
struct qm_file {
    int fd;
    int fd_direct;
    uint32_t mem_align;
    uint32_t off_align;
    qm_write_hook hook;
    void *hook_arg;
};

/* Where a call failed: `at` is the file position (target) or the byte of the block (memory).
 * `block` is which one, for calls that work on several. */
struct qm_fault {
    int in_memory;
    int64_t at;
    int64_t block;
};

/* ---- scan ----------------------------------------------------------------------------------- */

/* 1 when all `len` bytes (a multiple of 64) are zero. */
int qm_is_zero(const void *bytes, size_t len);

/* Sets bit k of `bits` when page k of `bytes` has a byte that is not zero, clears it otherwise;
 * the unused bits of the last word are cleared. Returns how many were set, or -EINVAL for a
 * page size that is none. */
int64_t qm_scan(const void *bytes, uint64_t npages, uint32_t page_size, uint64_t *bits);

/* Sum of all 64-bit words: how fast this machine can read memory, to hold the scan against. */
uint64_t qm_sum(const void *bytes, size_t len);

/* ---- write ---------------------------------------------------------------------------------- */

/* Which zero pages may be written along with data, to have fewer and larger writes.
 *   max_gap     bytes: no longer gap is bridged (0: none).
 *   gap_share   percent: the gaps bridged in a chunk hold at most this share of its data bytes.
 *   everything  every page is written, whatever it holds.
 *   mark_zero   together with everything: a zero page counts as data, and its bit is set.
 * Otherwise the bit of a zero page stays clear, written or not. */
struct qm_sparse {
    uint64_t max_gap;
    uint32_t gap_share;
    int everything;
    int mark_zero;
};

/* Writes the pages [first, first + npages) of a block: those that `selection` has (NULL: all) and
 * that are not zero. In `data` their bits are set and those of selected zero pages are cleared;
 * bits outside the selection are left alone, even where their page is written to bridge a gap.
 *
 * `first` is a multiple of 64 and of QM_CHUNK / page_size; selection and data are bitmaps of the
 * whole block. With direct I/O the pages in the last, partial unit of the block are left out:
 * qm_write_tail does them, when every direct write of the block has returned, so that no file
 * block is ever written through both descriptors at once. With file->fd < 0 nothing is written:
 * pages are only counted.
 *
 * Straight from guest memory where address, position and length satisfy the descriptor,
 * through the bounce buffer otherwise. */
int qm_write(qm_job *job, qm_channel *channel, const struct qm_file *file,
             const struct qm_block *block, const struct qm_memory *memory,
             const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
             uint64_t first, uint64_t npages, struct qm_fault *fault);

/* Writes, through the buffered descriptor, the pages that qm_write left out. */
int qm_write_tail(qm_job *job, qm_channel *channel, const struct qm_file *file,
                  const struct qm_block *block, const struct qm_memory *memory,
                  const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
                  struct qm_fault *fault);

/* ---- read ----------------------------------------------------------------------------------- */

/* Reads the set pages among [first, first + npages) into memory. Reads may go over clear pages
 * (at most `max_gap` bytes at a time), whose file bytes never reach guest memory. Clear pages are
 * zeroed (punched, where the memory is a file) when `zero_clear`, left alone otherwise.
 * pages_offset need not be aligned; the file may end early. A set page beyond the end of the
 * file is -ENODATA. `first` as in qm_write. */
int qm_read(qm_job *job, qm_channel *channel, const struct qm_file *file,
            const struct qm_block *block, const struct qm_memory *memory, const uint64_t *data,
            uint64_t max_gap, int zero_clear, uint64_t first, uint64_t npages,
            struct qm_fault *fault);

/* Makes the clear pages among [first, first + npages) read as zeros in the file, by punching holes
 * where the file system can. Only what the file holds there is read. file->fd must be readable,
 * and a description of our own. Returns how many pages were not zero, or -errno. */
int64_t qm_stale_punch(qm_job *job, qm_channel *channel, const struct qm_file *file,
                       const struct qm_block *block, const uint64_t *data, uint64_t first,
                       uint64_t npages, struct qm_fault *fault);

/* The same search, changing nothing: the bits of the pages found are set in `stale`, a bitmap of
 * the whole block. `first` as in qm_write. */
int64_t qm_find_stale(qm_job *job, qm_channel *channel, const struct qm_file *file,
                      const struct qm_block *block, const uint64_t *data, uint64_t *stale,
                      uint64_t first, uint64_t npages, struct qm_fault *fault);

/* Number of set bits among the first `npages`; the highest of them goes to *last (-1: none). */
uint64_t qm_count(const uint64_t *bits, uint64_t npages, int64_t *last);

/* Zeroes every page of a block whose bit in `bits` is clear, as qm_read does; polls the job and
 * counts these pages in it. */
int qm_zero_clear(qm_job *job, const struct qm_block *block, const struct qm_memory *memory,
                  const uint64_t *bits, struct qm_fault *fault);

/* ---- page records --------------------------------------------------------------------------- */

/*
 * A section of the sequential stream is a sequence of records, one a page, ended by a word:
 *
 *   u64 offset | flags     big-endian; the offset of the page in its block, a multiple of
 * page_size,
 *                          flags below it
 *   u8 length, name        of the block; left out with CONTINUE: that of the record before
 *   ZERO                   u8: the page is full of this byte
 *   PAGE                   page_size bytes
 *   XBZRLE                 u8 1, u16 n, n bytes: changes to the page's content so far
 *   EOS                    ends the section; no name, no offset
 */

/* A block's name, not ended by a zero byte. */
struct qm_name {
    const unsigned char *bytes;
    uint8_t len;
};

/* Encodes a record for each page k in [from, npages) that `want` has: PAGE with the page_size bytes
 * at pages + k * page_size where `data` has it too, ZERO otherwise (that page is not read). Bit k
 * stands for page `first + k` of the block. The block is named in the first record unless *named,
 * which is 1 afterwards. Stops before a record that does not fit into the `len` bytes at `out`;
 * *next is the page to go on from, npages at the end. Returns how many bytes it wrote. */
size_t qm_encode(const struct qm_name *name, int *named, const unsigned char *pages, uint64_t first,
                 size_t from, size_t npages, uint32_t page_size, const uint64_t *want,
                 const uint64_t *data, unsigned char *out, size_t len, size_t *next);

/* A stream being written front to back: a buffer that is written out when it is full, in pieces
 * of at least 1 MiB where no rate limit asks for smaller ones. */
typedef struct qm_encoder qm_encoder;

/* The first byte goes to position `at` of `fd`, which stays the caller's; with fd < 0 bytes are
 * only counted. NULL when there is no memory. */
qm_encoder *qm_encoder_create(int fd, off_t at);
void qm_encoder_destroy(qm_encoder *encoder);
/* From now on `fd` is a pipe or socket: bytes are written in turn, and positions only count
 * them. */
void qm_encoder_go_forward(qm_encoder *encoder);
/* Where the next byte goes: after all that was put, written out or not. */
off_t qm_encoder_position(const qm_encoder *encoder);
/* The next record names its block, whichever it is. */
void qm_encoder_forget_block(qm_encoder *encoder);
/* Appends bytes as they are; any number. */
int qm_encoder_put(qm_job *job, qm_encoder *encoder, const unsigned char *bytes, size_t len,
                   struct qm_fault *fault);
/* Writes out what is buffered. */
int qm_encoder_flush(qm_job *job, qm_encoder *encoder, struct qm_fault *fault);

/* Appends a record for each page of [first, first + npages) that `selection` has (NULL: all),
 * ZERO where the page is zero now. Holes of memory that is a file are not read. `name` stays where
 * it is as long as the encoder is used: by its address the encoder knows the block again. `first`
 * as in qm_write; of the block, pages_offset has no meaning here. */
int qm_encode_pages(qm_job *job, qm_channel *channel, qm_encoder *encoder,
                    const struct qm_name *name, const struct qm_block *block,
                    const struct qm_memory *memory, const uint64_t *selection, uint64_t first,
                    uint64_t npages, struct qm_fault *fault);

/* A block as a decoder knows it. `seen` gets the bit of every page that a record mentions. Of a
 * block with an `index`, the places of pages are noted there, and nothing else is done. One that is
 * `staged` has its pages put on a stage, a part of the block at a time. Of one with `content`, all
 * that is noted is which pages hold something: their bits there are set. Records of a block with
 * none
 * of these are checked and dropped; it needs no `seen`. */
struct qm_record_block {
    struct qm_name name;
    uint64_t len;
    const struct qm_memory *memory;
    uint64_t *seen;
    struct qm_index *index;
    int staged;
    uint64_t *content;
};

/* A part of a block, held in memory until it is written to its place in a file: the bytes
 * [off, off + len) of the block, `off` a multiple of QM_CHUNK, `len` at most QM_STAGING_MAX. Of its
 * pages, bits of `filled` mark those that records gave content since it is on the stage, which
 * stands at `base`; `zeroed` those that they made zero, whatever stands at `base`; no page is in
 * both. What a page was before, the file has, at position `at` of `fd` on, if its bit in `data` is
 * set; else it was zero. */
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
    QM_RECORD_FLAGS = 1,  /* the flags of its word are none that a file can have */
    QM_RECORD_COMPRESSED, /* a compressed page, as written until QEMU 9.0 */
    QM_RECORD_NO_BLOCK,   /* CONTINUE, and no block was named before */
    QM_RECORD_UNKNOWN,    /* a block that is not among those given: `name` */
    QM_RECORD_OUTSIDE,    /* the page lies outside its block */
    QM_RECORD_DELTA,      /* an XBZRLE body that does not fit its page or itself */
    QM_RECORD_MULTIFD,    /* the mark of multifd, whose pages are in other streams */
    QM_RECORD_SCATTERED, /* an index, or bitmaps, would outgrow the stream: no guest is like that */
    QM_RECORD_CHANGES,   /* more than QM_CHANGES_MAX changes to a page */
};

/* The last record that was refused: `at` is the position of its word (in the file, or among all
 * bytes given to qm_decode), `block` its block's index or -1. */
struct qm_record_error {
    int what;
    int64_t block;
    uint64_t word;
    uint64_t at;
    uint32_t name_len;
    unsigned char name[256];
};

/* Takes sections of records apart, from bytes that come in slices of any size. It keeps one page,
 * and the last block named, between slices and between sections. */
typedef struct qm_decoder qm_decoder;

/* The `nblocks` blocks stay the caller's, and where they are; their names differ, their lengths
 * are multiples of `page_size`. `fresh`: a change to a page that was not mentioned before applies
 * to zeros, whatever the memory holds. NULL when there is no memory, or for a bad page size. */
qm_decoder *qm_decoder_create(const struct qm_record_block *blocks, size_t nblocks,
                              uint32_t page_size, int fresh);
void qm_decoder_destroy(qm_decoder *decoder);
/* Decodes `len` bytes into memory. Returns 1 at the end of a section, 0 when it goes on after
 * them, 2 when the next page belongs to a part of a staged block that is not on the stage; *used
 * is how many were taken, less than `len` only at an end, a 2 or a failure. -EBADMSG:
 * qm_decoder_error tells what is wrong. Memory that is a file is written with pwrite and punched,
 * never touched through a mapping. After a failure the decoder is of no more use. Counts records
 * as pages, and bytes_done once for each page. */
int qm_decode(qm_job *job, qm_decoder *decoder, const unsigned char *bytes, size_t len,
              size_t *used, struct qm_fault *fault);
/* Decodes the file from *at to the end of the section, where *at is afterwards; returns 1. Reads a
 * window of 1 MiB at a time, kept from call to call. -ENODATA: the file ends, or `end` comes,
 * before the section does. 2 as in qm_decode. */
int qm_decode_file(qm_job *job, qm_decoder *decoder, int fd, off_t *at, off_t end,
                   struct qm_fault *fault);
void qm_decoder_error(const qm_decoder *decoder, struct qm_record_error *out);
/* Where in the stream the next bytes given to qm_decode stand. */
void qm_decoder_seek(qm_decoder *decoder, uint64_t position);
/* After a 2: the number of the block, and the offset in it, of the page that is to be put. */
size_t qm_decoder_wants(const qm_decoder *decoder, uint64_t *off);
/* Puts a part of a block on the stage, in the place of another one; `filled` and `zeroed` become
 * empty. It stays the caller's, and there until the next one is put or the decoder destroyed. */
void qm_decoder_set_staging(qm_decoder *decoder, size_t block, struct qm_staging *stage);

/* Writes what is on a stage to its place in the file of the block, whose bitmap is `data`: pages as
 * qm_write does. The first time that a part gets any data, all of it is written as `sparse` says;
 * later exactly the pages that are filled. Returns how many pages have ceased to be data, whose old
 * bytes are still in the file; -errno. What is at `base` of other pages may change. */
int64_t qm_write_staging(qm_job *job, qm_channel *channel, const struct qm_file *file,
                         const struct qm_block *block, const struct qm_staging *stage,
                         const struct qm_sparse *sparse, uint64_t *data, struct qm_fault *fault);

/* Applies the body of an XBZRLE record to a page; -EBADMSG when it is malformed, the page then
 * being changed in part. */
int qm_apply_delta(const unsigned char *delta, size_t len, unsigned char *page, size_t page_size);

/* ---- pages of a snapshot as memory ---------------------------------------------------------- */

/*
 * The index of a block tells of every page where a sequential stream has it: a word a page, 0 for one
 * that no record mentions, else a kind above bit 62 and a value below:
 *
 *   QM_PLACE_FILL     the page is full of this byte
 *   QM_PLACE_PAGE     file position of its page_size bytes
 *   QM_PLACE_CHANGED  number of the last of the changes (XBZRLE) that make the page, in order,
 *                     of what `before` tells, which is a word as well
 *
 * It takes memory for what is mentioned: 8 bytes a page, in pieces of 512 pages, and 24 bytes a
 * change. Made by one thread, it may then be read by many.
 */
enum qm_place { QM_PLACE_FILL = 1, QM_PLACE_PAGE = 2, QM_PLACE_CHANGED = 3 };
#define QM_CHANGES_MAX 1024 /* of one page, since it was last there as a whole */

struct qm_change {
    uint64_t before;
    uint64_t at; /* file position of the `len` bytes of an XBZRLE record */
    uint16_t len;
    uint32_t depth; /* changes from here down; not taken from outside */
};

typedef struct qm_index qm_index;

/* NULL when there is no memory, or for a bad page size. */
qm_index *qm_index_create(uint64_t npages, uint32_t page_size);
void qm_index_destroy(qm_index *index);
/* Bytes of memory that it has taken. */
uint64_t qm_index_bytes(const qm_index *index);

/* Note what a record says of a page. 1 when the page was not mentioned before, 0 when it was;
 * -EINVAL outside the block, -ENOMEM, -EFBIG, -EMLINK after QM_CHANGES_MAX changes. */
int qm_index_fill_is(qm_index *index, uint64_t page, unsigned char fill);
int qm_index_page_at(qm_index *index, uint64_t page, uint64_t at);
int qm_index_changed(qm_index *index, uint64_t page, uint64_t at, uint16_t len);

/* The first page from `page` on that is mentioned; the number of all pages where none is. */
uint64_t qm_index_next(const qm_index *index, uint64_t page);
/* Words of `npages` pages from `first` on, and all changes, out of the index; and into it. What is
 * put in may come from anywhere: -EBADMSG where it points outside a file of `end` bytes, or at
 * changes that are not there. Put in changes first. */
int qm_index_get(const qm_index *index, uint64_t first, uint64_t npages, uint64_t *words);
int qm_index_put(qm_index *index, uint64_t first, uint64_t npages, const uint64_t *words,
                 uint64_t end);
uint64_t qm_index_changes(const qm_index *index, const struct qm_change **changes);
int qm_index_put_changes(qm_index *index, const struct qm_change *changes, uint64_t n,
                         uint64_t end);
/* Pages that hold something: not those unmentioned or full of zeros. */
uint64_t qm_index_count(const qm_index *index);
/* Where the pages from `first` on cease to be alike in that; at most `end`. */
uint64_t qm_index_run(const qm_index *index, uint64_t first, uint64_t end, int *data);
/* The first page from `page` on whose content, or part of it, is made of bytes at file positions
 * [start, end); the number of all pages where none is. */
uint64_t qm_index_from(const qm_index *index, uint64_t page, uint64_t start, uint64_t end);

/* A block of a sequential stream: the argument of qm_indexed_fill and qm_indexed_next, a qm_fill_fn
 * (whole pages only) and a qm_next_fn. -ENODATA: the file ends; -EBADMSG: a change does not fit. */
struct qm_indexed {
    const qm_index *index;
    int fd;
};

ssize_t qm_indexed_fill(void *indexed, void *buf, uint64_t off, size_t len);
int64_t qm_indexed_next(void *indexed, uint64_t off, uint64_t end);

/* The same for a block of a mapped-ram file: pages whose bit in `data` is clear are zeros, whatever
 * the file has there. */
struct qm_mapped {
    const uint64_t *data;
    uint64_t npages;
    off_t pages_offset;
    uint32_t page_size;
    int fd;
};

ssize_t qm_mapped_fill(void *mapped, void *buf, uint64_t off, size_t len);
int64_t qm_mapped_next(void *mapped, uint64_t off, uint64_t end);

/* Memory that is a part of another one: its byte 0 is byte `offset` there, whole pages. */
struct qm_slice {
    qm_fill_fn fill;
    qm_next_fn next;
    void *arg;
    uint64_t offset;
};

ssize_t qm_slice_fill(void *part, void *buf, uint64_t off, size_t len);
int64_t qm_slice_next(void *part, uint64_t off, uint64_t end);

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

/* Memory that is another one, and in which something is looked for in passing: at multiples of
 * `step` bytes, the `len` bytes that are `head` where `mask` has bits. `found` is the lowest place
 * so
 * far; UINT64_MAX at first. Several channels may read it at once. What is not read is not seen, nor
 * what does not stand within one read: `len` is at most a page, `step` not less than one. */
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

ssize_t qm_search_fill(void *watch, void *buf, uint64_t off, size_t len);
int64_t qm_search_next(void *watch, uint64_t off, uint64_t end);

/* Where the bits from `first` on cease to be alike; at most `end`. */
uint64_t qm_run(const uint64_t *bits, uint64_t first, uint64_t end);

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

/* The digest of `len` bytes, more than 240. `portable`: without vector instructions. */
int qm_xxh3_128(const void *bytes, size_t len, int portable, unsigned char *digest);

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

/* ---- direct I/O ----------------------------------------------------------------------------- */

/* What direct I/O on the file demands of addresses and of positions, as the kernel tells it.
 * -EOPNOTSUPP: this file system does none; -ENOSYS: the kernel cannot tell. */
int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align);

#endif
