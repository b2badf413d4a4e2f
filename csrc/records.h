/* The words of page records in a sequential stream: an offset, with flags in the low bits. */
#ifndef QM_RECORDS_H
#define QM_RECORDS_H

#include "qmigrate.h"

#define RECORD_FULL 0x001u
#define RECORD_ZERO 0x002u
#define RECORD_PAGE 0x008u
#define RECORD_EOS 0x010u
#define RECORD_CONTINUE 0x020u
#define RECORD_XBZRLE 0x040u
#define RECORD_HOOK 0x080u
#define RECORD_COMPRESS 0x100u
#define RECORD_MULTIFD_FLUSH 0x200u

#define WORD_LEN 8u

#endif
