/* What Python binds of qmigrate.h, where every function is explained. */

#define QM_CHUNK ...
#define QM_PIECE ...
#define QM_MIN_PAGE ...
#define QM_MAX_PAGE ...
#define QM_CHANGES_MAX ...
#define QM_STAGE_MAX ...

typedef struct qm_job qm_job;
typedef struct qm_channel qm_channel;

struct qm_totals {
    uint64_t bytes_done;
    uint64_t data_pages;
    uint64_t zero_pages;
    uint64_t bytes_moved;
    uint64_t calls;
};

qm_job *qm_job_create(void);
void qm_job_destroy(qm_job *job);
void qm_job_cancel(qm_job *job);
int qm_job_cancelled(const qm_job *job);
void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second);
void qm_job_totals(const qm_job *job, struct qm_totals *out);
void qm_job_add_moved(qm_job *job, uint64_t len);
void qm_job_did(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages);

qm_channel *qm_channel_create(void);
void qm_channel_destroy(qm_channel *channel);

typedef ssize_t (*qm_fill_fn)(void *arg, void *buf, uint64_t off, size_t len);
typedef int64_t (*qm_next_fn)(void *arg, uint64_t off, uint64_t end);

struct qm_memory {
    unsigned char *base;
    int fd;
    int64_t fd_offset;
    qm_fill_fn fill;
    void *fill_arg;
    qm_next_fn next;
};

struct qm_process {
    int pid;
    int pidfd;
    int pagemap;
    int has_scan;
    uint64_t address;
};

ssize_t qm_process_fill(void *process, void *buf, uint64_t off, size_t len);
int64_t qm_process_next(void *process, uint64_t off, uint64_t end);
int qm_process_can_scan(int pagemap);
uint64_t qm_next_touched(int pagemap, int has_scan, const void *memory, uint64_t from,
                         uint64_t end);

struct qm_block {
    uint64_t len;
    int64_t pages_offset;
    uint32_t page_size;
};

typedef int (*qm_writing_fn)(void *arg, int64_t at, const void *bytes, size_t len);

struct qm_file {
    int fd;
    int fd_direct;
    uint32_t mem_align;
    uint32_t off_align;
    qm_writing_fn writing;
    void *writing_arg;
};

extern "Python" int qm_note_writing(void *arg, int64_t at, const void *bytes, size_t len);

struct qm_fault {
    int in_memory;
    int64_t at;
    int64_t block;
};

struct qm_sparse {
    uint64_t max_gap;
    uint32_t gap_share;
    int everything;
    int mark_zero;
};

int qm_is_zero(const void *bytes, size_t len);
int64_t qm_scan(const void *bytes, uint64_t npages, uint32_t page_size, uint64_t *bits);
uint64_t qm_sum(const void *bytes, size_t len);
uint64_t qm_count(const uint64_t *bits, uint64_t npages, int64_t *last);

int qm_write(qm_job *job, qm_channel *channel, const struct qm_file *file,
             const struct qm_block *block, const struct qm_memory *memory,
             const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
             uint64_t first, uint64_t npages, struct qm_fault *fault);
int qm_write_tail(qm_job *job, qm_channel *channel, const struct qm_file *file,
                  const struct qm_block *block, const struct qm_memory *memory,
                  const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
                  struct qm_fault *fault);
int qm_read(qm_job *job, qm_channel *channel, const struct qm_file *file,
            const struct qm_block *block, const struct qm_memory *memory, const uint64_t *data,
            uint64_t max_gap, int zero_clear, uint64_t first, uint64_t npages,
            struct qm_fault *fault);
int64_t qm_clean(qm_job *job, qm_channel *channel, const struct qm_file *file,
                 const struct qm_block *block, const uint64_t *data, uint64_t first,
                 uint64_t npages, struct qm_fault *fault);

int64_t qm_find_stale(qm_job *job, qm_channel *channel, const struct qm_file *file,
                      const struct qm_block *block, const uint64_t *data, uint64_t *stale,
                      uint64_t first, uint64_t npages, struct qm_fault *fault);
int qm_zero_clear(qm_job *job, const struct qm_block *block, const struct qm_memory *memory,
                  const uint64_t *bits, struct qm_fault *fault);

struct qm_name {
    const unsigned char *bytes;
    uint8_t len;
};

typedef struct qm_encoder qm_encoder;

size_t qm_encode(const struct qm_name *name, int *named, const unsigned char *pages,
                 uint64_t first, size_t from, size_t npages, uint32_t page_size,
                 const uint64_t *want, const uint64_t *data, unsigned char *out, size_t len,
                 size_t *next);
qm_encoder *qm_encoder_create(int fd, int64_t at);
void qm_encoder_destroy(qm_encoder *encoder);
void qm_encoder_go_forward(qm_encoder *encoder);
int64_t qm_encoder_position(const qm_encoder *encoder);
void qm_encoder_forget_block(qm_encoder *encoder);
int qm_encoder_put(qm_job *job, qm_encoder *encoder, const unsigned char *bytes, size_t len,
                   struct qm_fault *fault);
