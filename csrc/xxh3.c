/*
 * xxh3-128 of inputs longer than 240 bytes, as the algorithm's specification defines it for a seed
 * of 0: what pages need. The digests are those of the xxHash library, byte for byte; the tests hold
 * them against it.
 *
 * The input is taken in stripes of 64 bytes, each of which is mixed with a part of a constant secret
 * and added to eight accumulators. After every 16 stripes the accumulators are scrambled; the last
 * 64 bytes are a stripe of their own; then the accumulators are folded into two words.
 */
#include "xxh3.h"

#include <errno.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define STRIPE 64u
#define LANES 8u
#define STRIPES 16u /* in one block, after which the accumulators are scrambled */
#define BLOCK (STRIPE * STRIPES)
#define SECRET_STEP 8u /* the secret moves on by this much from stripe to stripe */
#define SECRET_LEN 192u
#define SCRAMBLE_AT (SECRET_LEN - STRIPE)
#define LAST_AT (SECRET_LEN - STRIPE - 7)
#define LOW_AT 11u
#define HIGH_AT (SECRET_LEN - STRIPE - 11)
/* How far ahead memory is asked for: processors do not prefetch past the end of a 4 KiB page. */
#define AHEAD 4096u

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 0xC2B2AE3D27D4EB4Fu
#define P64_3 0x165667B19E3779F9u
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u
#define AVALANCHE 0x165667919E3779F9u

/* The default secret of the specification. */
static const unsigned char secret[SECRET_LEN] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static const uint64_t start[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

static inline uint64_t word_at(const unsigned char *p)
{
    uint64_t w;
    memcpy(&w, p, sizeof(w));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    w = __builtin_bswap64(w);
#endif
    return w;
}

static inline void put_big_endian(unsigned char *p, uint64_t w)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    w = __builtin_bswap64(w);
#endif
    memcpy(p, &w, sizeof(w));
}

/* ---- accumulating: the same in three widths ------------------------------------------------- */

static inline void add_stripe(uint64_t *acc, const unsigned char *in, const unsigned char *key)
{
    for (unsigned i = 0; i < LANES; i++) {
        uint64_t word = word_at(in + 8 * i);
        uint64_t mixed = word ^ word_at(key + 8 * i);
        acc[i ^ 1] += word;
        acc[i] += (uint64_t)(uint32_t)mixed * (mixed >> 32);
    }
}

static inline void scramble(uint64_t *acc)
{
    for (unsigned i = 0; i < LANES; i++) {
        uint64_t word = acc[i] ^ (acc[i] >> 47) ^ word_at(secret + SCRAMBLE_AT + 8 * i);
        acc[i] = word * P32_1;
    }
}

typedef void (*accumulate_fn)(uint64_t *acc, const unsigned char *in, size_t len);

static void accumulate_plain(uint64_t *acc, const unsigned char *in, size_t len)
{
    size_t nblocks = (len - 1) / BLOCK;
    for (size_t b = 0; b < nblocks; b++, in += BLOCK) {
        for (unsigned s = 0; s < STRIPES; s++) {
            __builtin_prefetch(in + AHEAD + s * STRIPE);
            add_stripe(acc, in + s * STRIPE, secret + s * SECRET_STEP);
        }
        scramble(acc);
    }
    size_t left = len - nblocks * BLOCK, nstripes = (left - 1) / STRIPE;
    for (size_t s = 0; s < nstripes; s++) {
        __builtin_prefetch(in + AHEAD + s * STRIPE);
        add_stripe(acc, in + s * STRIPE, secret + s * SECRET_STEP);
    }
    add_stripe(acc, in + left - STRIPE, secret + LAST_AT);
}

#if defined(__x86_64__)

#define VECTOR_LANES 4u /* of 64 bits in a register of AVX2 */

__attribute__((target("avx2"))) static inline __m256i add_avx2(__m256i acc, const void *in,
                                                               const void *key)
{
    __m256i word = _mm256_loadu_si256(in);
    __m256i mixed = _mm256_xor_si256(word, _mm256_loadu_si256(key));
    __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    __m256i swapped = _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(_mm256_add_epi64(acc, swapped), product);
}

