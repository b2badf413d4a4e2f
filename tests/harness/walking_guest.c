/*
 * A guest that reads one word of each page of its working set, in a scattered order, over and over:
 * what a restore from a cold file costs. walking_guest.py is its harness.
 *
 * The working set is PAGES pages in clusters of CLUSTER pages, one in each SPREAD pages of memory.
 * Every page of memory from FIRST on holds its number, written once.
 */
typedef unsigned long u64;

static volatile struct {
    u64 visited; /* pages, of all walks */
    u64 wrong;   /* pages that did not hold their number */
} progress __attribute__((section(".progress"), aligned(4096))) = {0};

static volatile u64 *word_of(u64 number)
{
    return (volatile u64 *)(FIRST + number * 4096);
}

void guest_main(void)
{
    u64 page = 0;

    for (u64 number = 0; number < PAGES / CLUSTER * SPREAD; number++)
        *word_of(number) = number + 1;
    for (;;) {
        u64 number = page / CLUSTER * SPREAD + page % CLUSTER;

        if (*word_of(number) != number + 1)
            progress.wrong++;
        progress.visited++;
        page = (page + STRIDE) % PAGES;
    }
}
