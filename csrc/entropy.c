/* How evenly the bytes of a page are spread: its order-0 entropy, from a sample of its lines. */
#include "page_class.h"

#include <string.h>

#define LINE 64u
#define SAMPLE QM_ENTROPY_SAMPLE /* bytes of each piece that are counted */
#define PIECE 4096u
#define FRACTION 16u /* bits behind the point */
#define AHEAD 2u     /* pieces between what is prefetched and what is counted */
/* A sample shows too little entropy: by 1 / (2 ln 2) bit for each different byte and byte counted (Miller
 * and Madow). This is the difference between a sample of an eighth and the whole. */
#define CORRECTION ((int32_t)(0.7213475204 * 7 / 8 * (1 << FRACTION)))

/* log2 of 1 to SAMPLE, with FRACTION bits behind the point, rounded down. */
static uint32_t log2_fixed(uint32_t n)
{
    uint32_t whole = 31 - (uint32_t)__builtin_clz(n);
    uint64_t mantissa = (uint64_t)n << (31 - whole); /* 1 to 2, with 31 bits behind the point */
    uint32_t log = whole;
    for (unsigned i = 0; i < FRACTION; i++) {
        mantissa = mantissa * mantissa >> 31;
        uint32_t bit = (uint32_t)(mantissa >> 32);
        mantissa >>= bit;
        log = log << 1 | bit;
    }
    return log;
}

void entropy_init(struct entropy_table *table)
{
    table->weighted[0] = 0;
    for (uint32_t n = 1; n <= SAMPLE; n++)
        table->weighted[n] = (int32_t)(n * log2_fixed(n)) - CORRECTION;
}

/* Four histograms: one would wait for its own stores where bytes repeat. A table has at most SAMPLE / 4. */
struct counts {
    _Alignas(16) uint8_t table[4][256];
};

static inline void count_line(struct counts *counts, const unsigned char *line)
{
    for (unsigned i = 0; i < LINE; i += 8) {
        uint64_t word;
        memcpy(&word, line + i, 8);
        for (unsigned k = 0; k < 8; k++, word >>= 8)
            counts->table[k % 4][word & 0xff]++;
    }
}

static inline unsigned number_of(const struct counts *counts, unsigned value)
{
    return (unsigned)counts->table[0][value] + counts->table[1][value] + counts->table[2][value] +
           counts->table[3][value];
}

/* The sum of the weights of all 256 numbers. Vectors would be filled by as many scalar loads. */
__attribute__((optimize("no-tree-slp-vectorize"))) static int32_t
weigh(const struct entropy_table *table, const struct counts *counts)
{
    uint8_t
        sums[256]; /* too small where one value is half of the sample: then the total shows it */
    unsigned total = 0;
    for (unsigned v = 0; v < 256; v++)
        sums[v] = (uint8_t)number_of(counts, v);
    for (unsigned v = 0; v < 256; v++)
        total += sums[v];
    int32_t a = 0, b = 0, c = 0, d = 0;
    if (total != SAMPLE) {
        for (unsigned v = 0; v < 256; v++)
            a += table->weighted[number_of(counts, v)];
        return a;
    }
    for (unsigned v = 0; v < 256; v += 4) {
        a += table->weighted[sums[v]];
        b += table->weighted[sums[v + 1]];
        c += table->weighted[sums[v + 2]];
        d += table->weighted[sums[v + 3]];
    }
    return a + b + c + d;
}

/* The entropy of `len` bytes, 1 to 4 KiB: of one line of two, four or eight. Which one of a group rotates,
 * so that no period of 512 bytes or less hides from the sample. */
static uint32_t of_piece(const struct entropy_table *table, const unsigned char *bytes, size_t len)
{
    struct counts counts = {0};
    size_t step = len / SAMPLE;
    unsigned log_step = (unsigned)__builtin_ctzll(step);
    for (size_t group = 0; group < SAMPLE / LINE; group++) {
        size_t line = group * step + ((group + (group >> log_step)) & (step - 1));
        __builtin_prefetch(bytes + AHEAD * len + line * LINE);
        count_line(&counts, bytes + line * LINE);
    }
    /* H = log2(n) - sum(c * log2(c)) / n, and the correction for all different bytes but one. */
    int32_t shift = 9 + FRACTION - 8;
    int32_t rest = table->weighted[SAMPLE] - weigh(table, &counts);
    int32_t entropy = (rest + (1 << (shift - 1))) >> shift;
    return entropy < 0 ? 0 : entropy > 8 * 256 ? 8 * 256 : (uint32_t)entropy;
}

uint32_t page_entropy(const struct entropy_table *table, const unsigned char *page, size_t len)
{
    if (len <= PIECE)
        return of_piece(table, page, len);
    uint32_t sum = 0, pieces = (uint32_t)(len / PIECE);
    for (uint32_t k = 0; k < pieces; k++)
        sum += of_piece(table, page + (size_t)k * PIECE, PIECE);
    return (sum + pieces / 2) / pieces;
}