__attribute__((target("avx2"))) static inline __m256i scramble_avx2(__m256i acc, const void *key)
{
    const __m256i prime = _mm256_set1_epi64x((long long)P32_1);
    __m256i word = _mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47));
    word = _mm256_xor_si256(word, _mm256_loadu_si256(key));
    __m256i low = _mm256_mul_epu32(word, prime);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(word, 32), prime);
    return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) static void accumulate_avx2(uint64_t *acc, const unsigned char *in,
                                                            size_t len)
{
    const size_t half = STRIPE / 2;
    __m256i a = _mm256_loadu_si256((const void *)acc);
    __m256i b = _mm256_loadu_si256((const void *)(acc + VECTOR_LANES));
    size_t nblocks = (len - 1) / BLOCK;
    for (size_t n = 0; n < nblocks; n++, in += BLOCK) {
        for (unsigned s = 0; s < STRIPES; s++) {
            const unsigned char *p = in + s * STRIPE, *key = secret + s * SECRET_STEP;
            __builtin_prefetch(p + AHEAD);
            a = add_avx2(a, p, key);
            b = add_avx2(b, p + half, key + half);
        }
        a = scramble_avx2(a, secret + SCRAMBLE_AT);
        b = scramble_avx2(b, secret + SCRAMBLE_AT + half);
    }
    size_t left = len - nblocks * BLOCK, nstripes = (left - 1) / STRIPE;
    for (size_t s = 0; s < nstripes; s++) {
        const unsigned char *p = in + s * STRIPE, *key = secret + s * SECRET_STEP;
        __builtin_prefetch(p + AHEAD);
        a = add_avx2(a, p, key);
        b = add_avx2(b, p + half, key + half);
    }
    a = add_avx2(a, in + left - STRIPE, secret + LAST_AT);
    b = add_avx2(b, in + left - half, secret + LAST_AT + half);
    _mm256_storeu_si256((void *)acc, a);
    _mm256_storeu_si256((void *)(acc + VECTOR_LANES), b);
}

static accumulate_fn widest(void)
{
    return __builtin_cpu_supports("avx2") ? accumulate_avx2 : accumulate_plain;
}

#else

static accumulate_fn widest(void)
{
    return accumulate_plain;
}

#endif

/* ---- folding -------------------------------------------------------------------------------- */

static inline uint64_t fold_product(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t fold(const uint64_t *acc, const unsigned char *key, uint64_t sum)
{
    for (unsigned i = 0; i < LANES; i += 2)
        sum += fold_product(acc[i] ^ word_at(key + 8 * i), acc[i + 1] ^ word_at(key + 8 * i + 8));
    sum ^= sum >> 37;
    sum *= AVALANCHE;
    return sum ^ (sum >> 32);
}

static void digest_with(accumulate_fn accumulate, const void *bytes, size_t len,
                        unsigned char *digest)
{
    uint64_t acc[LANES];
    memcpy(acc, start, sizeof(acc));
    accumulate(acc, bytes, len);
    put_big_endian(digest, fold(acc, secret + HIGH_AT, ~(uint64_t)(len * P64_2)));
    put_big_endian(digest + 8, fold(acc, secret + LOW_AT, len * P64_1));
}

void qm_xxh3_pages(const void *bytes, uint64_t npages, size_t page_size, unsigned char *digests)
{
    accumulate_fn accumulate = widest();
    const unsigned char *page = bytes;
    for (uint64_t k = 0; k < npages; k++, page += page_size, digests += QM_DIGEST)
        digest_with(accumulate, page, page_size, digests);
}

int qm_xxh3_128(const void *bytes, size_t len, int portable, unsigned char *digest)
{
    if (len <= 240)
        return -EINVAL;
    digest_with(portable ? accumulate_plain : widest(), bytes, len, digest);
    return 0;
}