int qm_encoder_flush(qm_job *job, qm_encoder *encoder, struct qm_fault *fault);
int qm_encode_pages(qm_job *job, qm_channel *channel, qm_encoder *encoder,
                    const struct qm_name *name, const struct qm_block *block,
                    const struct qm_memory *memory, const uint64_t *selection, uint64_t first,
                    uint64_t npages, struct qm_fault *fault);

struct qm_record_block {
    struct qm_name name;
    uint64_t len;
    const struct qm_memory *memory;
    uint64_t *seen;
    struct qm_index *index;
    int staged;
    uint64_t *content;
};

struct qm_stage {
    unsigned char *base;
    uint64_t *filled;
    uint64_t *zeroed;
    const uint64_t *data;
    uint64_t off;
    uint64_t len;
    int fd;
    int64_t at;
};

enum qm_record_fault {
    QM_RECORD_FLAGS,
    QM_RECORD_COMPRESSED,
    QM_RECORD_NO_BLOCK,
    QM_RECORD_UNKNOWN,
    QM_RECORD_OUTSIDE,
    QM_RECORD_DELTA,
    QM_RECORD_MULTIFD,
    QM_RECORD_SCATTERED,
    QM_RECORD_CHANGES,
    ...
};

struct qm_record_error {
    int what;
    int64_t block;
    uint64_t word;
    uint64_t at;
    uint32_t name_len;
    unsigned char name[256];
};

typedef struct qm_decoder qm_decoder;

qm_decoder *qm_decoder_create(const struct qm_record_block *blocks, size_t nblocks,
                              uint32_t page_size, int fresh);
void qm_decoder_destroy(qm_decoder *decoder);
int qm_decode(qm_job *job, qm_decoder *decoder, const unsigned char *bytes, size_t len,
              size_t *used, struct qm_fault *fault);
int qm_decode_file(qm_job *job, qm_decoder *decoder, int fd, int64_t *at, int64_t end,
                   struct qm_fault *fault);
void qm_decoder_error(const qm_decoder *decoder, struct qm_record_error *out);
void qm_decoder_seek(qm_decoder *decoder, uint64_t position);
size_t qm_decoder_wants(const qm_decoder *decoder, uint64_t *off);
void qm_decoder_set_stage(qm_decoder *decoder, size_t block, struct qm_stage *stage);
int64_t qm_write_stage(qm_job *job, qm_channel *channel, const struct qm_file *file,
                       const struct qm_block *block, const struct qm_stage *stage,
                       const struct qm_sparse *sparse, uint64_t *data, struct qm_fault *fault);
int qm_apply_delta(const unsigned char *delta, size_t len, unsigned char *page, size_t page_size);

struct qm_change {
    uint64_t before;
    uint64_t at;
    uint16_t len;
    uint32_t depth;
};

typedef struct qm_index qm_index;

qm_index *qm_index_create(uint64_t npages, uint32_t page_size);
void qm_index_destroy(qm_index *index);
uint64_t qm_index_bytes(const qm_index *index);
int qm_index_fill_is(qm_index *index, uint64_t page, unsigned char fill);
int qm_index_page_at(qm_index *index, uint64_t page, uint64_t at);
int qm_index_changed(qm_index *index, uint64_t page, uint64_t at, uint16_t len);
uint64_t qm_index_next(const qm_index *index, uint64_t page);
int qm_index_get(const qm_index *index, uint64_t first, uint64_t npages, uint64_t *words);
int qm_index_put(qm_index *index, uint64_t first, uint64_t npages, const uint64_t *words,
                 uint64_t end);
uint64_t qm_index_changes(const qm_index *index, const struct qm_change **changes);
int qm_index_put_changes(qm_index *index, const struct qm_change *changes, uint64_t n,
                         uint64_t end);
uint64_t qm_index_count(const qm_index *index);
uint64_t qm_index_run(const qm_index *index, uint64_t first, uint64_t end, int *data);
uint64_t qm_index_from(const qm_index *index, uint64_t page, uint64_t start, uint64_t end);

struct qm_indexed {
    const qm_index *index;
    int fd;
};

ssize_t qm_indexed_fill(void *indexed, void *buf, uint64_t off, size_t len);
int64_t qm_indexed_next(void *indexed, uint64_t off, uint64_t end);

struct qm_mapped {
    const uint64_t *data;
    uint64_t npages;
    int64_t pages_offset;
    uint32_t page_size;
    int fd;
};

ssize_t qm_mapped_fill(void *mapped, void *buf, uint64_t off, size_t len);
int64_t qm_mapped_next(void *mapped, uint64_t off, uint64_t end);

struct qm_part {
    qm_fill_fn fill;
    qm_next_fn next;
    void *arg;
    uint64_t offset;
};

ssize_t qm_part_fill(void *part, void *buf, uint64_t off, size_t len);
int64_t qm_part_next(void *part, uint64_t off, uint64_t end);

struct qm_watch {
    qm_fill_fn fill;
    qm_next_fn next;
    void *arg;
    const unsigned char *head;
    const unsigned char *mask;
    size_t len;
    uint64_t step;
    uint64_t found;
};

ssize_t qm_watch_fill(void *watch, void *buf, uint64_t off, size_t len);
int64_t qm_watch_next(void *watch, uint64_t off, uint64_t end);
uint64_t qm_run(const uint64_t *bits, uint64_t first, uint64_t end);

int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align);
