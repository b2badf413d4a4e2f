/* What is known of a page by its content: one notion a file (filled.c, entropy.c). */
#ifndef QM_PAGE_CLASS_H
#define QM_PAGE_CLASS_H

#include "core_internal.h"

/* n * log2(n) for numbers of equal bytes in a sample, less a correction; 16 bits behind the point. It
 * takes some 10 microseconds to make. */
struct entropy_table {
    int32_t weighted[QM_ENTROPY_SAMPLE + 1];
};

void entropy_init(struct entropy_table *table);
/* The entropy of a page in 1/256 bit a byte, 0 to 2048: the mean over its pieces of 4 KiB. */
uint32_t page_entropy(const struct entropy_table *table, const unsigned char *page, size_t len);

/* Whether all 64-bit words of the page are equal; those of a zero page are. */
int page_filled(const unsigned char *page, size_t len);

/* The class of each page: see qm_classify. */
void classify(const struct entropy_table *table, const unsigned char *bytes, uint64_t npages,
              uint32_t page_size, uint16_t *classes);

#endif
