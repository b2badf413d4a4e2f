/* Read memory as fast as one thread can, with the widest vectors of this machine: what the zero scan is
 * compared with. Compile with -O3 -march=native, as a shared library. */
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64), aligned(64)));

/* Return the OR of all words of `len` bytes at `bytes`, which is a multiple of 64. `len` is a multiple
 * of 512. */
uint64_t vector_read(const void *bytes, size_t len)
{
    const vector *v = bytes;
    vector a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < len / sizeof(vector); i += 4) {
        a |= v[i];
        b |= v[i + 1];
        c |= v[i + 2];
        d |= v[i + 3];
    }
    a |= b | c | d;
    uint64_t all = 0;
    for (int word = 0; word < 8; word++)
        all |= a[word];
    return all;
}
