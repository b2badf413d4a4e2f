/*
 * A guest that reads its working set again and again: runs of RUN_PAGES pages, apart from each
 * other, in a scattered order. bench/compare/walking.py is its counterpart.
 */
typedef unsigned long u64;

static volatile struct {
    u64 visited; /* pages, since the start */
    u64 sum;     /* of what was read, so that it is read */
} progress __attribute__((section(".progress"), aligned(4096))) = {0};

static const volatile u64 *words_at(u64 offset)
{
    return (const volatile u64 *)(offset < LOW_BYTES ? offset : offset - LOW_BYTES + (1UL << 32));
}

void guest_main(void)
{
    for (u64 run = 0;; run = (run + STEP) % RUNS) {
        for (u64 page = 0; page < RUN_PAGES; page++) {
            progress.sum += *words_at(FIRST + run * APART + page * 4096);
            progress.visited++;
        }
    }
}
