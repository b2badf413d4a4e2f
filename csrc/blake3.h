/* Keyed BLAKE3 of pages of 4096 bytes. Inside of the core. */
#ifndef QM_BLAKE3_H
#define QM_BLAKE3_H

#include "qmigrate.h"

#define QM_BLAKE3_GROUP 8u /* pages at a time */

struct qm_blake3_key {
    uint32_t words[8];
    int portable; /* without the vector instructions of this processor */
};

void qm_blake3_key_init(struct qm_blake3_key *key, const unsigned char *bytes, int portable);

/* Puts the digest of pages[i] at digests[i], QM_DIGEST bytes each, for i < QM_BLAKE3_GROUP. */
void qm_blake3_group(const struct qm_blake3_key *key, const unsigned char *const *pages,
                     unsigned char *const *digests);

#endif
