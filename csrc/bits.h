/* Access to a bitmap of native 64-bit words. */
#ifndef QM_BITS_H
#define QM_BITS_H

#include <stddef.h>
#include <stdint.h>

static inline int bit_get(const uint64_t *bits, size_t k)
{
    return (int)(bits[k / 64] >> (k % 64) & 1);
}

static inline void bit_set(uint64_t *bits, size_t k)
{
    bits[k / 64] |= (uint64_t)1 << (k % 64);
}

static inline void bit_clear(uint64_t *bits, size_t k)
{
    bits[k / 64] &= ~((uint64_t)1 << (k % 64));
}

/* Return a mask of the bits of word `w` that are below `n`. */
static inline uint64_t bits_below(size_t w, size_t n)
{
    return n - w * 64 >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << (n - w * 64)) - 1;
}

/* Return the first bit in [from, n) that is set (flip 0) or clear (flip ~0), or n. */
static inline size_t bit_find(const uint64_t *bits, size_t from, size_t n, uint64_t flip)
{
    while (from < n) {
        uint64_t w = (bits[from / 64] ^ flip) >> (from % 64);
        if (w) {
            size_t k = from + (size_t)__builtin_ctzll(w);
            return k < n ? k : n;
        }
        from = (from / 64 + 1) * 64;
    }
    return n;
}

static inline size_t next_set(const uint64_t *bits, size_t from, size_t n)
{
    return bit_find(bits, from, n, 0);
}

static inline size_t next_clear(const uint64_t *bits, size_t from, size_t n)
{
    return bit_find(bits, from, n, ~(uint64_t)0);
}

#endif
