/* Digests of pages. Inside of the core. */
#ifndef QM_XXH3_H
#define QM_XXH3_H

#include "qmigrate.h"

/* Puts the digest of each of `npages` pages at `bytes` into `digests`, QM_DIGEST bytes each. A page
 * has more than 240 bytes. */
void qm_xxh3_pages(const void *bytes, uint64_t npages, size_t page_size, unsigned char *digests);

#endif
