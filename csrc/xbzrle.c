/* XBZRLE: changes to a page, as runs of bytes that stay and bytes that are new. */
#include "qmigrate.h"

#include <errno.h>
#include <string.h>

static int read_length(const unsigned char **at, const unsigned char *end, size_t *length)
{
    if (*at == end)
        return -1;
    *length = *(*at)++;
    if (*length < 0x80)
        return 0;
    if (*at == end || **at >= 0x80)
        return -1;
    *length = (*length & 0x7F) | (size_t)*(*at)++ << 7;
    return 0;
}

int qm_apply_delta(const unsigned char *delta, size_t len, unsigned char *page, size_t page_size)
{
    const unsigned char *at = delta, *end = delta + len;
    size_t done = 0;
    while (at < end) {
        size_t same, changed;
        if (read_length(&at, end, &same) || (same == 0 && done > 0) || same > page_size - done)
            return -EBADMSG;
        done += same;
        if (read_length(&at, end, &changed) || changed == 0 || changed > page_size - done ||
            changed > (size_t)(end - at))
            return -EBADMSG;
        memcpy(page + done, at, changed);
        at += changed;
        done += changed;
    }
    return 0;
}
