/*
 * Keyed BLAKE3 of many pages of 4096 bytes at once, as the algorithm's specification defines it. The
 * digests are the first 16 bytes of those of the BLAKE3 library; the tests hold them against it.
 *
 * A page is four chunks of 16 blocks of 64 bytes, and a tree over them: two parents and a root. Eight
 * lanes of a vector take eight chunks (of two pages), eight parents or eight roots. The vectors are
 * those of the compiler, so that the same lines work on every processor; the compiler makes them
 * three times for x86.
 */
#include "blake3.h"

#include <errno.h>
#include <string.h>

#define LANES 8u
#define BLOCK 64u
#define CHUNK 1024u
#define CHUNKS 4u /* of a page */
#define PAGE (CHUNK * CHUNKS)
#define CV 32u /* bytes of a chaining value */

#define CHUNK_START 1u
#define CHUNK_END 2u
#define PARENT 4u
#define ROOT 8u
#define KEYED 16u

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));
/* The same anywhere in memory. */
typedef uint32_t loose __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

static const uint32_t iv[4] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A};

/* Which words of the message each round takes, in the order of its mixes. */
static const unsigned char schedule[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1},
    {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4},
    {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

/* The same number in all lanes. */
#define ALL(x) ((lanes){x, x, x, x, x, x, x, x})

#define ROTATE(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

#define MIX(a, b, c, d, x, y)                                                                      \
    do {                                                                                           \
        v[a] += v[b] + m[x];                                                                       \
        v[d] = ROTATE(v[d] ^ v[a], 16);                                                            \
        v[c] += v[d];                                                                              \
        v[b] = ROTATE(v[b] ^ v[c], 12);                                                            \
        v[a] += v[b] + m[y];                                                                       \
        v[d] = ROTATE(v[d] ^ v[a], 8);                                                             \
        v[c] += v[d];                                                                              \
        v[b] = ROTATE(v[b] ^ v[c], 7);                                                             \
    } while (0)

#define ROUND(r)                                                                                   \
    do {                                                                                           \
        MIX(0, 4, 8, 12, schedule[r][0], schedule[r][1]);                                          \
        MIX(1, 5, 9, 13, schedule[r][2], schedule[r][3]);                                          \
        MIX(2, 6, 10, 14, schedule[r][4], schedule[r][5]);                                         \
        MIX(3, 7, 11, 15, schedule[r][6], schedule[r][7]);                                         \
        MIX(0, 5, 10, 15, schedule[r][8], schedule[r][9]);                                         \
        MIX(1, 6, 11, 12, schedule[r][10], schedule[r][11]);                                       \
        MIX(2, 7, 8, 13, schedule[r][12], schedule[r][13]);                                        \
        MIX(3, 4, 9, 14, schedule[r][14], schedule[r][15]);                                        \
    } while (0)

/* Word i of lane k becomes word k of lane i. */
INLINE void transpose(lanes *w)
{
    lanes t[LANES];
    for (unsigned i = 0; i < LANES; i += 2) {
        t[i] = PICK(w[i], w[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = PICK(w[i], w[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (unsigned i = 0; i < LANES; i += 4) {
        w[i] = PICK(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        w[i + 1] = PICK(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        w[i + 2] = PICK(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        w[i + 3] = PICK(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (unsigned i = 0; i < LANES / 2; i++) {
        t[i] = PICK(w[i], w[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = PICK(w[i], w[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (unsigned i = 0; i < LANES; i++)
        w[i] = t[i];
}

INLINE void turn_words(lanes *w, unsigned n)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (unsigned i = 0; i < n; i++)
        w[i] = w[i] << 24 | (w[i] & 0xFF00u) << 8 | (w[i] >> 8 & 0xFF00u) | w[i] >> 24;
#else
    (void)w;
    (void)n;
#endif
}

/* The 16 words of the block at `from[lane] + at` of each lane. */
INLINE void load_blocks(lanes *m, const unsigned char *const *from, size_t at)
{
    for (unsigned half = 0; half < 2; half++) {
        lanes *w = m + half * LANES;
        for (unsigned i = 0; i < LANES; i++)
            w[i] = *(const loose *)(from[i] + at + half * (BLOCK / 2));
        turn_words(w, LANES);
        transpose(w);
    }
}

/* Eight words of each lane, one lane after another. */
INLINE void store_values(unsigned char *to, lanes *cv)
{
    transpose(cv);
    turn_words(cv, LANES);
    for (unsigned i = 0; i < LANES; i++)
        *(loose *)(to + i * CV) = cv[i];
}

INLINE void compress(lanes *cv, const lanes *m, const lanes *counter, const lanes *flags)
{
    lanes v[16] = {
        cv[0],      cv[1],      cv[2],      cv[3],      cv[4],    cv[5],  cv[6],      cv[7],
        ALL(iv[0]), ALL(iv[1]), ALL(iv[2]), ALL(iv[3]), *counter, ALL(0), ALL(BLOCK), *flags,
    };
    ROUND(0);
    ROUND(1);
    ROUND(2);
    ROUND(3);
    ROUND(4);
    ROUND(5);
    ROUND(6);
    for (unsigned i = 0; i < 8; i++)
        cv[i] = v[i] ^ v[i + 8];
}

INLINE void start(lanes *cv, const uint32_t *key)
{
    for (unsigned i = 0; i < 8; i++)
        cv[i] = ALL(key[i]);
}

/* The values of eight chunks: of two pages. */
INLINE void hash_chunks(const uint32_t *key, const unsigned char *const *chunks, unsigned char *to)
{
    const lanes counter = {0, 1, 2, 3, 0, 1, 2, 3};
    const lanes middle = ALL(KEYED), first = middle | CHUNK_START, last = middle | CHUNK_END;
    lanes cv[8], m[16];
    start(cv, key);
    for (size_t at = 0; at < CHUNK; at += BLOCK) {
        const lanes *flags = at == 0 ? &first : at == CHUNK - BLOCK ? &last : &middle;
        load_blocks(m, chunks, at);
        compress(cv, m, &counter, flags);
    }
    store_values(to, cv);
}

/* The values of the eight parents of sixteen values. */
INLINE void hash_parents(const uint32_t *key, const unsigned char *values, uint32_t flags,
                         unsigned char *to)
{
    const lanes counter = ALL(0), all_flags = ALL(flags | KEYED | PARENT);
    const unsigned char *from[LANES];
    lanes cv[8], m[16];
    for (unsigned i = 0; i < LANES; i++)
        from[i] = values + i * 2 * CV;
    start(cv, key);
    load_blocks(m, from, 0);
    compress(cv, m, &counter, &all_flags);
    store_values(to, cv);
}

INLINE void hash_group(const uint32_t *key, const unsigned char *const *pages,
                       unsigned char *const *digests)
{
    unsigned char chunks[QM_BLAKE3_GROUP * CHUNKS * CV], parents[QM_BLAKE3_GROUP * 2 * CV];
    unsigned char roots[QM_BLAKE3_GROUP * CV];
    for (unsigned i = 0; i < QM_BLAKE3_GROUP; i += 2) {
        const unsigned char *from[LANES];
        for (unsigned k = 0; k < LANES; k++)
            from[k] = pages[i + k / CHUNKS] + k % CHUNKS * CHUNK;
        hash_chunks(key, from, chunks + i * CHUNKS * CV);
    }
    for (unsigned i = 0; i < 2; i++)
        hash_parents(key, chunks + i * LANES * 2 * CV, 0, parents + i * LANES * CV);
    hash_parents(key, parents, ROOT, roots);
    for (unsigned i = 0; i < QM_BLAKE3_GROUP; i++)
        memcpy(digests[i], roots + i * CV, QM_DIGEST);
}

typedef void (*group_fn)(const uint32_t *key, const unsigned char *const *pages,
                         unsigned char *const *digests);

static void group_plain(const uint32_t *key, const unsigned char *const *pages,
                        unsigned char *const *digests)
{
    hash_group(key, pages, digests);
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) static void
group_avx2(const uint32_t *key, const unsigned char *const *pages, unsigned char *const *digests)
{
    hash_group(key, pages, digests);
}

/* No wider, but with rotations, and with registers for state and message. */
__attribute__((target("avx2,avx512f,avx512vl"))) static void
group_avx512vl(const uint32_t *key, const unsigned char *const *pages,
               unsigned char *const *digests)
{
    hash_group(key, pages, digests);
}

static group_fn widest(void)
{
    if (__builtin_cpu_supports("avx512vl"))
        return group_avx512vl;
    return __builtin_cpu_supports("avx2") ? group_avx2 : group_plain;
}

#else

static group_fn widest(void)
{
    return group_plain;
}

#endif

void qm_blake3_key_init(struct qm_blake3_key *key, const unsigned char *bytes, int portable)
{
    for (unsigned i = 0; i < 8; i++, bytes += 4)
        key->words[i] = (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
                        (uint32_t)bytes[3] << 24;
    key->portable = portable;
}

void qm_blake3_group(const struct qm_blake3_key *key, const unsigned char *const *pages,
                     unsigned char *const *digests)
{
    group_fn group = key->portable ? group_plain : widest();
    group(key->words, pages, digests);
}

int qm_blake3_pages(const unsigned char *key_bytes, const void *bytes, uint64_t npages,
                    int portable, unsigned char *digests)
{
    struct qm_blake3_key key;
    qm_blake3_key_init(&key, key_bytes, portable);
    const unsigned char *page = bytes;
    for (uint64_t k = 0; k < npages; k += QM_BLAKE3_GROUP) {
        const unsigned char *pages[QM_BLAKE3_GROUP];
        unsigned char *to[QM_BLAKE3_GROUP], unused[QM_DIGEST];
        for (uint64_t i = 0; i < QM_BLAKE3_GROUP; i++) {
            pages[i] = page + (k + i < npages ? k + i : k) * PAGE;
            to[i] = k + i < npages ? digests + (k + i) * QM_DIGEST : unused;
        }
        qm_blake3_group(&key, pages, to);
    }
    return 0;
}
