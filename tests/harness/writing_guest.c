/*
 * A guest that rewrites its working set at a set speed, in a pattern that shows any stale, lost or
 * torn page, and counts a heartbeat. writing_guest.py has the pattern in Python.
 *
 * A page is numbered by its offset in the RAM block. In generation g = 1, 2, ... the pages of the
 * working set are rewritten in order, the words of a page in ascending order:
 *
 *   page p is all zero if (p + g) is a multiple of ZERO_EVERY; otherwise
 *   word 0 = g + (p << 32), word i = g * MUL_GENERATION + p * MUL_PAGE + i * MUL_WORD
 *
 * The pages behind the working set that are to be filled are written once, before generation 1, as
 * those of generation FILLED. From generation 2 on each page is first compared with what it held.
 *
 * The harness reads and writes the two structures from outside; their places are fixed.
 */
typedef unsigned int u32;
typedef unsigned long u64;

enum { WORDS = 512, BURST = 256 };

static const u32 FILLED = 0xffffffffu;

/* What the guest is doing; on a page of its own. */
static volatile struct {
    u64 heartbeat; /* grows whenever the processor runs */
    u64 position;  /* generation << 32 | number of pages of it that are written */
    u64 ticks;     /* time stamp counter at the last heartbeat */
    u64 wrong;     /* pages that did not hold what was written there */
    u64 wrong_page;
} progress __attribute__((section(".progress"), aligned(4096))) = {0};

/* What it is to do; the harness sets it in the kernel's file, and `interval` at any time. */
static volatile struct {
    u32 first_page;
    u32 end_page;   /* of the working set, exclusive */
    u32 filled_end; /* of the filled pages, exclusive */
    u32 low_pages;  /* pages below 4 GiB; those after them are at 4 GiB and above */
    u64 interval;   /* ticks per page; 0: as fast as possible */
    u64 verify;     /* whether pages are compared before they are rewritten */
} settings __attribute__((section(".settings"), aligned(4096))) = {
    /* found in the file by these, and replaced */
    0x69732121,
    0x73657474,
    0x74746573,
    0x21217369,
};

static u64 ticks(void)
{
    u32 low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return low | (u64)high << 32;
}

static void beat(void)
{
    progress.heartbeat++;
    progress.ticks = ticks();
}

static u64 *words_of(u32 page)
{
    u64 low = settings.low_pages;

    return (u64 *)(page < low ? (u64)page << 12 : (1UL << 32) + ((page - low) << 12));
}

static u64 first_word(u32 generation, u32 page)
{
    return generation * MUL_GENERATION + page * MUL_PAGE + MUL_WORD;
}

static int is_zero(u32 generation, u32 page)
{
    return (generation + (u64)page) % ZERO_EVERY == 0;
}

static int is_as_written(const u64 *words, u32 generation, u32 page)
{
    int zero = is_zero(generation, page);
    u64 expected = zero ? 0 : first_word(generation, page), step = zero ? 0 : MUL_WORD;
    u64 wrong = words[0] ^ (zero ? 0 : generation | (u64)page << 32);

    for (u32 i = 1; i < WORDS; i++, expected += step)
        wrong |= words[i] ^ expected;
    return wrong == 0;
}

static void write(volatile u64 *words, u32 generation, u32 page)
{
    int zero = is_zero(generation, page);
    u64 word = zero ? 0 : first_word(generation, page), step = zero ? 0 : MUL_WORD;

    words[0] = zero ? 0 : generation | (u64)page << 32;
    for (u32 i = 1; i < WORDS; i++, word += step)
        words[i] = word;
}

/* Wait until the next page is due. After a stall at most BURST pages are caught up. */
static u64 pace(u64 due)
{
    long interval = (long)settings.interval, early;

    due += (u64)interval;
    early = (long)(due - progress.ticks);
    if (early > interval || early < -BURST * interval) /* the counter was set, or a stall */
        due = progress.ticks;
    while ((early = (long)(due - progress.ticks)) > 0 && early <= interval)
        beat();
    return due;
}

void guest_main(void)
{
    u32 first = settings.first_page, end = settings.end_page;
    u64 due;

    for (u32 page = end; page < settings.filled_end; page++) {
        write(words_of(page), FILLED, page);
        beat();
    }
    due = ticks();
    for (u32 generation = 1;; generation++) {
        progress.position = (u64)generation << 32;
        for (u32 page = first; page < end; page++) {
            u64 *words = words_of(page);

            if (generation > 1 && settings.verify && !is_as_written(words, generation - 1, page)) {
                if (progress.wrong++ == 0)
                    progress.wrong_page = page;
            }
            write(words, generation, page);
            progress.position++;
            beat();
            due = generation > 1 ? pace(due) : progress.ticks;
        }
    }
}
