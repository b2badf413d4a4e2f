/*
 * A guest that never stops changing its memory, and looks at what it finds there.
 *
 * It writes the pattern of pattern_guest.s (pattern_guest.py has it in Python): in generation g it
 * rewrites the pages FIRST_PAGE up to END_PAGE (exclusive), in order, words in ascending order.
 * Before it rewrites a page it compares all of it with what it wrote there a generation ago, so a
 * page that was lost, torn or misplaced by a save and a restore is seen by the guest itself. After
 * each generation it writes a byte to the first serial port: the low 7 bits of g, or 0xff when a
 * page was wrong. ring3.S writes 0xfe when the processor reports a fault.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { WORDS = 1024, SERIAL = 0x3f8, STATUS = 0x3fd, READY = 0x20, WRONG = 0xff };

/* Each is an instruction of one byte, which ring3.S carries out. */
static u8 in(u16 port)
{
    u8 value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "d"(port) : "memory");
    return value;
}

static void out(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "d"(port) : "memory");
}

static void say(u8 byte)
{
    while (!(in(STATUS) & READY))
        ;
    out(SERIAL, byte);
}

static int is_zero(u32 generation, u32 page)
{
    return generation == 0 || (page + generation) % ZERO_EVERY == 0;
}

static int is_as_written(const volatile u32 *words, u32 generation, u32 page)
{
    u32 expected = generation * MUL_GENERATION + page * MUL_PAGE, wrong = 0;
    int zero = is_zero(generation, page);

    wrong |= words[0] ^ (zero ? 0 : generation);
    wrong |= words[1] ^ (zero ? 0 : page);
    for (u32 i = 2; i < WORDS; i++)
        wrong |= words[i] ^ (zero ? 0 : expected + i * MUL_WORD);
    return wrong == 0;
}

static void write(volatile u32 *words, u32 generation, u32 page)
{
    u32 first = generation * MUL_GENERATION + page * MUL_PAGE;

    if (is_zero(generation, page)) {
        for (u32 i = 0; i < WORDS; i++)
            words[i] = 0;
        return;
    }
    words[0] = generation;
    words[1] = page;
    for (u32 i = 2; i < WORDS; i++)
        words[i] = first + i * MUL_WORD;
}

void guest_main(void)
{
    for (u32 generation = 1;; generation++) {
        int right = 1;

        for (u32 page = FIRST_PAGE; page < END_PAGE; page++) {
            volatile u32 *words = (volatile u32 *)((u64)page << 12);

            if (generation > 1) /* firmware has left something there */
                right &= is_as_written(words, generation - 1, page);
            write(words, generation, page);
        }
        say(right ? generation & 0x7f : WRONG);
    }
}
