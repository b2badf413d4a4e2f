/* Pages -> their classes: zero, filled, or data with its entropy. */
#include "page_class.h"

#include <errno.h>

typedef uint64_t word __attribute__((may_alias, aligned(1)));

void classify(const struct entropy_table *table, const unsigned char *bytes, uint64_t npages,
              uint32_t page_size, uint16_t *classes)
{
    for (uint64_t k = 0; k < npages; k++, bytes += page_size) {
        if (page_filled(bytes, page_size))
            classes[k] = *(const word *)bytes ? QM_CLASS_FILLED : QM_CLASS_ZERO;
        else
            classes[k] = (uint16_t)page_entropy(table, bytes, page_size);
    }
}

int qm_classify(const void *bytes, uint64_t npages, uint32_t page_size, uint16_t *classes)
{
    if (page_size < QM_MIN_PAGE || page_size > QM_MAX_PAGE || (page_size & (page_size - 1)))
        return -EINVAL;
    struct entropy_table table;
    entropy_init(&table);
    classify(&table, bytes, npages, page_size, classes);
    return 0;
}
