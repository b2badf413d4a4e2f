/* Count bits and find runs in bitmaps, for Python. */
#include "bits.h"
#include "qmigrate.h"

uint64_t qm_count(const uint64_t *bits, uint64_t npages, int64_t *last)
{
    uint64_t count = 0;
    *last = -1;
    for (uint64_t k = 0; k < npages; k += 64) {
        uint64_t w = bits[k / 64];
        if (npages - k < 64)
            w &= ((uint64_t)1 << (npages - k)) - 1;
        if (w) {
            count += (uint64_t)__builtin_popcountll(w);
            *last = (int64_t)(k + 63 - (uint64_t)__builtin_clzll(w));
        }
    }
    return count;
}

uint64_t qm_run(const uint64_t *bits, uint64_t first, uint64_t end)
{
    uint64_t flip = first < end && bits[first / 64] >> first % 64 & 1 ? ~(uint64_t)0 : 0;
    for (uint64_t k = first; k < end; k = (k / 64 + 1) * 64) {
        uint64_t differ = (bits[k / 64] ^ flip) >> k % 64;
        if (differ) {
            uint64_t at = k + (uint64_t)__builtin_ctzll(differ);
            return at < end ? at : end;
        }
    }
    return end;
}
