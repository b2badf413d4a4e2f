/* What Python binds of qmigrate.h, where every function is explained. */

#define QM_CHUNK ...
#define QM_MIN_PAGE ...
#define QM_MAX_PAGE ...

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

qm_channel *qm_channel_create(void);
void qm_channel_destroy(qm_channel *channel);

typedef ssize_t (*qm_fill_fn)(void *arg, void *buf, uint64_t off, size_t len);

struct qm_memory {
    unsigned char *base;
    int fd;
    int64_t fd_offset;
    qm_fill_fn fill;
    void *fill_arg;
};

struct qm_block {
    uint64_t len;
    int64_t pages_offset;
    uint32_t page_size;
};

struct qm_file {
    int fd;
    int fd_direct;
    uint32_t mem_align;
    uint32_t off_align;
};

struct qm_fault {
    int in_memory;
    int64_t at;
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

int qm_direct_align(int fd, uint32_t *mem_align, uint32_t *off_align);
