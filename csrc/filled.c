/* A page of one 64-bit word, again and again. */
#include "page_class.h"

#define STRIDE 256u /* bytes compared between two decisions */
#define AHEAD 4096u

typedef uint64_t word __attribute__((may_alias, aligned(1)));

int page_filled(const unsigned char *page, size_t len)
{
    const word first = *(const word *)page;
    for (size_t i = 0; i < len; i += STRIDE) {
        const word *w = (const word *)(page + i);
        uint64_t a = 0, b = 0, c = 0, d = 0;
        for (size_t line = 0; line < STRIDE; line += 64)
            __builtin_prefetch(page + i + AHEAD + line);
        for (unsigned k = 0; k < STRIDE / sizeof(word); k += 4) {
            a |= w[k] ^ first;
            b |= w[k + 1] ^ first;
            c |= w[k + 2] ^ first;
            d |= w[k + 3] ^ first;
        }
        if (a | b | c | d)
            return 0;
    }
    return 1;
}
