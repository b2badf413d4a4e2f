/* The atomics that all channels of one save or load share. */
#define _GNU_SOURCE
#include "core_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

struct qm_job {
    atomic_int cancelled;
    _Atomic uint64_t rate;      /* bytes per second; 0: unlimited */
    _Atomic uint64_t rate_set;  /* the number of changes of rate */
    _Atomic uint64_t next_free; /* when the next transfer may start, in ns of CLOCK_MONOTONIC */
    _Atomic uint64_t bytes_done;
    _Atomic uint64_t data_pages;
    _Atomic uint64_t zero_pages;
    _Atomic uint64_t bytes_moved;
    _Atomic uint64_t calls;
};

#define NS ((uint64_t)1000000000)
/* Longest sleep between two polls of the job. */
#define NAP_NS ((uint64_t)20000000)

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

void qm_nap(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / NS), .tv_nsec = (long)(ns % NS)};
    nanosleep(&t, NULL);
}

qm_job *qm_job_create(void)
{
    return calloc(1, sizeof(qm_job));
}

void qm_job_destroy(qm_job *job)
{
    free(job);
}

void qm_job_cancel(qm_job *job)
{
    atomic_store(&job->cancelled, 1);
}

int qm_job_cancelled(const qm_job *job)
{
    return atomic_load(&job->cancelled);
}

void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second)
{
    atomic_store(&job->rate, bytes_per_second);
    atomic_store(&job->next_free, now_ns());
    atomic_fetch_add(&job->rate_set, 1);
}

void qm_job_totals(const qm_job *job, struct qm_totals *out)
{
    out->bytes_done = atomic_load(&job->bytes_done);
    out->data_pages = atomic_load(&job->data_pages);
    out->zero_pages = atomic_load(&job->zero_pages);
    out->bytes_moved = atomic_load(&job->bytes_moved);
    out->calls = atomic_load(&job->calls);
}

void qm_job_count_io(qm_job *job, uint64_t len, uint64_t calls)
{
    atomic_fetch_add(&job->bytes_moved, len);
    if (calls)
        atomic_fetch_add(&job->calls, calls);
}

void qm_job_count_pages(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages)
{
    atomic_fetch_add(&job->bytes_done, bytes);
    atomic_fetch_add(&job->data_pages, data_pages);
    atomic_fetch_add(&job->zero_pages, zero_pages);
}

int qm_job_throttle(qm_job *job, uint64_t len)
{
    if (qm_job_cancelled(job))
        return -ECANCELED;
    uint64_t set = atomic_load(&job->rate_set);
    uint64_t rate = atomic_load(&job->rate);
    if (rate == 0)
        return 0;

    /* Reserve the time that the bytes take at this rate. */
    uint64_t cost = (uint64_t)((double)len / (double)rate * (double)NS);
    uint64_t free_at = atomic_load(&job->next_free);
    uint64_t start;
    do {
        uint64_t now = now_ns();
        start = free_at > now ? free_at : now;
    } while (!atomic_compare_exchange_weak(&job->next_free, &free_at, start + cost));

    for (;;) {
        uint64_t now = now_ns();
        if (qm_job_cancelled(job))
            return -ECANCELED;
        if (now >= start || atomic_load(&job->rate_set) != set)
            return 0;
        qm_nap(start - now < NAP_NS ? start - now : NAP_NS);
    }
}

size_t qm_job_piece(const qm_job *job, size_t unit)
{
    uint64_t rate = atomic_load(&job->rate);
    if (rate == 0 || rate / 20 >= QM_CHUNK)
        return QM_CHUNK;
    size_t piece = (size_t)(rate / 20) / unit * unit;
    return piece ? piece : unit;
}
